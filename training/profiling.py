"""A look inside chosen steps: a trace of the operations and kernels of a step, the history of the device's memory.

In: a step, as the body of a `with`. Out: in the folder `profile` of the run directory, `step-N-rank-R.json.gz` (for
ui.perfetto.dev and scripts/profile_report.py) and `memory-N-rank-R.pickle` (for pytorch.org/memory_viz). A profiled
step is slower; the others are left alone.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import gettempdir

import torch
from torch.profiler import ProfilerActivity, profile

from training.config import ProfileConfig

MEMORY_EVENTS = 200_000  # allocations and frees that the history of a step may hold


class StepProfiler:
    """Profiles the steps that `config` names, on every rank."""

    def __init__(
        self,
        config: ProfileConfig,
        run_dir: Path,
        rank: int,
        device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:
        self.say = say
        self.steps, self.cuda = frozenset(config.steps), device.type == "cuda"
        self.memory = config.memory and self.cuda
        self.folder, self.rank = run_dir / "profile", rank

    @contextmanager
    def of_step(self, step: int, paused: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Profile what happens inside, if step number `step` is wanted; an exception inside leaves no file.

        The files are written in a `paused()`, so that a clock leaves that out.
        """
        if step not in self.steps:
            yield
            return
        if self.cuda:
            torch.cuda.synchronize()  # kernels that are still under way belong to what came before
        with ExitStack() as stack:
            if self.memory:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
                stack.callback(torch.cuda.memory._record_memory_history, enabled=None)
            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda) as trace:
                yield  # the end of the profile waits for the device
            with paused():
                self._write(trace, step)

    def _write(self, trace: profile, step: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{step}-rank-{self.rank}.json.gz"
            trace.export_chrome_trace(str(path))
            if is_trace(path):
                self.say(f"profile of step {step}: {path}")
            else:  # the profiler writes to the temporary folder first, and raises nothing where that fails
                path.unlink()
                self._warn(
                    f"the trace of step {step} could not be written: make room in {gettempdir()}, or name another "
                    "folder with TMPDIR"
                )
            if self.memory:
                torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{step}-rank-{self.rank}.pickle"))
        except OSError as error:  # what a run can do without does not end it
            self._warn(f"{self.folder} cannot be written ({error.strerror or error}): step {step} has no profile")

    def _warn(self, text: str) -> None:
        """Every rank writes files of its own, but the console is the first one's."""
        if self.rank == 0:
            self.say(f"warning: {text}")
            return
        with suppress(OSError):
            print(f"rank {self.rank}: warning: {text}", file=sys.stderr, flush=True)


def is_trace(path: Path) -> bool:
    """Whether a compressed file holds a JSON object from begin to end, by its first and last character.

    Raises OSError when it cannot be read.
    """
    first = last = b""
    try:
        with gzip.open(path) as file:
            while chunk := file.read(1 << 20):
                first, last = first or chunk.lstrip()[:1], (chunk.rstrip() or last)[-1:]
    except (EOFError, gzip.BadGzipFile):
        return False
    return (first, last) == (b"{", b"}")
