"""One process at a time in a run directory: a lock of the operating system, which dies with its process."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.config import ConfigError


@contextmanager
def run_lock(run_dir: Path, key: str | None = None) -> Iterator[None]:
    """Hold `run_dir`, made when missing, while the block runs. Raises ConfigError when another process does.

    `key` of the configuration gives another directory; None: the caller has no use for another.
    """
    which = f"run.dir={run_dir}" if key else f"{run_dir}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a+")  # noqa: SIM115 - closed below, and by the system when the process dies
    except OSError as error:
        remedy = "use another folder" if key else "give access there"
        raise ConfigError(f"{which} cannot be written ({error.strerror}): {remedy}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            otherwise = f", or choose another {key}" if key else ""
            raise ConfigError(f"{which} is in use by {holder}: wait for it to end{otherwise}.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
