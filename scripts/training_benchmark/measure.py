"""Real training steps on the ranks of this process group, timed from outside without stalling them.

In: `measure.py RESULT STEPS STARTED OVERRIDE...`, as `process` calls it: overrides of train.py, and when (Unix time)
the command was given. Out: what the main rank saw, as JSON in the file RESULT. The loop is the trainer's own, with its
loader, clipping, logging and optimizer; it is left after the last step, before evaluation or checkpoints.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    gc.disable()  # as train.py does
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from data.shards import DataError
from models.config import ConfigError
from training.compose import plan
from training.config import Config
from training.distributed import distributed_world
from training.memory_estimate import estimate
from training.preflight import checked
from training.signals import stop_on_signals
from training.trainer import Trainer
from training.versions import environment
from training.watchdog import Watchdog

WARMUP = 8  # steps: compilation, allocator, clocks


class StepTimer:
    """Marks the end of every step on the device; ends the run after the last one."""

    class Enough(Exception):
        """The last step was done."""

    def __init__(self, last: int, cuda: bool) -> None:
        self.last, self.cuda = last, cuda
        self.marks: list[Any] = []
        self.first_step_at = 0.0  # Unix time

    def __call__(self, step: int) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        if len(self.marks) == 1:
            if self.cuda:
                torch.cuda.synchronize()
            self.first_step_at = time.time()
        if len(self.marks) == self.last:
            raise StepTimer.Enough

    def seconds(self) -> list[float]:
        """Of every step after the first, what lies between steps included."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def measure(arguments: list[str], steps: int, started: float) -> dict[str, Any] | None:
    """Run `steps` steps as train.py would with `arguments`, of which all after the warm-up count; None on other ranks.

    `started`: Unix time at which the command was given. With a single step only the time to its end is known. Raises
    ConfigError where the run ends before.
    """
    config = checked(plan(arguments).jobs[0]).config
    with distributed_world(config.training.device) as world, stop_on_signals() as stop:
        watchdog = Watchdog(world, Path(config.run.dir), factor=0, seconds=1)  # which never ends a run
        trainer = Trainer(config, world, stop, watchdog, None)
        timer = StepTimer(steps, world.device.type == "cuda")
        pauses: list[float] = []  # seconds until the end of each step
        trainer.after_step += [lambda step: pauses.append(trainer.clock.paused_seconds), timer]
        waits: list[float] = []
        trainer.loader.ready = _timed(trainer.loader.ready, waits)  # type: ignore
        with suppress(StepTimer.Enough):
            trainer.fit()
            done, made = trainer.state.step, len(timer.marks)
            raise ConfigError(
                f"the run ended after {made} of {steps} steps, at step {done}: leave away what ends it there, such as "
                "training.stop_at or training.steps."
            )
        if not world.is_main:
            return None
        result: dict[str, Any] = {
            "start_to_first_step_seconds": timer.first_step_at - started,
            "startup": trainer.startup.line(),
            "ranks": world.size,
            "micro_batch_size": config.training.micro_batch_size,
            "sequence_length": config.data.sequence_length,
            "environment": environment(world.device.type),
        }
        warmup = min(WARMUP, steps // 3)
        if steps > 1:
            paused = pauses[-1] - pauses[warmup]  # a trace was written
            result |= _of_steps(config, timer.seconds()[warmup:], waits[warmup + 1 :], world.size, paused)
            result |= trainer.metrics.utilization(result["tokens_per_second"])
        if world.device.type == "cuda":
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
            result["reserved_bytes"] = torch.cuda.max_memory_reserved()
        result["estimated_bytes"] = estimate(
            config,
            world.size,
            compute_dtype=world.compute_dtype(config.training.precision),
            compiled=world.compile_backend(config.parallel.compile) is not None,
        ).total
        return result


def _of_steps(config: Config, seconds: list[float], waits: list[float], ranks: int, paused: float) -> dict[str, Any]:
    tokens = config.training.global_batch_size * config.data.sequence_length
    return {
        "steps": len(seconds),
        "step_seconds": median(seconds),
        "mean_step_seconds": sum(seconds) / len(seconds),
        "slowest_step_seconds": max(seconds),
        "tokens_per_second": tokens / median(seconds),
        "tokens_per_second_per_gpu": tokens / median(seconds) / ranks,
        "data_wait_share": sum(waits) / (sum(seconds) - paused),
    }


def _timed(read: Callable[[int], Any], waits: list[float]) -> Callable[[int], Any]:
    def timed(position: int) -> Any:
        begin = time.perf_counter()
        try:
            return read(position)
        finally:
            waits.append(time.perf_counter() - begin)

    return timed


if __name__ == "__main__":
    try:
        measured = measure(sys.argv[4:], int(sys.argv[2]), float(sys.argv[3]))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    if measured is not None:
        Path(sys.argv[1]).write_text(json.dumps(measured), encoding="utf-8")
