"""What the device waits for between steps: `python scripts/benchmark_waits.py --data SHARDS --out DIR [OVERRIDE...]`.

In: token shards, overrides of train.py (`model=moda_700m` by default), a GPU; with torchrun, several. Out: a table of
the gaps between kernels of the main rank, by what the host was at: data, metrics, the switch to evaluation and back, a
checkpoint. The run is real, with evaluations, a checkpoint and metrics every ten steps; shares are for the intervals of
train.py's defaults. The trace, `waits.json` in DIR, opens in ui.perfetto.dev. The run directory is DIR/run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch.profiler import ProfilerActivity, profile

from data.shards import DataError
from models.config import ConfigError
from scripts.console import run
from scripts.training_benchmark import waits
from scripts.training_benchmark.measure import StepTimer
from scripts.training_benchmark.process import refusal
from training.compose import plan
from training.config import TrainingError
from training.distributed import World, distributed_world
from training.environment import rank_variable
from training.preflight import checked
from training.save_schedule import SaveSchedule
from training.signals import stop_on_signals
from training.trainer import Trainer
from training.watchdog import Watchdog

# Steps that count are those after the record of step BEGIN, to that of step END; both wait for the device.
BEGIN, END, EVERY = 20, 110, 10
TRACED_FROM = BEGIN - 2  # the profiler takes a while to start
# Evaluations at steps 50 and 100; a checkpoint at 104, which is not waited for before step 115.
RUN = [
    "training.steps=1000",
    "schedule.warmup_steps=100",
    "evaluation.every=50",
    "evaluation.instances=32",
    "checkpoint.every=115",
    f"logging.every={EVERY}",
    "logging.wandb.mode=disabled",
]
FIXED = {setting.partition("=")[0]: "the measurement depends on it" for setting in RUN}
FIXED["data.path"] = "--data names the shards"


class HostTimes:
    """When (Unix time) the host was at what, by cause."""

    def __init__(self) -> None:
        self.spans: dict[str, list[waits.Span]] = defaultdict(list)
        self.queued: list[float] = []  # when each step was

    def of(self, cause: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with a note of when it runs."""

        def noted(*arguments: Any, **named: Any) -> Any:
            begin = time.time()
            try:
                return function(*arguments, **named)
            finally:
                self.spans[cause].append((begin, time.time()))

        return noted


def main(arguments: list[str] | None = None) -> int:
    """Measure. Returns the exit status: 0, or 2 for what cannot be done."""
    parser = argparse.ArgumentParser(description="What the device waits for between steps.")
    parser.add_argument("--data", type=Path, required=True, help="token shards, as scripts/prepare_data.py writes them")
    parser.add_argument("--out", type=Path, required=True, help="folder, new or empty, for the run and the trace")
    parser.add_argument("overrides", nargs="*", help="of train.py, such as model=olmo2_700m")
    options = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise ConfigError("a GPU is needed, whose kernels are looked at: none is available here.")
        if os.environ.get("RANK", "0") == "0" and (options.out / "run").exists():
            raise ConfigError(f"--out {options.out} holds a run already: give a new folder.")
        paths = [f"data.path={options.data.resolve()}", f"run.dir={options.out.resolve() / 'run'}"]
        batch = f"training.global_batch_size={8 * rank_variable('WORLD_SIZE', 1)}"
        if sentence := refusal(options.overrides, FIXED):
            raise ConfigError(sentence)
        measure(["model=moda_700m", batch, *options.overrides, *RUN, *paths], options.out)
    except BrokenPipeError:
        raise
    except (ConfigError, DataError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(overrides: list[str], out: Path) -> None:
    """Run to step END and print the table on the main rank."""
    config = checked(plan(overrides).jobs[0]).config
    host, timer = HostTimes(), StepTimer(END + 1, cuda=True)
    with distributed_world(config.training.device) as world, stop_on_signals() as stop:
        trainer = Trainer(config, world, stop, Watchdog(world, Path(config.run.dir), factor=0, seconds=1), None)
        trainer.loader.ready = host.of("data", trainer.loader.ready)  # type: ignore[method-assign]
        trainer.metrics.finish = host.of("metrics", trainer.metrics.finish)  # type: ignore[method-assign]
        trainer._evaluate_and_record = host.of("evaluation", trainer._evaluate_and_record)  # type: ignore[method-assign]
        trainer.saver.save = host.of("checkpoint", trainer.saver.save)  # type: ignore[method-assign]
        look = profile(activities=[ProfilerActivity.CUDA])

        def queued(step: int) -> None:
            host.queued.append(time.time())
            if step == TRACED_FROM:
                look.start()

        trainer.after_step += [queued, timer]
        with suppress(StepTimer.Enough):
            trainer.fit()
        look.stop()
        if world.is_main:
            report(look, host, timer.seconds(), out, world)


def report(look: profile, host: HostTimes, steps: list[float], out: Path, world: World) -> None:
    """Print the table; `steps`: seconds from each mark to the next, of which the first is that of step 2."""
    trace = out / "waits.json"
    look.export_chrome_trace(str(trace))
    records = host.spans["metrics"]
    window = records[BEGIN // EVERY - 1][1], records[END // EVERY - 1][1]
    found = waits.account(*waits.device_spans(trace), host.spans, host.queued, window)
    inside = {
        cause: sum(window[0] <= begin and end <= window[1] for begin, end in host.spans[cause])
        for cause in waits.CAUSES
    }
    if unseen := [cause for cause, times in inside.items() if not times]:
        raise ConfigError(f"steps {BEGIN + 1} to {END} had no {', no '.join(unseen)}: leave away what keeps it out.")
    defaults = plan([]).jobs[0].config
    saves = SaveSchedule(defaults.checkpoint.every, None, asynchronous=defaults.checkpoint.asynchronous)
    step_seconds = median(steps[BEGIN:END])
    intervals = {
        "evaluation": defaults.evaluation.every,
        "checkpoint": saves.every - saves.lead,
        "metrics": defaults.logging.every,
        "data": 1,
        waits.STEPS: 1,
    }
    print(waits.table(found, inside | {waits.STEPS: END - BEGIN}, intervals, step_seconds))
    print(f"\n{torch.cuda.get_device_name()}, ranks: {world.size}; {step_seconds:.4f} s a step")
    print(f"gaps from {waits.LEAST * 1e6:.0f} µs on; {found.inside_evaluations * 1e3:.1f} ms more inside evaluations")
    print(f"trace: {trace}")


if __name__ == "__main__":
    run(main)
