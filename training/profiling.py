"""A look inside chosen steps: a trace of the operations and kernels of a step, the history of the device's memory.

In: the number of steps done, after each. Out: in the folder `profile` of the run directory, `step-N-rank-R.json.gz`
(for ui.perfetto.dev and scripts/profile_report.py) and `memory-N-rank-R.pickle` (for pytorch.org/memory_viz). A
profiled step is slower; the others are left alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from training.config import ProfileConfig

MEMORY_EVENTS = 200_000  # allocations and frees that the history of a step may hold


class StepProfiler:
    """Profiles the steps that `config` names, on every rank."""

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int, device: torch.device) -> None:
        self.steps = frozenset(config.steps)
        self.memory = config.memory and device.type == "cuda"
        self.folder, self.rank = run_dir / "profile", rank
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._running: profile | None = None

    def __call__(self, step: int) -> None:
        """End the profile of step number `step`, and begin that of the next if it is wanted."""
        if self._running is not None:
            self._end(step)
        if step + 1 in self.steps:
            if self.memory:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._running = profile(activities=self._activities)
            self._running.start()

    def close(self) -> None:
        """Give up a profile whose step did not end."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _end(self, step: int) -> None:
        running, self._running = self._running, None
        assert running is not None
        running.stop()  # waits for the device
        self.folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self.folder / f"step-{step}-rank-{self.rank}.json.gz"))
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{step}-rank-{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
