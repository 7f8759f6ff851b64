"""One part of a split, from documents to a finished token dataset: what a worker process does.

In: a part (`data.sources`), a tokenizer. Out: a folder with the part's ids and manifest (`data.shards`), and with
`on_error=skip` a `skipped.txt` that names whatever was broken. The manifest is written last, so a part without one is
made again, and one with it is kept as long as its files have their checksums.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data.filters import build_filters
from data.readers import Broken
from data.shard_writer import ShardWriter
from data.shards import DTYPES, DataError, Manifest, ShardFile, verify_checksums
from data.sources import Part, TokenFile
from data.token_files import count_documents
from data.tokenize import TextTokenizer

SKIPPED_NAME = "skipped.txt"
BATCH_CHARACTERS = 500_000  # text encoded at once by each thread: long enough to keep it busy, little memory
BATCH_DOCUMENTS = 2048
ON_ERROR = ("stop", "skip")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Report = Callable[[int, int], None]  # told how much of the source was read, and how many ids were made, since last time


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the disk refuses below `folder` inside the context is a `DataError` that says how to go on."""
    try:
        yield
    except ConnectionError:  # of a report: the process that asked for the work is gone
        raise
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "choose another output, or make that one writable"
        raise DataError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}): {remedy}, then give the same "
            "command again, which keeps all finished parts."
        ) from error


def undamaged(folder: Path) -> bool:
    """Whether the files of a finished part are those of its manifest; if not, a line says that it is made again."""
    try:
        verify_checksums(folder)
    except DataError as error:
        print(f"{str(error).rpartition(': ')[0]}: this part is made again", flush=True)
        return False
    return True


@dataclass
class _Batch:
    """Documents to be encoded together."""

    texts: list[str] = field(default_factory=list)
    characters: int = 0
    position: int = 0  # in the part, after the last of them


@dataclass(frozen=True)
class TokenizePart:
    """The work on one part, and all that decides its result."""

    part: Part | TokenFile
    folder: Path
    dtype: str
    tokens_per_file: int
    preparation: dict[str, Any]  # for the manifest
    filters: list[dict[str, Any]] = field(default_factory=list)
    repeats: Path | None = None  # numbers of the documents that repeat earlier ones
    on_error: str = "stop"
    threads: int = 1

    def run(self, tokenizer: TextTokenizer, report: Report) -> Manifest:
        """Write the part. Raises `DataError` for broken input with `on_error="stop"`, and when it cannot be written."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / SKIPPED_NAME).unlink(missing_ok=True)
            with ShardWriter(
                self.folder,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                tokens_per_file=self.tokens_per_file,
                dtype=self.dtype,
            ) as writer:
                if isinstance(self.part, TokenFile):
                    return self._adopt(self.part, tokenizer, writer, report)
                return self._tokenize(self.part, tokenizer, writer, report)

    def _adopt(self, file: TokenFile, tokenizer: TextTokenizer, writer: ShardWriter, report: Report) -> Manifest:
        """A manifest beside a link to the file: its ids are counted and checked, not copied."""
        path = Path(file.path)
        broken = {}
        try:
            found = count_documents(path, self.dtype, tokenizer, lambda read: report(read, 0))
        except DataError as error:
            if self.on_error == "stop":
                raise
            (self.folder / SKIPPED_NAME).write_text(f"{error}\n", encoding="utf-8")
            broken["token file"] = 1
        else:
            file.check()
            link = self.folder / f"00000{path.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(path)
            tokens = file.size // DTYPES[self.dtype].itemsize
            writer.adopt(ShardFile(link.name, tokens, file.size, found.sha256), found.documents, found.text_bytes)
            report(0, tokens)
        return writer.finish(
            tokenizer=tokenizer.identity, preparation=self.preparation, broken=broken, allow_empty=True
        )

    def _tokenize(self, part: Part, tokenizer: TextTokenizer, writer: ShardWriter, report: Report) -> Manifest:
        """One thread reads ahead while the others encode; memory holds three batches whatever the size of the part."""
        filters = build_filters(self.filters)
        by_text: Counter[str] = Counter()  # of the reading thread
        by_ids: Counter[str] = Counter()
        broken: Counter[str] = Counter()
        position = 0
        batches = self._batches(part, filters, by_text, broken)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
            ahead = reader.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = reader.submit(next, batches, None)
                kept, text_bytes = [], 0
                for text, ids in zip(batch.texts, tokenizer.encode(batch.texts), strict=True):
                    array = np.array(ids, dtype=np.int64)
                    reasons = (f"{name}: {why}" for name, one in filters if (why := one.reject_ids(array)) is not None)
                    if (reason := next(reasons, None)) is None:
                        kept.append(array)
                        text_bytes += len(text) if text.isascii() else len(text.encode())
                    else:
                        by_ids[reason] += 1
                before = writer.tokens
                writer.write(kept, text_bytes)
                report(batch.position - position, writer.tokens - before)
                position = batch.position
        report((part.size or position) - position, 0)  # a parent that is gone is noticed before the manifest is written
        return writer.finish(
            tokenizer=tokenizer.identity,
            preparation=self.preparation,
            filtered=dict(sorted((by_text + by_ids).items())),
            broken=dict(sorted(broken.items())),
            allow_empty=True,
        )

    def _batches(self, part: Part, filters: list, filtered: Counter[str], broken: Counter[str]) -> Iterator[_Batch]:
        """Texts that pass the filters of text, in batches; what does not is counted, what is broken named."""
        repeats = set() if self.repeats is None else set(np.load(self.repeats).tolist())
        skipped: TextIO | None = None
        batch = _Batch()
        number = -1  # of the document among those with text, as `data.duplicates` counts them
        try:
            for item, position in part.read():
                batch.position = position
                if isinstance(item, Broken):
                    if self.on_error == "stop":
                        raise DataError(f"{item.message} (on_error=skip leaves such out and counts them.)")
                    skipped = skipped or open(self.folder / SKIPPED_NAME, "w", encoding="utf-8")  # noqa: SIM115
                    print(item.message, file=skipped)
                    broken[item.kind] += 1
                    continue
                if not item:
                    filtered["no text at all"] += 1
                    continue
                number += 1
                if number in repeats:
                    filtered["duplicate: the text of an earlier document"] += 1
                    continue
                reasons = (f"{name}: {why}" for name, one in filters if (why := one.reject_text(item)) is not None)
                if (reason := next(reasons, None)) is not None:
                    filtered[reason] += 1
                    continue
                batch.texts.append(item)
                batch.characters += len(item)
                full = batch.characters >= BATCH_CHARACTERS * self.threads
                if full or len(batch.texts) >= BATCH_DOCUMENTS * self.threads:
                    yield batch
                    batch = _Batch(position=position)
            if batch.texts:
                yield batch
        finally:
            if skipped is not None:
                skipped.close()
