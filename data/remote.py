"""Shards that lie elsewhere: `s3://`, `gs://`, `https://` and whatever else fsspec knows, through a local cache.

In: the `data.path` of a run. Out: a local folder with the same content. Files are copied whole, before the run begins,
and checked against the manifest's SHA-256 on the way; from then on they are memory-mapped like any others. In a
shuffled order every file is wanted within the first steps, so reading them piece by piece would only be slower.

The cache is named by content: `CACHE/NAME-FINGERPRINT/`. Data that has changed at its address gets a new folder, a copy
that is there already is taken, and a copy that was interrupted goes on with the files it lacks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from data.host_lock import host_lock
from data.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DataError,
    Manifest,
    ShardFile,
    counted,
    parse_manifest,
    partial_path,
    user_cache,
    write_atomically,
)

CONNECTIONS = 8  # files copied at one time
ATTEMPTS = 3  # at copying one file
CHUNK = 2**23  # bytes read at one time

_found: dict[tuple[str, Path], Path] = {}  # addresses that this process has looked at


def is_remote(path: str) -> bool:
    """Whether `path` is an address that fsspec opens, and no local path."""
    return "://" in path


def localized(path: str, cache: str | Path | None, say: Callable[[str], None] = lambda line: None) -> Path:
    """The shards directory `path` as a local folder: itself, or its copy in the folder `cache`.

    Args:
        path: local, or an address such as s3://bucket/shards.
        cache: where copies are kept; None: `~/.cache/moda`, or below $XDG_CACHE_HOME.
        say: gets a line when files have to be copied.

    Raises `DataError` when the address cannot be read, a file there is not what its manifest says, or the cache cannot
    be written. Processes of one host do the work once.
    """
    if not is_remote(path):
        return Path(path)
    root = Path(cache) if cache else user_cache()
    key = path.rstrip("/"), root.absolute()
    if key not in _found:
        _found[key] = _Remote(key[0]).copy(key[1], say)
    return _found[key]


class _Remote:
    """A shards directory behind an address."""

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address
        try:
            self.system, self.root = url_to_fs(address)
        except ImportError as error:
            raise DataError(f"data.path={address} needs a package ({error}): install it with pip.") from error
        except Exception as error:  # every kind of storage has errors of its own, and some connect here
            raise DataError(f"data.path={address} cannot be opened ({error}): look at the address.") from error

    def copy(self, cache: Path, say: Callable[[str], None]) -> Path:
        """Bring what the cache lacks, and return the folder there."""
        contents = {folder: self._read(f"{folder}/{MANIFEST_NAME}") for folder in self._folders()}
        manifests = {
            folder: parse_manifest(content, f"{self.address}/{folder}/{MANIFEST_NAME}")
            for folder, content in contents.items()
        }
        tokenizer = self._read(TOKENIZER_NAME) if self._exists(TOKENIZER_NAME) else None
        digest = hashlib.sha256(b"".join(contents.values()) + (tokenizer or b"")).hexdigest()[:16]
        target = cache / f"{self.root.rstrip('/').rpartition('/')[2]}-{digest}"
        with host_lock(target):
            try:
                target.mkdir(parents=True, exist_ok=True)
                self._copy_files(manifests, target, say)
                if tokenizer is not None:
                    write_atomically(target / TOKENIZER_NAME, tokenizer)
                for folder, content in contents.items():
                    if not (target / folder / MANIFEST_NAME).exists():
                        write_atomically(target / folder / MANIFEST_NAME, content)
            except OSError as error:
                raise DataError(
                    f"{self.address} cannot be copied to {target} ({error}): make space there, or name another folder "
                    "with data.cache."
                ) from error
        return target

    def _folders(self) -> list[str]:
        """`train` and the validation folders."""
        if not self._exists(f"train/{MANIFEST_NAME}"):
            raise DataError(
                f"data.path={self.address} holds no finished token shards (train/{MANIFEST_NAME} cannot be found): "
                "look at the address, or prepare the data with scripts/prepare_data.py and copy it there."
            )
        try:
            entries = self.system.ls(f"{self.root}/validation", detail=False)
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        names = sorted({entry.rstrip("/").rpartition("/")[2] for entry in entries})
        return [
            "train",
            *(f"validation/{name}" for name in names if self._exists(f"validation/{name}/{MANIFEST_NAME}")),
        ]

    def _copy_files(self, manifests: dict[str, Manifest], target: Path, say: Callable[[str], None]) -> None:
        missing: list[tuple[str, ShardFile]] = []
        for folder, manifest in manifests.items():
            (target / folder).mkdir(parents=True, exist_ok=True)
            for file in manifest.files:
                path = target / folder / file.name
                if not path.exists() or path.stat().st_size != file.bytes:
                    missing.append((folder, file))
        if missing:
            size = sum(file.bytes for _, file in missing)
            say(f"copying {counted(len(missing), 'file')} ({size / 1e9:,.2f} GB) of {self.address} to {target}")
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            for _ in threads.map(lambda entry: self._copy_file(entry[0], entry[1], target), missing):
                pass

    def _copy_file(self, folder: str, file: ShardFile, target: Path) -> None:
        """One file, whole and verified under its name, or not at all."""
        address, path = f"{self.root}/{folder}/{file.name}", target / folder / file.name
        part = partial_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)  # a prepared split has a folder for each part
        digest = hashlib.sha256()
        source = self._retried(partial(self.system.open, address, "rb"), address)
        with source, open(part, "wb") as out:
            while content := self._retried(partial(source.read, CHUNK), address):
                digest.update(content)
                out.write(content)
        if digest.hexdigest() != file.sha256:
            part.unlink()
            raise DataError(
                f"{self.address}/{folder}/{file.name} is damaged (its SHA-256 is not the manifest's): copy it there "
                "again, from where it was prepared."
            )
        os.replace(part, path)

    def _read(self, name: str) -> bytes:
        return self._retried(partial(self.system.cat_file, f"{self.root}/{name}"), name)

    def _exists(self, name: str) -> bool:
        return self._retried(partial(self.system.exists, f"{self.root}/{name}"), name)

    def _retried(self, call: Callable[[], Any], name: str) -> Any:
        """What `call` returns, tried again after an error of the network."""
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except FileNotFoundError as error:
                raise DataError(f"{self.address}: {name} is missing ({error}).") from error
            except Exception as error:  # every kind of storage has errors of its own
                if attempt == ATTEMPTS - 1:
                    raise DataError(f"{self.address}: {name} cannot be read ({error}).") from error
        raise AssertionError
