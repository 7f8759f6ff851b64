"""Every format gives the texts as they are, whole or in pieces; what is broken is named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.readers import Broken, Piece, cut_file, read_piece
from data.shards import DataError

GOOD = b'{"text": "good"}\n'


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def read(path: Path, plain_text: str = "file", field: str = "text") -> list[str | Broken]:
    return [item for item, _ in read_piece(Piece(str(path), path.stat().st_size), field, plain_text)]


def only_broken(path: Path) -> Broken:
    (found,) = [item for item in read(path) if isinstance(item, Broken)]
    return found


def write_parquet(path: Path, texts: list, rows: int = 100) -> Path:
    pq.write_table(pa.table({"url": range(len(texts)), "text": texts}), path, row_group_size=rows)
    return path


@pytest.mark.parametrize(
    "name", ["a.json.gz", "a.jsonl", "a.ndjson", "a.json.zst", "a.jsonl.gz", "a.parquet", "a.txt.gz"]
)
def test_every_format_gives_the_same_texts(tmp_path: Path, texts: list[str], name: str) -> None:
    path = tmp_path / name
    lines = "".join(json.dumps({"text": text, "url": ""}) + "\n" for text in texts).encode()
    if name.endswith(".parquet"):
        write_parquet(path, texts, rows=7)
    elif ".txt" in name:
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else zstd(lines) if "zst" in name else lines)
    items = list(read_piece(Piece(str(path), path.stat().st_size), "text", "line"))
    assert [text for text, _ in items] == texts
    positions = [position for _, position in items]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000, 10**6])
def test_the_pieces_of_a_file_are_the_file(tmp_path: Path, texts: list[str], piece_bytes: int) -> None:
    plain = tmp_path / "a.jsonl"
    plain.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    for path in (plain, write_parquet(tmp_path / "a.parquet", texts, rows=4)):
        pieces = cut_file(path, piece_bytes)
        assert sum(piece.size for piece in pieces) == path.stat().st_size
        assert [item for piece in pieces for item, _ in read_piece(piece, "text", "file")] == texts
        assert len(pieces) > 1 or piece_bytes > 1000


def test_plain_text_is_a_document_a_file_a_paragraph_or_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n one\r\ntwo\n\n \nthree ✓\n".encode())
    assert read(path, "file") == ["\n one\ntwo\n\n \nthree ✓\n"]
    assert read(path, "paragraph") == [" one\ntwo", "three ✓"]
    assert read(path, "line") == [" one", "two", "three ✓"]


@pytest.mark.parametrize(
    ("lines", "kind", "sentence"),
    [
        (GOOD + b"{broken\n" + GOOD, "not JSON", "line 2: not JSON"),
        (GOOD + b"[" * 100_000 + b"\n", "not JSON", "line 2: not JSON"),
        (
            GOOD + GOOD + b'{"text": "caf\xe9"}\n',
            "not UTF-8",
            "line 3: not UTF-8 (invalid continuation byte at byte 13)",
        ),
        (GOOD + b'{"url": "x"}\n', "no text", "line 2: no string field `text`"),
        (b'{"text": null}\n', "no text", "line 1: no string field `text`"),
        (b'{"text": 3}\n' + GOOD, "no text", "line 1: no string field `text`"),
        (b'["text"]\n', "no text", "line 1: no JSON object: each line is to be one"),
        (GOOD + b'{"text": "half a pair \\ud83d"}\n', "not UTF-8", "line 2: `text` is not valid Unicode"),
        (b"\n \n", "empty file", "holds no documents"),
    ],
)
@pytest.mark.parametrize("compression", ["json.gz", "jsonl", "json.zst"])
def test_a_broken_line_is_named_and_the_others_are_read(
    tmp_path: Path, lines: bytes, kind: str, sentence: str, compression: str
) -> None:
    path = tmp_path / f"part.{compression}"
    path.write_bytes({"json.gz": gzip.compress, "jsonl": bytes, "json.zst": zstd}[compression](lines))
    broken = only_broken(path)
    assert broken.kind == kind
    assert str(path) in broken.message
    assert sentence in broken.message
    assert "\n" not in broken.message
    assert [item for item in read(path) if item == "good"] == ["good"] * lines.count(GOOD)


def test_the_line_is_numbered_from_the_start_of_the_file_in_every_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 50 + b"broken\n" + GOOD * 50)
    for piece_bytes in (10, 17, 34, 100, 851):
        broken = [
            item
            for piece in cut_file(path, piece_bytes)
            for item, _ in read_piece(piece, "text", "file")
            if isinstance(item, Broken)
        ]
        assert [item.message.split(": ")[0] for item in broken] == [f"{path}, line 51"]


@pytest.mark.parametrize("suffix", ["json.gz", "json.zst"])
def test_a_damaged_archive_is_named_with_the_last_good_line(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(0)
    lines = [b'{"text": "%x"}\n' % generator.getrandbits(400) for i in range(20_000)]
    whole = gzip.compress(b"".join(lines)) if suffix.endswith("gz") else zstd(b"".join(lines))
    damages = [(whole[: len(whole) // 2], 5_000), (whole[:-4], 15_000), (b"plain text", 0)]
    if suffix.endswith("gz"):
        damages.append((whole[:-8] + b"12345678", 15_000))
    path = tmp_path / f"part.{suffix}"
    for content, least in damages:
        path.write_bytes(content)
        *good, broken = read(path)
        assert isinstance(broken, Broken)
        assert broken.kind == "damaged archive"
        assert (
            f"{path}, after line {len(good)}: the {'gzip' if 'gz' in suffix else 'Zstandard'} file is cut"
            in broken.message
        )
        assert len(good) >= least
        assert good == [json.loads(line)["text"] for line in lines[: len(good)]]


def test_a_damaged_parquet_file_is_named(tmp_path: Path, texts: list[str]) -> None:
    path = write_parquet(tmp_path / "a.parquet", texts)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert only_broken(path).message.startswith(f"{path}, after row 0: the Parquet file is cut short or damaged")
    assert len(cut_file(path, 10)) == 1
    write_parquet(path, ["a", None, "b"])
    assert read(path)[0::2] == ["a", "b"]
    assert only_broken(path).message.startswith(f"{path}, row 2: no string field `text`")
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9"))
    write_parquet(path, bad)
    assert only_broken(path).kind == "not UTF-8"
    (found,) = read(path, field="body")
    assert isinstance(found, Broken)
    assert found.message == f"{path} has no column `body`: choose source.text_field from url, text."


def test_plain_text_that_is_not_text_is_named_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\ncaf\xe9\n\nthree\n")
    assert only_broken(path).message == f"{path}, line 4: not UTF-8 (invalid continuation byte)."
    assert [item for item in read(path, "paragraph") if isinstance(item, str)] == ["one", "three"]
    monkeypatch.setattr("data.readers.MAX_DOCUMENT", 10)
    assert "line 1: a document of over 0 MB: use source.plain_text=paragraph" in only_broken(path).message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": text}) if "json" in name else text for text in ("one", "\ufefftwo")]
    content = "".join(f"{line}\r\n" for line in lines).encode("utf-8-sig")
    path = tmp_path / name
    for mark, texts in ((content, ["one", "\ufefftwo"]), (b"\xef\xbb\xbf", [])):
        path.write_bytes(gzip.compress(mark) if name.endswith(".gz") else mark)
        found = [item for item, _ in read_piece(Piece(str(path), path.stat().st_size), "text", "line")]
        assert [text.strip("\r\n") for text in found if isinstance(text, str)] == texts
        assert [item.kind for item in found if isinstance(item, Broken)] == ([] if texts else ["empty file"])
    path.write_bytes(content)
    if name == "a.jsonl":
        pieces = cut_file(path, 3)
        assert len(pieces) > 5
        assert [item for piece in pieces for item, _ in read_piece(piece, "text", "line")] == ["one", "\ufefftwo"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_document_that_would_not_fit_in_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("data.readers.MAX_DOCUMENT", 3_000_000)
    texts = ["one", "é" * 1_500_001, "x" * 3_000_000, "two"]
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, texts)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    where = "row 2" if name == "a.parquet" else "line 2"
    broken = Broken("too large", f"{path}, {where}: a document of over 3 MB: cut it.")
    assert read(path) == [texts[0], broken, *texts[2:]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("ends", [b"\n", b""])
def test_a_line_without_end_is_passed_over_in_little_memory_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ends: bytes
) -> None:
    monkeypatch.setattr("data.readers.MAX_LINE", 2_000_000)
    path = tmp_path / name
    content = GOOD + b"[" + b"x" * 30_000_000 + (b"\n" + GOOD if ends else b"")
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = f"{path}, line 2: over 2 MB long: write a document a line, and cut long ones."
    assert found == ["good", Broken("too large", message), *(["good"] if ends else [])]
    assert peak < 12_000_000
    if name == "a.jsonl":  # a cut inside of it
        pieces = cut_file(path, 5_000_000)
        assert [item for piece in pieces for item, _ in read_piece(piece, "text", "file")] == found


def test_empty_and_unreadable_files_are_named(tmp_path: Path) -> None:
    for name in ("a.json.gz", "a.jsonl", "a.parquet", "a.txt", "a.json.zst"):
        (tmp_path / name).touch()
        assert only_broken(tmp_path / name) == Broken(
            "empty file", f"{tmp_path / name} is empty: remove it, or get it again."
        )
    gone = Piece(str(tmp_path / "gone.jsonl"), 10)
    ((item, _),) = read_piece(gone, "text", "file")
    assert item == Broken("unreadable file", f"{tmp_path / 'gone.jsonl'} cannot be read (No such file or directory).")


def test_several_gzip_members_and_zstandard_frames_are_read(tmp_path: Path) -> None:
    for suffix, compress in [("json.gz", gzip.compress), ("json.zst", zstd)]:
        path = tmp_path / f"part.{suffix}"
        path.write_bytes(compress(GOOD + b"\n") + compress(b'{"text": "second", "more": 1}'))
        assert read(path) == ["good", "second"]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet.gz", "noname", "a.gz"])
def test_an_unknown_suffix_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(os.urandom(10))
    with pytest.raises(DataError, match=rf"{name} has an unknown suffix: use \.json,"):
        read(tmp_path / name)


def test_texts_do_not_depend_on_how_the_writer_escapes(tmp_path: Path, write_c4: Callable) -> None:
    path = write_c4(tmp_path / "a.json.gz", ['tab\t quote " newline\n null\x00 emoji 🦋'])
    assert read(path) == ['tab\t quote " newline\n null\x00 emoji 🦋']
