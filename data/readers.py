"""Documents inside files: JSON lines, Parquet and plain text, each as it is, with gzip or with Zstandard.

In: pieces of files. Out: texts in the order of the file and, between them, a `Broken` for whatever is no document: what
is wrong in which file and line. Whether to stop or to count it and go on is for the caller to decide. Memory holds one
line, or one plain-text document, whatever the size of the file; both have a limit.
"""

from __future__ import annotations

import io
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data.shards import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
PLAIN_TEXT = ("file", "paragraph", "line")
MAX_DOCUMENT = 64_000_000  # bytes of a document: one is held in memory, in many times its size while it is encoded
MAX_LINE = 256_000_000  # bytes of a line of a file, where escapes and other fields are longer than the text
BUFFER = 2**16  # bytes taken from an archive at once; before damage, the text of about as many is lost with it
PARQUET_ROWS = 256  # rows decoded at once


@dataclass(frozen=True)
class Broken:
    """Input that is no document."""

    kind: str  # what it is counted as
    message: str  # one sentence with file and line


Item = tuple[str | Broken, int]  # a text, or what stands in the place of one; how far into the piece it ends, in bytes


@dataclass(frozen=True)
class Piece:
    """A file or a run of it: the lines that begin in bytes [start, stop), or the row groups start .. stop - 1."""

    path: str
    size: int  # bytes of the file that it stands for
    start: int = 0
    stop: int | None = None  # None: the end

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop is None


def file_format(path: Path) -> tuple[str, str | None]:
    """Format (json, parquet, text) and compression (gzip, zstd, None), by the suffixes. `DataError` for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes = suffixes[:-1]
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    if kind is None or (kind == "parquet" and compression):
        raise DataError(
            f"{path} has an unknown suffix: use {', '.join(FORMATS)}, all but Parquet also with "
            f"{' or '.join(COMPRESSIONS)}."
        )
    return kind, compression


def cut_file(path: Path, piece_bytes: int) -> list[Piece]:
    """The file as pieces of about `piece_bytes`: plain JSON lines at lines, Parquet at row groups, others whole."""
    size = path.stat().st_size
    kind, compression = file_format(path)
    if kind == "json" and compression is None and size > piece_bytes:
        starts = range(0, size, piece_bytes)
        return [Piece(str(path), min(piece_bytes, size - start), start, start + piece_bytes) for start in starts]
    if kind == "parquet" and size > piece_bytes:
        try:
            metadata = pq.read_metadata(path)
            groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        except (pa.ArrowException, OSError):
            groups = []  # reading it will say what is wrong
        if len(groups) > 1:
            return _cut_groups(path, size, groups, piece_bytes)
    return [Piece(str(path), size)]


def _cut_groups(path: Path, size: int, groups: list[int], piece_bytes: int) -> list[Piece]:
    pieces: list[Piece] = []
    start, total, done = 0, sum(groups), 0
    weight = 0
    for i, group in enumerate(groups):
        weight += group
        if weight * size >= piece_bytes * total or i == len(groups) - 1:
            share = (done + weight) * size // total - done * size // total
            pieces.append(Piece(str(path), share, start, i + 1))
            start, done, weight = i + 1, done + weight, 0
    return pieces


def read_piece(piece: Piece, text_field: str, plain_text: str) -> Iterator[Item]:
    """The documents of a piece. JSON objects and Parquet rows hold theirs in `text_field`.

    A plain-text file is one document (`plain_text="file"`), or each run of lines between empty ones ("paragraph"), or
    each line that is not empty ("line"). Raises `DataError` for an unknown suffix.
    """
    path = Path(piece.path)
    kind, compression = file_format(path)
    found = False
    try:
        if path.stat().st_size == 0:
            yield Broken("empty file", f"{path} is empty: remove it, or get it again."), 0
            return
        if kind == "parquet":
            items = _parquet(piece, text_field)
        elif kind == "json":
            items = _json(piece, compression, text_field)
        else:
            items = _plain(piece, compression, plain_text)
        for item in items:
            found = True
            yield item
    except OSError as error:  # no permission, gone since the folder was listed, a disk or network error
        found = True
        yield Broken("unreadable file", f"{path} cannot be read ({error.strerror or error})."), piece.size
    if not found and piece.whole:
        yield Broken("empty file", f"{path} holds no documents: remove it, or get it again."), piece.size


def _lines(piece: Piece, compression: str | None) -> Iterator[tuple[bytes | Broken, int]]:
    """Lines that begin in the piece, with the bytes of the file (compressed ones if it is) that were read for them.

    A byte order mark at the start of the file, which some editors write, is no part of its text.
    """
    lines = _marked_lines(piece, compression)
    if piece.start == 0:
        for line, position in lines:
            line = line.removeprefix(BOM_UTF8) if isinstance(line, bytes) else line
            if line:
                yield line, position
            break
    yield from lines


def _marked_lines(piece: Piece, compression: str | None) -> Iterator[tuple[bytes | Broken, int]]:
    if compression is None:
        with open(piece.path, "rb", buffering=2**20) as file:
            position = piece.start
            if piece.start:  # the line that stands across the cut belongs to the piece before
                file.seek(piece.start - 1)
                position += _pass_line(file) - 1
            count = 0
            while (piece.stop is None or position < piece.stop) and (line := file.readline(MAX_LINE)):
                position += len(line)
                count += 1
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    position += _pass_line(file)
                    yield _too_long(piece, _line_number(piece, count)), position - piece.start
                else:
                    yield line, position - piece.start
        return
    with pa.OSFile(piece.path) as raw:
        number = 0
        try:
            with pa.CompressedInputStream(raw, compression) as stream:
                lines = io.BufferedReader(stream, BUFFER)
                while line := lines.readline(MAX_LINE):
                    number += 1
                    if len(line) == MAX_LINE and not line.endswith(b"\n"):
                        _pass_line(lines)
                        yield _too_long(piece, number), raw.tell()
                    else:
                        yield line, raw.tell()
        except (OSError, pa.ArrowException) as error:
            name = {"gzip": "gzip", "zstd": "Zstandard"}[compression]
            message = f"{piece.path}, after line {number}: the {name} file is cut short or damaged ({error})."
            yield Broken("damaged archive", message), piece.size


def _pass_line(file: BinaryIO | io.BufferedReader) -> int:
    """Read to the end of the line, and keep nothing of it. Returns its bytes."""
    size = 0
    while part := file.readline(BUFFER):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _too_long(piece: Piece, number: int) -> Broken:
    remedy = "write a document a line, and cut long ones."
    return Broken("too large", f"{piece.path}, line {number}: over {MAX_LINE // 10**6} MB long: {remedy}")


def _line_number(piece: Piece, count: int) -> int:
    """The number in the file of the `count`-th line of the piece; only asked for when something is wrong there."""
    if piece.start == 0:
        return count
    before, left = 0, piece.start - 1
    with open(piece.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            before += block.count(b"\n")
            left -= len(block)
    return before + 1 + count  # the line that contains byte start - 1 is the last that is not ours


def _json(piece: Piece, compression: str | None, field: str) -> Iterator[Item]:
    for count, (line, position) in enumerate(_lines(piece, compression), start=1):
        if isinstance(line, Broken):
            yield line, position
        elif not line.isspace():
            item = _text_of(line, field)
            if isinstance(item, Broken):
                item = Broken(item.kind, f"{piece.path}, line {_line_number(piece, count)}: {item.message}")
            yield item, position


def _text_of(line: bytes, field: str) -> str | Broken:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Broken("not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start}).")
    except (ValueError, RecursionError) as error:
        return Broken("not JSON", f"not JSON ({error}).")
    if not isinstance(row, dict):
        return Broken("no text", f"no JSON object: each line is to be one, with its text in the field `{field}`.")
    return _checked(row.get(field), field)


def _checked(text: object, field: str) -> str | Broken:
    if not isinstance(text, str):
        return Broken("no text", f"no string field `{field}`: choose another with source.text_field.")
    size = len(text)
    if not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, UTF-8 cannot
            return Broken("not UTF-8", f"`{field}` is not valid Unicode ({error.reason}).")
    if size > MAX_DOCUMENT:
        return Broken("too large", f"a document of over {MAX_DOCUMENT // 10**6} MB: cut it.")
    return text


def _plain(piece: Piece, compression: str | None, plain_text: str) -> Iterator[Item]:
    """Documents of a plain-text file; carriage returns before line ends are left out."""
    lines: list[bytes] = []
    size = first = number = 0

    def document() -> str | Broken:
        content = b"".join(lines).replace(b"\r\n", b"\n")
        try:
            return (content if plain_text == "file" else content.strip(b"\n")).decode()
        except UnicodeDecodeError as error:
            line = first + content[: error.start].count(b"\n")
            return Broken("not UTF-8", f"{piece.path}, line {line}: not UTF-8 ({error.reason}).")

    position = 0
    for number, (line, position) in enumerate(_lines(piece, compression), start=1):
        if isinstance(line, Broken):  # a document that is cut short is none
            lines = []
            yield line, position
            break
        blank = line.isspace()
        if lines and (plain_text == "line" or (plain_text == "paragraph" and blank)):
            yield document(), position
            lines, size = [], 0
        if blank and plain_text != "file":
            continue
        if not lines:
            first = number
        lines.append(line)
        size += len(line)
        if size > MAX_DOCUMENT:
            remedy = "use source.plain_text=paragraph or line" if plain_text == "file" else "cut it"
            message = f"{piece.path}, line {first}: a document of over {MAX_DOCUMENT // 10**6} MB: {remedy}."
            yield Broken("too large", message), piece.size
            return
    if lines and not b"".join(lines).isspace():
        yield document(), position


def _parquet(piece: Piece, field: str) -> Iterator[Item]:
    row = 0
    try:
        with pq.ParquetFile(piece.path, pre_buffer=False, buffer_size=2**20) as file:
            names = file.schema_arrow.names
            if field not in names:
                message = f"{piece.path} has no column `{field}`: choose source.text_field from {', '.join(names)}."
                yield Broken("no text", message), piece.size
                return
            metadata = file.metadata
            groups = range(piece.start, metadata.num_row_groups if piece.stop is None else piece.stop)
            first = row = sum(metadata.row_group(i).num_rows for i in range(piece.start))
            total = max(1, sum(metadata.row_group(i).num_rows for i in groups))
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(groups), columns=[field]):
                for value in batch.column(0):
                    row += 1
                    try:
                        item = _checked(value.as_py(), field)
                    except UnicodeDecodeError as error:
                        item = Broken("not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start}).")
                    if isinstance(item, Broken):
                        item = Broken(item.kind, f"{piece.path}, row {row}: {item.message}")
                    yield item, (row - first) * piece.size // total
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        message = f"{piece.path}, after row {row}: the Parquet file is cut short or damaged ({reason})."
        yield Broken("damaged archive", message), piece.size
