"""Whether another process of this host still lives.

In: the number of a process and the place where it was given. Out: whether it has ended, for what a collective or a
store would say nothing about until a timeout.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

BOOT = "/proc/sys/kernel/random/boot_id"  # drawn anew whenever a system starts


def number_space() -> str:
    """Where process numbers mean the same: the running system and, since containers have their own, the namespace.

    The name of the host is not enough: machines of one image may share it, and all begin with the same namespace.
    """
    known = [platform.node()]
    with suppress(OSError):
        known.append(Path(BOOT).read_text(encoding="utf-8").strip())
    with suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(known)


def alive(process: int) -> bool:
    """Whether a process of this `number_space` runs; True where nobody knows."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"  # a zombie waits for its parent
    except (FileNotFoundError, ProcessLookupError):  # the latter when it ends between open and read
        return not os.path.isdir("/proc/self")  # without /proc nobody knows
