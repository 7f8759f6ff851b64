"""Where text comes from: folders in C4's format, Hugging Face `datasets`, the embedded corpus.

In: the `source` group of scripts/prepare_data.py. Out: splits, each with settings that identify its text and a way to
open it. `splits()` is cheap and reads no text, so that settings are compared before any work.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.embedded import DOMAINS, build_corpus
from data.shards import DataError
from data.tokenize import Documents

C4_SUFFIX = ".json.gz"


@dataclass
class Split:
    """One token dataset to be: `train` or `validation/DOMAIN`."""

    name: str
    settings: dict[str, Any]  # JSON values that identify the text; where it lies is not among them
    open: Callable[[], Documents]


class Source(Protocol):
    """Anything that has splits. Validation comes first and `train` last, in the order they are prepared."""

    def splits(self) -> list[Split]: ...


@dataclass
class C4Files:
    """Gzip JSON lines with `text`: `path/*.json.gz` is to train, `path/validation/DOMAIN.json.gz` are the domains."""

    path: str

    def splits(self) -> list[Split]:
        """Raises `DataError` when the folder is missing or holds no training file."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise DataError(f"source.path={self.path} is not a folder: give one with *{C4_SUFFIX} files.")
        train = sorted(folder.glob(f"*{C4_SUFFIX}"))
        if not train:
            raise DataError(f"source.path={self.path} holds no *{C4_SUFFIX} file: give a folder in C4's format.")
        domains = sorted((folder / "validation").glob(f"*{C4_SUFFIX}"))
        splits = [self._split(f"validation/{path.name.removesuffix(C4_SUFFIX)}", [path]) for path in domains]
        return [*splits, self._split("train", train)]

    @staticmethod
    def _split(name: str, paths: list[Path]) -> Split:
        sizes = [path.stat().st_size for path in paths]
        settings = {"kind": "c4_files", "files": [[path.name, size] for path, size in zip(paths, sizes, strict=True)]}
        return Split(name, settings, lambda: Documents(_read_files(paths), sum(sizes), "B"))


def _read_files(paths: list[Path]) -> Iterator[tuple[str, int]]:
    before = 0
    for path in paths:
        for text, position in read_c4_file(path):
            yield text, before + position
        before += path.stat().st_size


def read_c4_file(path: Path) -> Iterator[tuple[str, int]]:
    """Texts of one gzip file of JSON lines, each with the compressed bytes read so far.

    Raises `DataError` naming file and line for a damaged or cut archive, a line that is no JSON object in UTF-8, a
    missing or non-string `text`, and a file without any document. Blank lines are passed over.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: remove it, or download it again.")
    number = 0
    found = False
    with open(path, "rb") as raw, gzip.GzipFile(fileobj=raw) as archive:
        while True:
            number += 1
            try:
                line = archive.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path}, line {number}: the gzip file is cut short or damaged ({error}).") from error
            if not line:
                break
            if line.isspace():
                continue
            yield _text_of(line, path, number), raw.tell()
            found = True
    if not found:
        raise DataError(f"{path} holds no documents: remove it, or download it again.")


def _text_of(line: bytes, path: Path, number: int) -> str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{path}, line {number}: no string field `text`, which C4's format has in every line.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, UTF-8 cannot
            raise DataError(f"{path}, line {number}: `text` is not valid Unicode ({error.reason}).") from error
    return text


@dataclass
class HuggingFaceDataset:
    """Any text dataset the `datasets` library can stream, by hub name or local path."""

    name: str
    config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    text_field: str = "text"
    max_documents: int | None = None
    max_validation_documents: int | None = None

    def splits(self) -> list[Split]:
        """The training split, and the validation split as a domain named after the dataset."""
        for field in ("max_documents", "max_validation_documents"):
            limit = getattr(self, field)
            if limit is not None and limit < 1:
                raise DataError(f"source.{field}={limit} leaves no text: use null (all) or at least 1.")
        splits = []
        if self.validation_split is not None:
            domain = self.name.rstrip("/").rsplit("/", 1)[-1]
            splits.append(self._split(f"validation/{domain}", self.validation_split, self.max_validation_documents))
        return [*splits, self._split("train", self.split, self.max_documents)]

    def _split(self, name: str, split: str, limit: int | None) -> Split:
        settings: dict[str, Any] = {"kind": "datasets", "name": self.name, "config": self.config, "split": split}
        settings |= {"text_field": self.text_field, "max_documents": limit}
        return Split(name, settings, lambda: Documents(self._read(split, limit), limit, "doc"))

    def _read(self, split: str, limit: int | None) -> Iterator[tuple[str, int]]:
        import datasets

        where = f"source.name={self.name} (config {self.config}, split {split})"
        try:
            stream = datasets.load_dataset(self.name, self.config, split=split, streaming=True)
            rows = iter(stream if limit is None else stream.take(limit))
        except Exception as error:  # offline, unknown name, config or split, unreadable files: one exception each
            raise DataError(f"{where} cannot be opened: {_one_line(error)}") from error
        number = 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # from the network, a decoder or a parser, after any number of retries inside
                raise DataError(f"{where}, document {number + 1}: cannot be read: {_one_line(error)}") from error
            if row is None:
                return
            number += 1
            text = row.get(self.text_field)
            if not isinstance(text, str):
                raise DataError(
                    f"{where}, document {number}: no string field {self.text_field}: choose source.text_field from "
                    f"{', '.join(row)}."
                )
            yield text, number


def _one_line(error: Exception) -> str:
    """What an exception of another library says, in one line of bearable length."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:297] + "..."


@dataclass
class Embedded:
    """The text inside Python and its packages (`data.embedded`), written to `path` in C4's format when first opened."""

    path: str
    max_megabytes: float = 14.0

    def splits(self) -> list[Split]:
        """Known before the corpus is written: its domains are fixed."""
        return [self._split(name) for name in [*(f"validation/{domain}" for domain in sorted(DOMAINS)), "train"]]

    def _split(self, name: str) -> Split:
        return Split(name, {"kind": "embedded", "max_megabytes": self.max_megabytes}, lambda: self._open(name))

    def _open(self, name: str) -> Documents:
        build_corpus(Path(self.path), self.max_megabytes)
        return next(split for split in C4Files(self.path).splits() if split.name == name).open()
