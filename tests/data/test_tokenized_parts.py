"""A part equals a plain loop over its texts; what is left out is counted, what is broken stops or is named."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.readers import Broken, Item
from data.shards import DataError, read_manifest
from data.tokenize import TextTokenizer
from data.tokenized_parts import TokenizePart, writing


@dataclass(frozen=True)
class Texts:
    """A part out of memory."""

    items: tuple[str | Broken, ...]

    @property
    def size(self) -> int:
        return len(self.items)

    def read(self) -> Iterator[Item]:
        for number, item in enumerate(self.items, start=1):
            yield item, number


def part(folder: Path, *items: str | Broken, **options) -> TokenizePart:
    defaults = {"dtype": "uint16", "tokens_per_file": 60, "preparation": {"a": 1}}
    return TokenizePart(part=Texts(items), folder=folder, **(defaults | options))


def ids_of(folder: Path) -> list[int]:
    raw = b"".join((folder / file.name).read_bytes() for file in read_manifest(folder).files)
    return np.frombuffer(raw, "<u2").tolist()


def test_a_part_equals_a_plain_loop(tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tokenized_parts.BATCH_CHARACTERS", 50)  # many batches, some of one long document
    texts = ["short", "", "é" * 200, "a tab\tand\na line", "x" * 49, "✓ last"]
    reports: list[tuple[int, int]] = []
    manifest = part(tmp_path, *texts).run(tokenizer, lambda *report: reports.append(report))
    plain = Tokenizer.from_str(tokenizer.content.decode())
    expected = [
        i for text in texts if text for i in [*plain.encode(text, add_special_tokens=False).ids, tokenizer.eos_id]
    ]
    assert ids_of(tmp_path) == expected
    assert len(manifest.files) > 1
    assert manifest.documents == 5
    assert manifest.filtered == {"no text at all": 1}
    assert manifest.bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer == tokenizer.identity
    assert manifest == read_manifest(tmp_path)
    assert tuple(map(sum, zip(*reports, strict=True))) == (len(texts), manifest.tokens)


def test_the_size_of_batches_changes_nothing(
    tmp_path: Path, tokenizer: TextTokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part(tmp_path / "a", *texts).run(tokenizer, lambda *_: None)
    for name, value in (("BATCH_CHARACTERS", 1), ("BATCH_DOCUMENTS", 3)):
        monkeypatch.setattr(f"data.tokenized_parts.{name}", value)
        part(tmp_path / name, *texts, threads=2).run(tokenizer, lambda *_: None)
        assert ids_of(tmp_path / name) == ids_of(tmp_path / "a")


def test_filters_leave_out_and_count_by_reason(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    np.save(tmp_path / "repeats.npy", np.array([0, 3], np.uint32))
    long, loop = "the quick brown fox " * 5, "ab" * 500
    items = ("first", "", "kept one", long, "repeated", "tiny", loop, "kept two")
    filters = [{"name": "length", "min_characters": 5, "max_characters": 2000}, {"name": "repetition"}]
    options = {"filters": filters, "repeats": tmp_path / "repeats.npy"}
    manifest = part(tmp_path / "out", *items, **options).run(tokenizer, lambda *_: None)
    kept = ["kept one", long, "kept two"]
    assert ids_of(tmp_path / "out") == [i for ids in tokenizer.encode(kept) for i in [*ids, tokenizer.eos_id]]
    assert manifest.bytes == sum(map(len, kept))
    assert manifest.filtered == {
        "duplicate: the text of an earlier document": 2,
        "length: fewer than 5 characters": 1,
        "no text at all": 1,
        "repetition: an n-gram of 1 to 13 tokens 32 times in a row": 1,
    }


def test_broken_input_stops_or_is_named_and_counted(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    items = ("one", Broken("not JSON", "f, line 2: not JSON."), "three", Broken("not UTF-8", "f, line 4: not UTF-8."))
    with pytest.raises(DataError, match=r"f, line 2: not JSON\. \(on_error=skip leaves such out and counts them\.\)"):
        part(tmp_path, *items).run(tokenizer, lambda *_: None)
    with pytest.raises(DataError, match="did not finish"):
        read_manifest(tmp_path)
    manifest = part(tmp_path, *items, on_error="skip").run(tokenizer, lambda *_: None)
    assert manifest.broken == {"not JSON": 1, "not UTF-8": 1}
    assert manifest.documents == 2
    assert (tmp_path / "skipped.txt").read_text() == "f, line 2: not JSON.\nf, line 4: not UTF-8.\n"
    part(tmp_path, "fine").run(tokenizer, lambda *_: None)
    assert not (tmp_path / "skipped.txt").exists()


def test_a_part_of_which_nothing_is_left_is_finished(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    assert part(tmp_path, "").run(tokenizer, lambda *_: None).files == []
    assert read_manifest(tmp_path).tokens == 0


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data.tokenize import TextTokenizer, load_tokenizer
from tests.data.test_tokenized_parts import part
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
part(Path({folder!r}), *["word " * 100] * 300, tokens_per_file=10**6).run(load_tokenizer({tokenizer!r}, None), print)
"""


def test_output_that_cannot_be_made_is_one_sentence_with_another_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "out"
    sentence = (
        rf"^{folder} cannot be written \(Not a directory\): choose another output, or make that one writable, then"
    )
    with pytest.raises(DataError, match=sentence), writing(folder):
        folder.mkdir(parents=True)


def test_a_disk_that_takes_no_more_is_one_sentence_and_nothing_passes_for_finished(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    root = str(Path(__file__).resolve().parents[2])
    code = LIMITED.format(root=root, folder=str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1] == (
        f"data.shards.DataError: {tmp_path / 'out'} cannot be written (File too large): make room, then give the same "
        "command again, which keeps all finished parts."
    )
    with pytest.raises(DataError, match="did not finish"):
        read_manifest(tmp_path / "out")
