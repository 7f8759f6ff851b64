"""The files of a checkpoint: written with their SHA-256, read without executing anything that is in them.

In: tensors, through torch.distributed.checkpoint (dcp). Out: its files, and their checksums. dcp describes a checkpoint
in a pickle, `.metadata`, which can run any code when it is read; here its reader knows the few classes that dcp writes
and no others. Tensors are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from training.watchdog import UNWATCHED, Watch

METADATA = ".metadata"
BLOCK = 2**22  # bytes of a file that are read at a time
WRITER_THREADS = 4  # files a rank writes side by side, and a reader checks side by side

# What dcp's own metadata is made of, beside the dtypes of torch.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class UnsafeCheckpointError(ValueError):
    """A checkpoint that holds something other than tensors and their description."""


class ChecksummedWriter(FileSystemWriter):
    """dcp's writer to a folder. `checksums` has, by name, the SHA-256 of what this rank handed to the system."""

    def __init__(self, path: Path, busy: Callable[[], None], on_written: Callable[[], None]) -> None:
        """`busy` is called now and then, from threads, while there is progress; `on_written` after this rank's part."""
        super().__init__(path, thread_count=WRITER_THREADS)
        self.fs = self.files = _ChecksummedFiles(busy)
        self._on_written = on_written

    @property
    def checksums(self) -> dict[str, str]:
        """Hex digests of the files that this rank has written, by name."""
        return {name: digest.hexdigest() for name, digest in self.files.digests.items()}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part. Raises OSError of any of the threads, which dcp would pass over."""
        written = super().write_data(plan, planner)
        self.files.check()
        self._on_written()
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the description, on one rank."""
        super().finish(metadata, results)
        self.files.check()


class SafeReader(FileSystemReader):
    """dcp's reader of a folder, for files of unknown origin. Raises `UnsafeCheckpointError` for what is no tensor."""

    def __init__(self, path: Path, watch: Watch = UNWATCHED) -> None:
        super().__init__(path)
        self._watch = watch

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's part; ranks meet after it."""
        done = super().read_data(plan, planner)
        self._watch.mark(f"the tensors of {self.path}")
        return done

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """dcp's description of the checkpoint."""
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]  # read_metadata has looked
        return metadata


class WatchedPlanner(DefaultLoadPlanner):
    """dcp's planner, which tells `watch` of every tensor that was read."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Called when `tensor` has been filled."""
        self._watch.busy()


def read_metadata(path: Path) -> Metadata:
    """The description of the checkpoint in the folder `path`. Raises `UnsafeCheckpointError` or OSError."""
    file = path / METADATA
    content = file.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        if metadata.storage_meta is None:
            raise UnsafeCheckpointError(f"{file} names no storage")
        # An entry of bytes would be unpickled by dcp, whatever is in it.
        strange = [
            key for key, entry in metadata.state_dict_metadata.items() if type(entry) is not TensorStorageMetadata
        ]
        outside = [info.relative_path for info in metadata.storage_data.values() if "/" in info.relative_path]
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # pickle's reader raises all kinds
        raise UnsafeCheckpointError(f"{file} is no description of a checkpoint ({error!r})") from error
    if strange or outside:
        raise UnsafeCheckpointError(
            f"{file} holds {', '.join([*strange, *outside][:3])}, which is no tensor of its own"
        )
    return metadata


def checksum(file: Path, *, busy: Callable[[], None] = UNWATCHED.busy, from_disk: bool = False) -> str:
    """SHA-256 of a file, in hex; `from_disk` asks the system to forget its copy in memory first."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(file, "rb", buffering=0) as stream:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := stream.readinto(block):
            digest.update(block[:count])
            busy()
    return digest.hexdigest()


def first_difference(
    folder: Path,
    checksums: dict[str, str],
    *,
    busy: Callable[[], None] = UNWATCHED.busy,
    from_disk: bool = False,
) -> str | None:
    """The name of a file of `folder` whose SHA-256 is not that of `checksums`; None when all are.

    `busy` is called now and then, from threads, while there is progress.
    """

    def differs(name: str) -> bool:
        return checksum(folder / name, busy=busy, from_disk=from_disk) != checksums[name]

    with ThreadPoolExecutor(max_workers=WRITER_THREADS, thread_name_prefix="checksum") as pool:
        return next((name for name, bad in zip(checksums, pool.map(differs, checksums), strict=True) if bad), None)


class _ChecksummedFiles(FileSystem):
    def __init__(self, busy: Callable[[], None]) -> None:
        super().__init__()
        self.busy = busy
        self.digests: dict[str, Any] = {}
        self.error: OSError | None = None  # the first, for `check`: threads of dcp would print theirs

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        digest = self.digests[Path(path).name] = hashlib.sha256()
        try:
            with super().create_stream(path, mode) as stream:
                yield _Checksummed(stream, digest, self.busy)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch.save ends its archive in vain
            if not isinstance(cause, OSError):
                raise
            self.error = self.error or cause

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if Path(path).name in self.digests:
            self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Checksummed(io.IOBase):
    """A file being written, from first byte to last."""

    def __init__(self, stream: Any, digest: Any, busy: Callable[[], None]) -> None:
        self._stream, self._digest, self._busy = stream, digest, busy

    def write(self, content: Any) -> int:
        self._digest.update(content)
        self._busy()
        return self._stream.write(content)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        self._stream.flush()


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise UnsafeCheckpointError(f"asks for {module}.{name}, which a checkpoint does not need: it is not loaded")
