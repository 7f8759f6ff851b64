"""One process of a host at a time on a folder, which need not exist, be writable, or lie on a disk that knows locks.

In: the folder. Out: a context, inside of which no other process of this host and user is in that of the same folder.

The lock is a file in the temporary folder of the host, there only while somebody holds it or waits. Whoever has it
removes it in the end; those who wait have the removed file open, which locks out nobody, so each looks whether the file
that it has locked is still the one of that name, and else begins again. One that a killed process has left is used,
and removed, by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def host_lock(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process of this host and user at a time works on `folder`.

    `waiting` is called, once, when another one does.
    """
    path = lock_path(folder)
    descriptor, waited = None, False
    while descriptor is None:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    waiting()
                waited = True
                fcntl.flock(opened, fcntl.LOCK_EX)
            if _is_at(opened, path):
                descriptor = opened
        finally:
            if descriptor is None:
                os.close(opened)
    try:
        yield
    finally:
        if _is_at(descriptor, path):  # unless something else that cleans the temporary folder has removed it before
            path.unlink(missing_ok=True)  # while the lock is held: afterwards it may be another process's
        os.close(descriptor)


def lock_path(folder: Path) -> Path:
    """The lock of `folder`, by whatever name: a file that is there while a process has it."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"moda-{os.getuid()}-{name}.lock"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
