"""C4 files and `datasets` give the texts as they are; broken input is named by file and line."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from data.shards import DataError
from data.sources import C4Files, HuggingFaceDataset, read_c4_file


def test_a_c4_folder_gives_validation_domains_then_training(c4_folder: Path, texts: list[str]) -> None:
    splits = C4Files(str(c4_folder)).splits()
    assert [split.name for split in splits] == ["validation/books", "validation/news", "train"]
    documents = splits[-1].open()
    found = list(documents.items)
    assert [text for text, _ in found] == texts
    positions = [position for _, position in found]
    assert positions == sorted(positions)
    assert positions[-1] == documents.total == sum(path.stat().st_size for path in c4_folder.glob("*.gz"))


def test_settings_follow_the_files_not_the_place(
    c4_folder: Path, tmp_path: Path, write_c4: Callable[[Path, list[str]], Path]
) -> None:
    before = [split.settings for split in C4Files(str(c4_folder)).splits()]
    moved = c4_folder.rename(tmp_path / "moved")
    assert [split.settings for split in C4Files(str(moved)).splits()] == before
    write_c4(moved / "part.2.json.gz", ["one more"])
    after = [split.settings for split in C4Files(str(moved)).splits()]
    assert after[:-1] == before[:-1]
    assert after[-1] != before[-1]


def test_a_folder_without_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*\.json\.gz file"):
        C4Files(str(tmp_path)).splits()
    with pytest.raises(DataError, match="nothing is not a folder"):
        C4Files(str(tmp_path / "nothing")).splits()


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (GOOD + b"{broken\n", "line 2: not JSON"),
        (GOOD + GOOD + b'{"text": "caf\xe9"}\n', "line 3: not UTF-8"),
        (GOOD + b'{"url": "x"}\n', "line 2: no string field `text`"),
        (b'{"text": null}\n', "line 1: no string field `text`"),
        (b'{"text": 3}\n', "line 1: no string field `text`"),
        (b'["text"]\n', "line 1: no string field `text`"),
        (GOOD + b'{"text": "half a pair \\ud83d"}\n', "line 2: `text` is not valid Unicode"),
        (b"", "holds no documents"),
        (b"\n \n", "holds no documents"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path, lines: bytes, sentence: str) -> None:
    path = tmp_path / "part.json.gz"
    path.write_bytes(gzip.compress(lines))
    with pytest.raises(DataError, match=rf"part\.json\.gz.*{sentence}"):
        list(read_c4_file(path))


def test_a_damaged_archive_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "part.json.gz"
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919 % 10007) for i in range(5000)))
    for content, sentence in [
        (whole[: len(whole) // 2], r"line \d{4}: the gzip file is cut short"),
        (whole[:-4], r"line 5001: the gzip file is cut short"),
        (whole[:-8] + b"12345678", r"line 5001: the gzip file is cut short or damaged \(CRC"),
        (b"plain text", r"line 1: the gzip file is cut short or damaged \(Not a gzipped"),
        (whole[:100] + b"\xff" * 50 + whole[150:], r"line \d+: the gzip file is cut short or damaged"),
        (b"", "is empty"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"part\.json\.gz(,|) {sentence}"):
            list(read_c4_file(path))


def test_blank_lines_and_several_gzip_members_are_read(tmp_path: Path) -> None:
    path = tmp_path / "part.json.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n") + gzip.compress(b'{"text": "second", "more": 1}'))
    assert [text for text, _ in read_c4_file(path)] == ["good", "second"]


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> Path:
    """A folder that `datasets` recognises: a training and a validation file."""
    import json

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, part in [("train", texts[:20]), ("validation", texts[20:30])]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in part))
    return folder


def test_a_local_dataset_is_streamed_with_its_validation_split(local_dataset: Path, texts: list[str]) -> None:
    source = HuggingFaceDataset(str(local_dataset), validation_split="validation", max_documents=15)
    validation, train = source.splits()
    assert validation.name == "validation/mine"
    assert list(train.open().items) == [(text, i + 1) for i, text in enumerate(texts[:15])]
    assert train.open().total == 15
    assert [text for text, _ in validation.open().items] == texts[20:30]
    assert validation.open().total is None


def test_mistakes_with_a_dataset_are_one_sentence(local_dataset: Path) -> None:
    with pytest.raises(DataError, match=r"split test\) cannot be opened") as error:
        list(HuggingFaceDataset(str(local_dataset), split="test").splits()[0].open().items)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"no string field body: choose source.text_field from text, id"):
        list(HuggingFaceDataset(str(local_dataset), text_field="body").splits()[0].open().items)
    with pytest.raises(DataError, match=r"source\.max_documents=0"):
        HuggingFaceDataset(str(local_dataset), max_documents=0).splits()
