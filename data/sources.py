"""Where text comes from: files, Hugging Face `datasets`, the embedded corpus, token files of other tools.

In: the `source` group of scripts/prepare_data.py. Out: splits, each with settings that identify its text, and cut into
parts: the unit that one process prepares, and that is kept when a preparation is interrupted. `splits()` is cheap and
reads no text, so that settings are compared before any work. How a split is cut depends on the source alone, never on
the machine: so the result does not either.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from data.embedded import DOMAINS, build_corpus
from data.readers import COMPRESSIONS, FORMATS, PLAIN_TEXT, Broken, Item, Piece, cut_file, file_format, read_piece
from data.shards import DataError

TOKEN_SUFFIXES = (".npy", ".bin")
TRAIN = "train"
_TRAINING = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")  # words in the names of files
_HELD_OUT = re.compile(r"(?<![a-z])(validation|valid|val|dev|test)(?![a-z])")


class Part(Protocol):
    """A run of documents of a split. It is sent to the process that reads it, so it must pickle."""

    @property
    def size(self) -> int | None:
        """In the unit of the split; None when unknown."""

    def read(self) -> Iterator[Item]:
        """Documents in order, and what is broken between them, each with how far into the part it ends."""


@dataclass(frozen=True)
class TokenFile:
    """A part that is tokenized already: raw little-endian ids, taken as they are."""

    path: str
    size: int


@dataclass
class Split:
    """One token dataset to be: `train` or `validation/DOMAIN`, with several sources below the name of each."""

    name: str
    settings: dict[str, Any]  # JSON values that identify the text; where it lies is not among them
    parts: Callable[[], Sequence[Part] | Sequence[TokenFile]]
    unit: str = "B"  # of the sizes of parts: "B" bytes of the source, "doc" documents

    @property
    def is_training(self) -> bool:
        return self.name.split("/")[-1] == TRAIN


class Source(Protocol):
    """Anything that has splits. Validation comes first and `train` last, in the order they are prepared."""

    def splits(self) -> list[Split]: ...


@dataclass(frozen=True)
class FilePart:
    """Pieces of files that make one part."""

    pieces: tuple[Piece, ...]
    text_field: str
    plain_text: str

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def read(self) -> Iterator[Item]:
        before = 0
        for piece in self.pieces:
            for item, position in read_piece(piece, self.text_field, self.plain_text):
                yield item, before + position
            before += piece.size


def _matching(path: str, key: str, known: Callable[[Path], bool], suffixes: Iterable[str]) -> list[Path]:
    """Files of a folder that are `known` by their names, or all files that a path or a glob (with ** too) names."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _alike(sorted(entry for entry in folder.iterdir() if entry.is_file() and known(entry)), key)
    found = sorted(Path(name) for name in glob.glob(str(folder), recursive=True) if os.path.isfile(name))
    if not found:
        raise DataError(f"{key}={path} is no folder and no file, and no file matches it: give a folder, file or glob.")
    for entry in found:
        if not known(entry):
            raise DataError(f"{key}={path} names {entry}, whose suffix is unknown: use {', '.join(suffixes)}.")
    return found


def _alike(paths: list[Path], key: str) -> list[Path]:
    """`paths` of a folder, unless some may be held out, or notes or tables of contents beside the texts."""
    held_out = [path for path in paths if _HELD_OUT.search(path.name.lower())]
    if held_out and any(_TRAINING.search(path.name.lower()) for path in paths):
        raise DataError(
            f"{key}={paths[0].parent} holds {held_out[0].name} among files of training: name those of training with a "
            "glob, and a folder of the others as source.validation."
        )
    suffixes = sorted({"".join(path.suffixes[-2:]) if path.suffix in COMPRESSIONS else path.suffix for path in paths})
    if len(suffixes) > 1:
        raise DataError(
            f"{key}={paths[0].parent} holds files of several kinds ({', '.join(suffixes)}): name those that you mean "
            "with a glob."
        )
    return paths


def _split_files(
    path: str, validation: str | None, known: Callable[[Path], bool], suffixes: Iterable[str]
) -> list[tuple[str, list[Path], list[str]]]:
    """(split name, its files, their names below the source) of a source of files, `train` last.

    Validation domains are the files and subfolders of the folder `validation`, by default the one inside `path`.
    """
    train = _matching(path, "source.path", known, suffixes)
    if not train:
        raise DataError(f"source.path={path} holds no file of a known suffix: give a folder, file or glob of them.")
    found: dict[str, list[Path]] = {}
    folder = Path(validation if validation is not None else os.path.join(path, "validation")).expanduser()
    if validation is not None and not folder.is_dir():
        raise DataError(f"source.validation={validation} is not a folder: give one with a file or folder a domain.")
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.is_dir():
            files = [e for e in sorted(entry.rglob("*")) if e.is_file() and known(e)]
        else:
            files = [entry] if known(entry) else []
        name = f"validation/{entry.name if entry.is_dir() else entry.name.split('.')[0]}"
        if files and name in found:
            raise DataError(
                f"{folder} holds two domains named {name.split('/')[1]}: rename one, or put both in a folder."
            )
        if files:
            found[name] = files
    found[TRAIN] = train
    return [(name, files, _names(files)) for name, files in found.items()]


def _names(files: list[Path]) -> list[str]:
    """The files' names below the folder that they have in common: the same wherever that lies."""
    common = os.path.commonpath([file.parent for file in files])
    return [os.path.relpath(file, common) for file in files]


@dataclass
class Files:
    """JSON lines (C4's format), Parquet and plain text, plain or compressed; see `data.readers`."""

    path: str
    validation: str | None = None
    text_field: str = "text"
    plain_text: str = "file"
    part_megabytes: float = 64.0

    def splits(self) -> list[Split]:
        """Raises `DataError` when there is no training file or an option cannot be used."""
        if self.plain_text not in PLAIN_TEXT:
            raise DataError(f"source.plain_text={self.plain_text} is unknown: choose {', '.join(PLAIN_TEXT)}.")
        if self.part_megabytes <= 0:
            raise DataError(f"source.part_megabytes={self.part_megabytes} cannot be used: give a positive number.")
        return [
            self._split(*found)
            for found in _split_files(self.path, self.validation, _is_text, [*FORMATS, *COMPRESSIONS])
        ]

    def _split(self, name: str, paths: list[Path], names: list[str]) -> Split:
        sizes = [path.stat().st_size for path in paths]
        settings = {"kind": "files", "files": [[n, size] for n, size in zip(names, sizes, strict=True)]}
        settings |= {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        return Split(name, settings, lambda: self._parts(paths))

    def _parts(self, paths: list[Path]) -> list[FilePart]:
        """Pieces of all files, gathered to parts of about equal size, at most `part_megabytes` unless one piece is."""
        limit = max(1, int(self.part_megabytes * 1e6))
        pieces = [piece for path in paths for piece in cut_file(path, limit)]
        total = sum(piece.size for piece in pieces)
        target = total / max(1, -(-total // limit))
        gathered: list[list[Piece]] = [[]]
        before = 0
        for piece in pieces:
            if gathered[-1] and before + piece.size / 2 > len(gathered) * target:
                gathered.append([])
            gathered[-1].append(piece)
            before += piece.size
        return [FilePart(tuple(group), self.text_field, self.plain_text) for group in gathered]


def _is_text(path: Path) -> bool:
    try:
        file_format(path)
    except DataError:
        return False
    return True


@dataclass
class TokenFiles:
    """Files of raw token ids without a header, one EOS after each document, as OLMo's tools write them."""

    path: str
    validation: str | None = None

    def splits(self) -> list[Split]:
        """Raises `DataError` when there is no training file."""
        found = _split_files(self.path, self.validation, lambda path: path.suffix in TOKEN_SUFFIXES, TOKEN_SUFFIXES)
        return [self._split(*entry) for entry in found]

    @staticmethod
    def _split(name: str, paths: list[Path], names: list[str]) -> Split:
        parts = [TokenFile(str(path.absolute()), path.stat().st_size) for path in paths]
        files = [[n, part.size] for n, part in zip(names, parts, strict=True)]
        return Split(name, {"kind": "token_files", "files": files}, lambda: parts)


@dataclass(frozen=True)
class DatasetPart:
    """One of `count` runs of the files of a streamed dataset, or with a `limit` the first documents of all."""

    name: str
    config: str | None
    revision: str | None
    split: str
    text_field: str
    index: int
    count: int
    limit: int | None

    @property
    def size(self) -> int | None:
        return self.limit

    @property
    def where(self) -> str:
        return f"source.name={self.name} (config {self.config}, split {self.split})"

    def open(self) -> Any:
        """The `datasets.IterableDataset` of the whole split. Raises `DataError`."""
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # offline, unknown name, config or split, unreadable files: one exception each
            raise DataError(f"{self.where} cannot be opened: {_one_line(error)}") from error

    def read(self) -> Iterator[Item]:
        stream = self.open()
        place = self.where if self.count == 1 else f"{self.where}, shard {self.index + 1} of {self.count}"
        number = 0
        try:
            stream = stream if self.count == 1 else stream.shard(self.count, self.index)
            for row in stream if self.limit is None else stream.take(self.limit):
                number += 1
                text = row.get(self.text_field)
                if isinstance(text, str):
                    yield text, number
                else:
                    remedy = f"choose source.text_field from {', '.join(row)}."
                    message = f"{place}, document {number}: no string field {self.text_field}: {remedy}"
                    yield Broken("no text", message), number
        except Exception as error:  # from the network, a decoder or a parser, after any number of retries inside
            message = f"{place}, after document {number}: cannot be read: {_one_line(error)}"
            yield Broken("unreadable file", message), number


@dataclass
class HuggingFaceDataset:
    """Any text dataset the `datasets` library can stream, by hub name or local path."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = TRAIN
    validation_split: str | None = None
    text_field: str = "text"
    max_documents: int | None = None
    max_validation_documents: int | None = None

    def splits(self) -> list[Split]:
        """The training split, and the validation split as a domain named after the dataset."""
        for key in ("max_documents", "max_validation_documents"):
            limit = getattr(self, key)
            if limit is not None and limit < 1:
                raise DataError(f"source.{key}={limit} leaves no text: use null (all) or at least 1.")
        splits = []
        if self.validation_split is not None:
            domain = self.name.rstrip("/").rsplit("/", 1)[-1]
            splits.append(self._split(f"validation/{domain}", self.validation_split, self.max_validation_documents))
        return [*splits, self._split(TRAIN, self.split, self.max_documents)]

    def _split(self, name: str, split: str, limit: int | None) -> Split:
        settings: dict[str, Any] = {"kind": "datasets", "name": self.name, "config": self.config, "split": split}
        settings |= {"revision": self.revision, "text_field": self.text_field, "max_documents": limit}
        return Split(name, settings, lambda: self._parts(split, limit), unit="doc")

    def _parts(self, split: str, limit: int | None) -> list[DatasetPart]:
        """A part for each file of the dataset; with a limit one, since only a reader of all counts documents."""

        def part(index: int, count: int) -> DatasetPart:
            return DatasetPart(self.name, self.config, self.revision, split, self.text_field, index, count, limit)

        count = 1 if limit is not None else part(0, 1).open().num_shards
        return [part(index, count) for index in range(count)]


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
        return [self._split(name) for name in [*(f"validation/{domain}" for domain in sorted(DOMAINS)), TRAIN]]

    def _split(self, name: str) -> Split:
        return Split(name, {"kind": "embedded", "max_megabytes": self.max_megabytes}, lambda: self._parts(name))

    def _parts(self, name: str) -> Sequence[Part] | Sequence[TokenFile]:
        build_corpus(Path(self.path), self.max_megabytes)
        return next(split for split in self._files().splits() if split.name == name).parts()

    def _files(self) -> Files:
        return Files(f"{glob.escape(self.path)}/*.json.gz", validation=f"{self.path}/validation")
