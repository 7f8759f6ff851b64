"""Where text comes from: files, the embedded corpus, token files of other tools; `data.hub_datasets` has one more.

In: the `source` group of scripts/prepare_data.py. Out: splits, each with settings that identify its text, and cut into
parts: the unit that one process prepares, and that is kept when a preparation is interrupted. `splits()` is cheap and
reads no text but the ends of files, so that settings are compared before any work. How a split is cut depends on the
source alone, never on the machine: so the result does not either.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from data.embedded import DOMAINS, build_corpus
from data.readers import COMPRESSIONS, FORMATS, PLAIN_TEXT, Item, Piece, cut_file, file_format, read_piece
from data.remote import is_remote
from data.shards import DataError

TOKEN_SUFFIXES = (".npy", ".bin")
TRAIN = "train"
END_BYTES = 2**16  # of the head and of the tail of a file, which tell it from another of its name and size
_MADE = (  # files of an output, as `data.prepare` and those who read it make them
    "tokenizer.json",
    "train/manifest.json",
    "train/verified.json",
    "train/00000/manifest.json",
    "train/00000/skipped.txt",
    "train/00000/00000.bin",
    "train/duplicates/0123456789abcdef.npy",
    "train/packing-4096/packing.json",
    "validation/domain/manifest.json",
    "validation/domain/00000/manifest.json",
)
_TRAINING = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")  # words in the names of files
_HELD_OUT = re.compile(r"(?<![a-z])(validation|valid|val|dev|test)(?![a-z])")


class Part(Protocol):
    """A run of documents of a split. It is sent to the process that reads it, so it must pickle."""

    @property
    def size(self) -> int | None:
        """In the unit of the split; None when unknown."""

    @property
    def identity(self) -> list[Any]:
        """JSON values that tell its text, read with the settings of its split, from any other."""

    def read(self) -> Iterator[Item]:
        """Documents in order, and what is broken between them, each with how far into the part it ends.

        Raises `DataError` when the text is no longer that of `identity`.
        """


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when the command began.

    Size and name do not tell a file that was got again, after a copy that was cut short or filled with zeros in
    advance, from the one before, and times change with every copy. The ends do: the last bytes of an archive are the
    checksum of all of it, those of Parquet describe it.
    """

    path: str
    name: str  # below the folder that all files of the split have in common: the same wherever that lies
    size: int
    ends: str  # digest of the first and last `END_BYTES`; of a file that cannot be read ""

    @classmethod
    def found(cls, path: Path, name: str) -> SourceFile:
        """The file at `path` as it is now."""
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(END_BYTES))
                file.seek(max(END_BYTES, size - END_BYTES))
                digest.update(file.read(END_BYTES))
        except OSError:  # reading it will say so
            return cls(str(path), name, size, "")
        return cls(str(path), name, size, digest.hexdigest()[:16])

    @property
    def identity(self) -> list[Any]:
        """Name, size and ends, as JSON values."""
        return [self.name, self.size, self.ends]

    def check(self) -> None:
        """Raise `DataError` unless the file is still the same."""
        try:
            same = SourceFile.found(Path(self.path), self.name).identity == self.identity
        except OSError:
            same = False
        if not same:
            raise DataError(f"{self.path} has changed since the command began: give the same command again.")


@dataclass(frozen=True)
class TokenFile(SourceFile):
    """A part that is tokenized already: raw little-endian ids, taken as they are."""


@dataclass
class Split:
    """One token dataset to be: `train` or `validation/DOMAIN`, with several sources below the name of each."""

    name: str
    # JSON values that identify the text; where it lies is not among them. `files`, where there are any, are compared
    # part by part: of an unfinished split, parts are kept whose own files are the same.
    settings: dict[str, Any]
    parts: Callable[[], Sequence[Part] | Sequence[TokenFile]]
    unit: str = "B"  # of the sizes of parts: "B" bytes of the source, "doc" documents

    @property
    def is_training(self) -> bool:
        return self.name.split("/")[-1] == TRAIN


class Source(Protocol):
    """Anything that has splits. Validation comes first and `train` last, in the order they are prepared."""

    def splits(self) -> list[Split]: ...

    def check_output(self, output: Path) -> None:
        """Raise `DataError` when preparing into `output` would mix what is made with the text that it is made of."""


@dataclass(frozen=True)
class FilePart:
    """Pieces of files that make one part."""

    pieces: tuple[tuple[Piece, SourceFile], ...]  # each with the file that it is of
    text_field: str
    plain_text: str

    @property
    def size(self) -> int:
        return sum(piece.size for piece, _ in self.pieces)

    @property
    def identity(self) -> list[Any]:
        return [[*file.identity, piece.start, piece.stop] for piece, file in self.pieces]

    def read(self) -> Iterator[Item]:
        before = 0
        for piece, file in self.pieces:
            for item, position in read_piece(piece, self.text_field, self.plain_text):
                yield item, before + position
            file.check()
            before += piece.size


def _matching(path: str, key: str, known: Callable[[Path], bool], suffixes: Iterable[str]) -> list[Path]:
    """Files of a folder that are `known` by their names, or all files that a path or a glob (with ** too) names."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        found = sorted(entry for entry in folder.iterdir() if known(entry) and _is_file(entry))
        others = set(folder.iterdir()).difference(found)
        left = sorted(entry.name + "/" * entry.is_dir() for entry in others if not entry.name.startswith("."))
        left = [name for name in left if name != "validation/"]
        holds = f" ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})" if left else ""
        if not found:
            raise DataError(
                f"{key}={path} holds no file of a known suffix{holds}: give a folder, file or glob of "
                f"{', '.join(suffixes)}, with ** for those in subfolders."
            )
        if left:
            print(f"{key}={path}: {len(left)} of other suffixes and subfolders are left out{holds}", flush=True)
        return _alike(found, key)
    found = sorted(path for path in map(Path, glob.glob(str(folder), recursive=True)) if _is_file(path))
    if not found:
        raise DataError(f"{key}={path} is no folder and no file, and no file matches it: give a folder, file or glob.")
    for entry in found:
        if not known(entry):
            raise DataError(f"{key}={path} names {entry}, whose suffix is unknown: use {', '.join(suffixes)}.")
    return found


def _is_file(path: Path) -> bool:
    """Whether `path` is a file. Raises `DataError` for a link to nothing, which is text that would be missing."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to what does not exist: bring that back, or remove the link.")
    return path.is_file()


def _alike(paths: list[Path], key: str) -> list[Path]:
    """`paths` of a folder, unless some may be held out, or notes or tables of contents beside the texts."""
    held_out = [path for path in paths if _HELD_OUT.search(path.name.lower())]
    if held_out and any(_TRAINING.search(path.name.lower()) for path in paths):
        raise DataError(
            f"{key}={paths[0].parent} holds {held_out[0].name} among files of training: name those of training with a "
            "glob, and a folder of the others as source.validation."
        )
    names = [Path(path.name.lower()) for path in paths]
    suffixes = sorted({"".join(name.suffixes[-2:]) if name.suffix in COMPRESSIONS else name.suffix for name in names})
    if len(suffixes) > 1:
        raise DataError(
            f"{key}={paths[0].parent} holds files of several kinds ({', '.join(suffixes)}): name those that you mean "
            "with a glob."
        )
    return paths


def _split_files(
    path: str, validation: str | None, known: Callable[[Path], bool], suffixes: Iterable[str]
) -> list[tuple[str, list[SourceFile]]]:
    """(split name, its files) of a source of files, `train` last.

    Validation domains are the files and subfolders of the folder `validation`, by default the one inside `path`.
    """
    train = _matching(path, "source.path", known, suffixes)
    found: dict[str, list[Path]] = {}
    folder = Path(validation if validation is not None else os.path.join(path, "validation")).expanduser()
    if validation is not None and not folder.is_dir():
        raise DataError(f"source.validation={validation} is not a folder: give one with a file or folder a domain.")
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.is_dir():
            files = [e for e in sorted(entry.rglob("*")) if known(e) and _is_file(e)]
        else:
            files = [entry] if known(entry) and _is_file(entry) else []
        name = f"validation/{entry.name if entry.is_dir() else entry.name.split('.')[0]}"
        if files and name in found:
            raise DataError(
                f"{folder} holds two domains named {name.split('/')[1]}: rename one, or put both in a folder."
            )
        if files and name == "validation/mean":
            raise DataError(f"{entry} cannot be a domain: validation/mean is the mean of all; rename it.")
        if files:
            found[name] = files
    _check_held_out(path, train, {os.path.realpath(file) for files in found.values() for file in files})
    found[TRAIN] = train
    return [(name, found_files(files)) for name, files in found.items()]


def _check_held_out(path: str, train: list[Path], validation: set[str]) -> None:
    """Raise `DataError` when a file of `train` is one of `validation`, or in what would be the folder of it."""
    folder = _literal_folder(Path(path).expanduser()) / "validation"
    for file in train:
        if os.path.realpath(file) in validation or (glob.has_magic(path) and file.is_relative_to(folder)):
            raise DataError(
                f"source.path={path} names {file}, which is validation text: name the files of training alone, and a "
                "folder of the others as source.validation."
            )


def _literal_folder(path: Path) -> Path:
    """The folder that a folder, file or glob is in, or is: as far down as its name has no wildcards."""
    if not path.is_dir():
        path = path.parent
    while glob.has_magic(str(path)) and not path.is_dir():
        path = path.parent
    return path


def check_apart(path: str, key: str, output: Path) -> None:
    """Raise `DataError` when the files of `key`=`path` lie in `output`, to be taken for shards or removed.

    Each takes `path` as a source does: a folder, a file or a glob.
    """
    folder = _literal_folder(Path(path).expanduser())
    if folder.resolve().is_relative_to(output.resolve()):
        raise DataError(
            f"output={output} holds the files of {key}={path}: choose another output, as {output / 'shards'}."
        )


def _first_made(path: str, output: Path) -> str | None:
    """What of a preparation in `output`, finished or not, the glob `path` would name when it is read again."""
    pattern = Path(path).expanduser()
    if not glob.has_magic(path) or pattern.is_dir():
        return None
    folder = _literal_folder(pattern)
    inside = os.path.relpath(output.resolve(), folder.resolve())
    if inside.split(os.sep)[0] == os.pardir:
        return None
    wanted = pattern.relative_to(folder).parts
    made = (source + name for source in ("", "source/") for name in _MADE)  # of several sources each has a folder
    return next((name for name in made if _names(wanted, (*Path(inside).parts, *Path(name).parts))), None)


def _names(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a recursive glob names a path, both as their parts; as `glob`, it passes over names with a dot first."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _names(pattern[1:], parts) or (not hidden and _names(pattern, parts[1:]))
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and _names(pattern[1:], parts[1:])


def _check_files_apart(path: str, validation: str | None, output: Path) -> None:
    """`check_apart` of a source of files; nor may `output` lie in its validation text, whose subfolders are read."""
    for key, given in (("source.path", path), ("source.validation", validation)):
        if given == "":
            raise DataError(f"{key} is empty: give a folder, file or glob.")
        if given is not None and is_remote(given):
            raise DataError(
                f"{key}={given} is an address: copy its files to a folder here and name that (a dataset of the hub is "
                "source=datasets)."
            )
    check_apart(path, "source.path", output)
    made = _first_made(path, output)
    if made is not None:
        raise DataError(
            f"output={output} will hold {made}, which source.path={path} then takes for text: choose another output, "
            "or a glob that leaves it out."
        )
    if validation is not None:
        check_apart(validation, "source.validation", output)
    held_out = Path(validation if validation is not None else os.path.join(path, "validation")).expanduser()
    if output.resolve().is_relative_to(held_out.resolve()):
        raise DataError(
            f"output={output} lies in {held_out}, the validation text of source.path={path}: choose another output."
        )


def found_files(paths: list[Path]) -> list[SourceFile]:
    """The files of a split as they are now."""
    common = os.path.commonpath([path.absolute().parent for path in paths])
    with ThreadPoolExecutor(16) as threads:  # a network file system takes its time for each
        return list(threads.map(lambda path: SourceFile.found(path, os.path.relpath(path, common)), paths))


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
        if not 0 < self.part_megabytes < math.inf:
            raise DataError(f"source.part_megabytes={self.part_megabytes} cannot be used: give a positive number.")
        return [
            self._split(*found)
            for found in _split_files(self.path, self.validation, _is_text, [*FORMATS, *COMPRESSIONS])
        ]

    def check_output(self, output: Path) -> None:
        _check_files_apart(self.path, self.validation, output)

    def _split(self, name: str, files: list[SourceFile]) -> Split:
        settings = {"kind": "files", "files": [file.identity for file in files]}
        settings |= {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        return Split(name, settings, lambda: self._parts(files))

    def _parts(self, files: list[SourceFile]) -> list[FilePart]:
        """Pieces of all files, gathered to parts of about equal size, at most `part_megabytes` unless one piece is."""
        limit = max(1, int(self.part_megabytes * 1e6))
        pieces = [(piece, file) for file in files for piece in cut_file(Path(file.path), limit)]
        total = sum(piece.size for piece, _ in pieces)
        target = total / max(1, -(-total // limit))
        gathered: list[list[tuple[Piece, SourceFile]]] = [[]]
        before = 0
        for piece, file in pieces:
            if gathered[-1] and before + piece.size / 2 > len(gathered) * target:
                gathered.append([])
            gathered[-1].append((piece, file))
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

    def check_output(self, output: Path) -> None:
        _check_files_apart(self.path, self.validation, output)

    @staticmethod
    def _split(name: str, files: list[SourceFile]) -> Split:
        parts = [TokenFile(os.path.abspath(file.path), file.name, file.size, file.ends) for file in files]
        return Split(name, {"kind": "token_files", "files": [file.identity for file in files]}, lambda: parts)


@dataclass
class Embedded:
    """The text inside Python and its packages (`data.embedded`), written to `path` in C4's format when first opened."""

    path: str
    max_megabytes: float = 14.0

    def splits(self) -> list[Split]:
        """Known before the corpus is written: its domains are fixed."""
        return [self._split(name) for name in [*(f"validation/{domain}" for domain in sorted(DOMAINS)), TRAIN]]

    def check_output(self, output: Path) -> None:
        """The text may lie in `output`: this source writes it there itself, apart from the splits."""

    def _split(self, name: str) -> Split:
        return Split(name, {"kind": "embedded", "max_megabytes": self.max_megabytes}, lambda: self._parts(name))

    def _parts(self, name: str) -> Sequence[Part] | Sequence[TokenFile]:
        build_corpus(Path(self.path), self.max_megabytes)
        return next(split for split in self._files().splits() if split.name == name).parts()

    def _files(self) -> Files:
        return Files(f"{glob.escape(self.path)}/*.json.gz", validation=f"{self.path}/validation")
