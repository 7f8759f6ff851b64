"""Token shards: the on-disk format between text and training, and the dataset that reads it.

A token dataset is a folder with

    00000.bin 00001.bin ...   raw little-endian token ids, uint16 when the vocabulary allows, else uint32; each document
                              is followed by one end-of-sequence (EOS) id; read in order, the files are one stream. A
                              prepared split has them in a folder for each part, 00000/00000.bin, see `data.prepare`
    manifest.json             what the files are and how they were made; written last and in one step, so a folder
                              without it is unfinished and is never read

and a *shards directory* (`data.path` of a run) holds `train/` and `validation/DOMAIN/`, each such a folder, with the
tokenizer as `tokenizer.json` beside them. `train/` is finished after all others, so its manifest ends the preparation.

In: such folders, which `data.shard_writer` writes. Out: `TokenStream` reads one, `TokenDataset` cuts it into instances.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.host_lock import host_lock, lock_path

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
VERIFIED_NAME = "verified.json"
WORTH_A_LINE = 2**30  # bytes whose verification takes so long that a user is told
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


def counted(number: int, thing: str) -> str:
    """`3 files`, `1 file`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def dtype_for(vocab_size: int) -> str:
    """The narrowest type name that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def partial_path(path: Path) -> Path:
    """Where `path` is made before it gets its name: beside it, apart from what other hosts or users make in a folder.

    Processes that may make the same file hold a `host_lock`; what one of them left is written over by the next.
    """
    return path.with_name(f"{path.name}.{os.uname().nodename}-{os.getuid()}.partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` in one step: a reader sees the old file, or none, or the whole new one, also after a power cut.

    Raises OSError with `path` as its file name, and leaves nothing behind, where it cannot be written.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def parse_manifest(content: bytes, path: str | Path) -> Manifest:
    """The manifest in `content`, which was read from `path`. Raises `DataError` when it is damaged or too new."""
    folder = str(path).removesuffix(f"/{MANIFEST_NAME}")
    try:
        raw = json.loads(content)
        version = raw.get("version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}: prepare the data again."
            )
    except (ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error}): remove {folder} and prepare it again.") from error
    if wrong := _wrong_value(raw):
        raise DataError(f"{path} is damaged ({wrong}): remove {folder} and prepare it again.")
    known = {f.name for f in fields(Manifest)}
    manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
    manifest.files = [ShardFile(*(file[f.name] for f in fields(ShardFile))) for file in raw["files"]]
    itemsize = DTYPES[manifest.dtype].itemsize
    if sum(file.tokens for file in manifest.files) != manifest.tokens:
        raise DataError(f"{path} is damaged (the files' tokens do not add up): remove {folder} and prepare it again.")
    for file in manifest.files:
        if file.bytes != file.tokens * itemsize:
            raise DataError(
                f"{path} is damaged ({file.name} cannot hold {file.tokens} tokens in {file.bytes} bytes): "
                f"remove {folder} and prepare it again."
            )
    return manifest


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_inside(name: object) -> bool:
    """Whether `name` is that of a file below the folder of its manifest, and not of one elsewhere."""
    return isinstance(name, str) and bool(name) and not name.startswith("/") and ".." not in name.split("/")


def _wrong_value(raw: dict[str, Any]) -> str | None:
    """The first value of a manifest that is not what its field holds, in words; None when all are."""
    counts = {"vocab_size": 1, "eos_id": 0, "documents": 0, "tokens": 0, "bytes": 0}
    for key, least in counts.items():
        if not _is_count(value := raw.get(key), least):
            return f"{key} is {json.dumps(value)}, not an integer of at least {least}"
    if raw.get("dtype") not in list(DTYPES):
        return f"dtype is {json.dumps(raw.get('dtype'))}, not {' or '.join(DTYPES)}"
    if raw["eos_id"] >= raw["vocab_size"]:
        return f"eos_id is {raw['eos_id']}, not below vocab_size {raw['vocab_size']}"
    tokenizer = raw.get("tokenizer")
    if not isinstance(tokenizer, dict) or not all(isinstance(tokenizer.get(key), str) for key in ("name", "sha256")):
        return f"tokenizer is {json.dumps(tokenizer)}, not the strings name and sha256"
    if not isinstance(settings := raw.get("preparation", {}), dict):
        return f"preparation is {json.dumps(settings)}, not settings by name"
    for key in ("filtered", "broken"):
        if not isinstance(value := raw.get(key, {}), dict) or not all(map(_is_count, value.values())):
            return f"{key} is {json.dumps(value)}, not counts by name"
    files = raw.get("files")
    if not isinstance(files, list):
        return f"files is {json.dumps(files)}, not a list"
    wanted: dict[str, tuple[Callable[[object], bool], str]] = {
        "name": (_is_inside, "the name of a file below the folder"),
        "tokens": (_is_count, "an integer of at least 0"),
        "bytes": (_is_count, "an integer of at least 0"),
        "sha256": (lambda value: isinstance(value, str), "a string"),
    }
    for number, file in enumerate(files):
        for key, (right, what) in wanted.items():
            value = file.get(key) if isinstance(file, dict) else None
            if not right(value):
                return f"{key} of files[{number}] is {json.dumps(value)}, not {what}"
    return None


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
    manifest = parse_manifest(path.read_bytes(), path)
    for file in manifest.files:
        size = (folder / file.name).stat().st_size if (folder / file.name).exists() else None
        if size != file.bytes:
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
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:  # hashing releases the interpreter
        digests = threads.map(sha256_of, [folder / file.name for file in manifest.files])
        for file, found in zip(manifest.files, digests, strict=True):
            if found != file.sha256:
                raise DataError(
                    f"{folder / file.name} is damaged (its SHA-256 is not the manifest's): "
                    f"remove {folder} and prepare it again."
                )
    return manifest


def verify_checksums_once(folder: str | Path, say: Callable[[str], None] = lambda line: None) -> Manifest:
    """`verify_checksums`, left out when it was done before and no file has changed since.

    `say` gets a line when it will take long. The sizes and times of the verified files are noted in the folder as
    `verified.json`, or in the user's cache where the folder cannot be written: of several processes of a host one
    verifies, the others wait for it and find the note.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    with host_lock(folder):
        state = {file.name: list(file_state(folder / file.name)) for file in manifest.files}
        noted = json.dumps({"fingerprint": manifest.fingerprint, "files": state}).encode()
        notes = [folder / VERIFIED_NAME]
        with suppress(RuntimeError):  # a user without a home
            notes.append(user_cache() / "verified" / lock_path(folder).with_suffix(".json").name)
        for note in notes:
            with suppress(OSError):
                if note.read_bytes() == noted:
                    return manifest
        if (size := sum(file.bytes for file in manifest.files)) >= WORTH_A_LINE:
            say(f"verifying the checksums of {folder}, {size / 1e9:,.0f} GB (data.verify=false leaves this out)")
        verify_checksums(folder)
        for note in notes:
            with suppress(OSError):  # where neither is ours to write nothing is lost but time
                note.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(note, noted)
                break
    return manifest


def user_cache() -> Path:
    """The folder for what can be made again: `~/.cache/moda`, or below $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moda"


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of change (ns) of a file: as long as both stay, its content is taken to be the same."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def sha256_of(path: Path) -> str:
    """Hex digest of a whole file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_shards_dir(shards_dir: Path) -> None:
    """Raise `DataError` when `shards_dir` is no shards directory but holds several, or lies inside of one."""
    if (shards_dir / "train").exists():
        return
    if inside := sorted(str(path.parent) for path in shards_dir.glob("*/train")):
        raise DataError(f"{shards_dir} holds the shards of several sources: name each, {', '.join(inside)}.")
    for outer in shards_dir.absolute().parents[:2]:
        if (outer / "train" / MANIFEST_NAME).exists():
            raise DataError(f"{shards_dir} is inside a shards directory: name that, {outer}.")


def check_tokenizer(shards_dir: Path) -> None:
    """Raise `DataError` when `tokenizer.json`, where there is one, is not that of the manifest of `train`."""
    path = shards_dir / TOKENIZER_NAME
    if path.exists() and sha256_of(path) != read_manifest(shards_dir / "train").tokenizer["sha256"]:
        raise DataError(
            f"{path} is not the tokenizer of {shards_dir / 'train'} (its SHA-256 is not the manifest's): put that one "
            "back, or give the command of the preparation again, which does."
        )


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


class TokenStream:
    """All files of a token dataset as one sequence of ids, memory-mapped: nothing is read before it is asked for.

    Raises `DataError` when the folder is unfinished or damaged. A file that disappears or changes while it is open is
    noticed before it is read: of a map of a file that was cut short, touching the lost part would end the process.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        dtype = DTYPES[self.manifest.dtype]
        self._paths = [self.folder / file.name for file in self.manifest.files]
        self._maps = [np.memmap(path, dtype=dtype, mode="r") for path in self._paths]
        self._states = [file_state(path) for path in self._paths]
        self._ends = np.cumsum([file.tokens for file in self.manifest.files])  # [files], position after each file

    def __len__(self) -> int:
        return self.manifest.tokens

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, one-dimensional, with the ids from position `start` on. Raises `DataError` for a lost file."""
        file = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(out):
            tokens = self._maps[file]
            begin = start + filled - (int(self._ends[file]) - len(tokens))
            self._check(file)
            piece = tokens[begin : begin + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            file += 1

    def chunks(self, size: int = 2**22) -> Iterator[np.ndarray]:
        """All ids in order, in pieces of at most `size` that never cross a file."""
        for file, tokens in enumerate(self._maps):
            for begin in range(0, len(tokens), size):
                self._check(file)
                yield tokens[begin : begin + size]

    def _check(self, file: int) -> None:
        try:
            state = file_state(self._paths[file])
        except OSError as error:
            raise DataError(
                f"{self._paths[file]} cannot be read any more ({error.strerror}): put it back, or prepare it again."
            ) from error
        if state != self._states[file]:
            raise DataError(
                f"{self._paths[file]} has changed since it was opened ({state[0]} bytes, {self._states[file][0]} "
                "before): put it back, or prepare it again."
            )


class Instances(Protocol):
    """Instances of a token dataset, however they are cut."""

    stream: TokenStream
    sequence_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Instance `index`: int64 `[sequence_length + 1]`, inputs `[:-1]`, targets `[1:]`; `IndexError` outside.

        A negative number ~x is the id x where it is no target (`data.documents`).
        """

    def target_counts(self, indices: np.ndarray) -> np.ndarray:
        """How many targets each of the instances `indices` has: int64, of the shape of `indices`."""


class TokenDataset:
    """Instances as windows of the stream.

    The concatenation of all files is cut every `sequence_length` ids; instance `i` is the window of
    `sequence_length + 1` ids that starts at `i * sequence_length`, so with inputs `[:-1]` and targets `[1:]` every id
    but the first is a target exactly once (a rest shorter than an instance is left out). Windows cross document ends.

    Raises `DataError` when the folder is unfinished or damaged, or when it holds no whole instance.
    """

    def __init__(self, folder: str | Path, sequence_length: int) -> None:
        check_sequence_length(sequence_length)
        self.sequence_length = sequence_length
        self.stream = TokenStream(folder)
        self.folder, self.manifest = self.stream.folder, self.stream.manifest
        self._size = (self.manifest.tokens - 1) // sequence_length
        if self._size < 1:
            raise DataError(
                f"data.sequence_length={sequence_length} is longer than the data: {self.folder} holds "
                f"{self.manifest.tokens} tokens, so use at most {self.manifest.tokens - 1}."
            )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> np.ndarray:
        """Ids of instance `index`: int64 `[sequence_length + 1]`. `IndexError` outside `0 .. len - 1`."""
        if not 0 <= index < self._size:
            raise IndexError(f"instance {index} of {self._size} in {self.folder}")
        out = np.empty(self.sequence_length + 1, dtype=np.int64)
        self.stream.read(int(index) * self.sequence_length, out)
        return out

    def target_counts(self, indices: np.ndarray) -> np.ndarray:
        """All positions are targets: `sequence_length` for each of `indices`."""
        return np.full(np.shape(indices), self.sequence_length, dtype=np.int64)


def check_sequence_length(sequence_length: int) -> None:
    """Raise `DataError` unless it is positive."""
    if sequence_length < 1:
        raise DataError(f"data.sequence_length={sequence_length} cannot be used: use a positive integer.")
