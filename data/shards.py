"""Token shards: the on-disk format between text and training, and the dataset that reads it.

A token dataset is a folder with

    00000.bin 00001.bin ...   raw little-endian token ids, uint16 when the vocabulary allows, else uint32; each document
                              is followed by one end-of-sequence (EOS) id; read in order, the files are one stream. A
                              prepared split has them in a folder for each part, 00000/00000.bin, see `data.prepare`
    manifest.json             what the files are and how they were made; written last and in one step, so a folder
                              without it is unfinished and is never read

and a *shards directory* (`data.path` of a run) holds `train/` and `validation/DOMAIN/`, each such a folder, with the
tokenizer as `tokenizer.json` beside them. `train/` is finished after all others, so its manifest ends the preparation.

In: ids from `data.tokenize`. Out: `ShardWriter` writes a folder, `TokenDataset` cuts it into instances.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT_VERSION = 1
DTYPES: dict[str, np.dtype[np.unsignedinteger[Any]]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class DataError(ValueError):
    """Data that cannot be read, written or used. The message names the file and the remedy in one sentence."""


@dataclass
class ShardFile:
    """One file of a token dataset."""

    name: str  # below the folder, with / where it lies in a part's own folder
    tokens: int  # ids in the file, EOS included
    bytes: int  # size of the file
    sha256: str  # hex digest of the whole file


@dataclass
class Manifest:
    """Everything known about one finished token dataset.

    Bits per byte needs two counts. `tokens` includes the EOS after each document, because the model predicts it and
    pays for it; `bytes` is the UTF-8 length of the texts alone, because EOS is no text. A mean loss in nats per token
    becomes `loss / ln 2 * tokens / bytes` bits per byte, that is `loss / ln 2 / bytes_per_token`.
    """

    dtype: str  # uint16 or uint32
    vocab_size: int  # ids are below this
    tokenizer: dict[str, str]  # name (what the user gave) and sha256 of tokenizer.json
    eos_id: int  # the id after each document
    documents: int  # texts, which is also the number of EOS ids
    tokens: int  # ids in all files, EOS included
    bytes: int  # UTF-8 bytes of the texts, EOS not included
    files: list[ShardFile]  # in reading order
    preparation: dict[str, Any] = field(default_factory=dict)  # the settings that made this split, compared on a repeat
    filtered: dict[str, int] = field(default_factory=dict)  # documents that filters left out, by reason
    broken: dict[str, int] = field(default_factory=dict)  # input that was no document and was skipped, by kind
    version: int = FORMAT_VERSION

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that one id (EOS counted as an id) stands for, on average."""
        return self.bytes / self.tokens

    @property
    def fingerprint(self) -> str:
        """Short hex digest of what defines the content: equal fingerprints mean equal ids, wherever the folder lies."""
        content = [self.dtype, self.vocab_size, self.tokenizer["sha256"], self.eos_id]
        content += [[file.tokens, file.sha256] for file in self.files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def dtype_for(vocab_size: int) -> str:
    """The narrowest type name that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` in one step: a reader sees the old file, or none, or the whole new one, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a finished token dataset, its files checked for existence and size.

    Raises `DataError` when the folder is missing, unfinished or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: prepare it with scripts/prepare_data.py.")
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise DataError(f"{folder} has no {MANIFEST_NAME}, so its preparation did not finish: give that command again.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.get("version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}: prepare the data again."
            )
        known = {f.name for f in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
        manifest.files = [ShardFile(**file) for file in raw["files"]]
        itemsize = DTYPES[manifest.dtype].itemsize
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error}): remove {folder} and prepare it again.") from error
    if sum(file.tokens for file in manifest.files) != manifest.tokens:
        raise DataError(f"{path} is damaged (the files' tokens do not add up): remove {folder} and prepare it again.")
    for file in manifest.files:
        size = (folder / file.name).stat().st_size if (folder / file.name).exists() else None
        if size != file.bytes or file.bytes != file.tokens * itemsize:
            found = "missing" if size is None else f"{size} bytes long"
            raise DataError(
                f"{folder / file.name} is {found} where its manifest says {file.bytes} bytes: "
                f"remove {folder} and prepare it again."
            )
    return manifest


def verify_checksums(folder: str | Path) -> Manifest:
    """The manifest, after reading every file; `DataError` names the first whose SHA-256 is not the manifest's."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for file in manifest.files:
        with open(folder / file.name, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != file.sha256:
            raise DataError(
                f"{folder / file.name} is damaged (its SHA-256 is not the manifest's): "
                f"remove {folder} and prepare it again."
            )
    return manifest


def validation_domains(shards_dir: str | Path) -> list[str]:
    """Names of the validation domains of a shards directory, sorted; empty when there are none.

    Raises `DataError` when one of them is unfinished.
    """
    root = Path(shards_dir) / "validation"
    if not root.is_dir():
        return []
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if "mean" in names:
        raise DataError(f"{root / 'mean'} cannot be a domain: validation/mean is the mean of all; rename the folder.")
    for name in names:
        read_manifest(root / name)
    return names


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare `folder` finished."""
    write_atomically(folder / MANIFEST_NAME, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


class ShardWriter:
    """Writes one token dataset: a context manager that takes documents in order and ends with `finish`.

    Whatever an interrupted attempt left in `folder` is removed first, its manifest before all else. Leaving the context
    without `finish` leaves a folder without a manifest, which no reader accepts.
    """

    def __init__(
        self, folder: Path, *, vocab_size: int, eos_id: int, tokens_per_file: int, dtype: str | None = None
    ) -> None:
        self.folder = folder
        self.dtype_name = dtype or dtype_for(vocab_size)
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.tokens_per_file = tokens_per_file
        self.documents = 0
        self.tokens = 0
        self.text_bytes = 0
        self._files: list[ShardFile] = []
        self._stream: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._tokens_in_file = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for old in [*folder.glob("*.bin"), *folder.glob("*.partial")]:
            old.unlink()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def write(self, documents: Iterable[list[int] | np.ndarray], text_bytes: int) -> None:
        """Append documents (ids without EOS) whose texts have `text_bytes` UTF-8 bytes together; EOS is added here.

        A file is closed after the document that fills it, so each but the last holds `tokens_per_file` ids or more.
        """
        for ids in documents:
            chunk = np.empty(len(ids) + 1, dtype=DTYPES[self.dtype_name])
            chunk[:-1] = ids
            chunk[-1] = self.eos_id
            self._append(chunk)
            self.documents += 1
        self.text_bytes += text_bytes

    def adopt(self, file: ShardFile, documents: int, text_bytes: int) -> None:
        """Count a finished file, which lies in the folder by its name already, as the next one."""
        self._files.append(file)
        self.documents += documents
        self.tokens += file.tokens
        self.text_bytes += text_bytes

    def _append(self, chunk: np.ndarray) -> None:
        if self._stream is None:
            self._stream = open(self.folder / f"{len(self._files):05d}.bin", "wb")  # noqa: SIM115 (closed in __exit__)
        content = chunk.tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self._tokens_in_file += len(chunk)
        self.tokens += len(chunk)
        if self._tokens_in_file >= self.tokens_per_file:
            self._close_file()

    def _close_file(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        name = Path(self._stream.name).name
        size = self._tokens_in_file * DTYPES[self.dtype_name].itemsize
        self._files.append(ShardFile(name, self._tokens_in_file, size, self._digest.hexdigest()))
        self._stream = None
        self._digest = hashlib.sha256()
        self._tokens_in_file = 0

    def finish(
        self,
        *,
        tokenizer: dict[str, str],
        preparation: dict[str, Any],
        filtered: dict[str, int] | None = None,
        broken: dict[str, int] | None = None,
        allow_empty: bool = False,
    ) -> Manifest:
        """Close the last file and write the manifest. Raises `DataError` when no document was written.

        `allow_empty` is for a part of a dataset, of which filters may leave nothing.
        """
        if self._stream is not None:
            self._close_file()
        if not self.documents and not allow_empty:
            raise DataError(f"no document was found for {self.folder}: the source has no text.")
        manifest = Manifest(
            dtype=self.dtype_name,
            vocab_size=self.vocab_size,
            tokenizer=tokenizer,
            eos_id=self.eos_id,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.text_bytes,
            files=self._files,
            preparation=preparation,
            filtered=filtered or {},
            broken=broken or {},
        )
        write_manifest(self.folder, manifest)
        return manifest


class TokenDataset:
    """Instances of a token dataset, memory-mapped: nothing is read before it is asked for.

    The concatenation of all files is cut every `sequence_length` ids; instance `i` is the window of
    `sequence_length + 1` ids that starts at `i * sequence_length`, so with inputs `[:-1]` and targets `[1:]` every id
    but the first is a target exactly once (a rest shorter than an instance is left out). Windows cross document ends.

    Raises `DataError` when the folder is unfinished or damaged, or when it holds no whole instance.
    """

    def __init__(self, folder: str | Path, sequence_length: int) -> None:
        if sequence_length < 1:
            raise DataError(f"data.sequence_length={sequence_length} cannot be used: use a positive integer.")
        self.folder = Path(folder)
        self.sequence_length = sequence_length
        self.manifest = read_manifest(folder)
        self._size = (self.manifest.tokens - 1) // sequence_length
        if self._size < 1:
            raise DataError(
                f"data.sequence_length={sequence_length} is longer than the data: {self.folder} holds "
                f"{self.manifest.tokens} tokens, so use at most {self.manifest.tokens - 1}."
            )
        dtype = DTYPES[self.manifest.dtype]
        self._maps = [np.memmap(self.folder / file.name, dtype=dtype, mode="r") for file in self.manifest.files]
        self._ends = np.cumsum(
            [file.tokens for file in self.manifest.files]
        )  # [files], stream position after each file

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> np.ndarray:
        """Ids of instance `index`: int64 `[sequence_length + 1]`. `IndexError` outside `0 .. len - 1`."""
        if not 0 <= index < self._size:
            raise IndexError(f"instance {index} of {self._size} in {self.folder}")
        out = np.empty(self.sequence_length + 1, dtype=np.int64)
        position = int(index) * self.sequence_length
        file = int(np.searchsorted(self._ends, position, side="right"))
        filled = 0
        while filled < len(out):
            tokens = self._maps[file]
            start = position + filled - (int(self._ends[file]) - len(tokens))
            piece = tokens[start : start + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            file += 1
        return out
