"""Where the time from the command to the first step goes, and what saves some of it at the next start.

In: marks of the trainer. Out: a line of the log, such as "first step 21.4 s after the start: start 5.2 s, data 0.3 s,
model 2.9 s, checkpoint 0.0 s, evaluation 4.0 s, step 9.0 s". The step counts to where the host has queued it: on a GPU
that is compilation and the building of kernels, or their loading from caches.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

FLASH_ATTENTION_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE"  # what flash-attn-4's variables begin with


class Startup:
    """Seconds since the process began, or, of a later job in it, since the job did."""

    _told = False  # whether a job of this process has had the time before its own

    def __init__(self) -> None:
        self._last = time.time()
        self._begin = self._last if Startup._told else process_begin(self._last)
        self._parts: list[tuple[str, float]] = []
        Startup._told = True
        if self._begin != self._last:
            self._parts.append(("start", self._last - self._begin))

    def mark(self, part: str) -> None:
        """`part` has just been done."""
        now = time.time()
        self._parts.append((part, now - self._last))
        self._last = now

    def line(self) -> str:
        """The time until the last mark, and its parts."""
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._parts)
        return f"first step {self._last - self._begin:.1f} s after the start: {parts}"


def process_begin(otherwise: float) -> float:
    """When this process began, Unix time; `otherwise` where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return otherwise
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def keep_compiled_kernels(device: int) -> None:
    """Have later starts find the kernels that this process compiles for CUDA device `device`. To be called before any.

    Variables of the environment that are set already stay as they are. TorchInductor gives Triton another folder when
    it first builds a kernel itself: a later start builds none, and would miss those that lie there. flash-attn-4 keeps
    no kernels unless it is asked to; it is not to load any that another user may have written.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))
    own = os.path.join(tempfile.gettempdir(), f"flash_attention_cute_dsl_{os.getuid()}")
    folder = Path(os.environ.setdefault(f"{FLASH_ATTENTION_CACHE}_DIR", own))
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            os.environ.setdefault(f"{FLASH_ATTENTION_CACHE}_ENABLED", "1")
