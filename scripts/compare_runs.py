"""Do two configurations train alike: `python scripts/compare_runs.py --data SHARDS --a parallel.compile=false
--b parallel.compile=true model=moda_700m ...`.

In: overrides of train.py for both runs, and what tells them apart (`--a`, `--b`, `--gpus-a`, `--gpus-b`). Out: loss and
gradient norm of both at every step that both record, from one seed and on the same batches, and the largest
difference. Exit status 1 when it is above `--tolerance` or `--norm-tolerance`, 2 when there is nothing to compare.
Where they are not given, a step is one micro-batch on each GPU, and the learning rate is at its peak after ten steps.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.shards import DataError
from models.config import ConfigError
from scripts.console import run
from scripts.training_benchmark.process import (
    TIMEOUT,
    StepsFailed,
    StepsTimeout,
    check_device,
    run_steps,
    train_arguments,
)
from training.compose import plan
from training.config import Config
from training.metrics import Record, read_metrics
from training.preflight import on_gpu, preflight

LINES = 10  # steps of the printed table, about
WARMUP = 10  # steps: runs of a learning rate near 0 would be alike, whatever they compute
Pair = tuple[Record, Record]  # of one step


def main(arguments: list[str] | None = None) -> int:
    """Run both, compare, print. Returns the exit status: 0 alike, 1 not, 2 when a run failed."""
    parser = argparse.ArgumentParser(description="Largest difference of the losses of two configurations.")
    parser.add_argument("overrides", nargs="*", help="of train.py, for both runs")
    parser.add_argument("--data", type=Path, required=True, help="token shards")
    parser.add_argument("--a", action="append", default=[], help="an override of the first run")
    parser.add_argument("--b", action="append", default=[], help="an override of the second run")
    parser.add_argument("--gpus-a", type=int, default=1, help="ranks of the first run")
    parser.add_argument("--gpus-b", type=int, default=1, help="ranks of the second run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tolerance", type=float, default=0.01, help="largest difference of the loss, nats")
    parser.add_argument(
        "--norm-tolerance", type=float, default=0.05, help="largest relative difference of the gradient norm"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that a run may take")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow options
    if options.steps < 1 or min(options.gpus_a, options.gpus_b) < 1:
        print("error: --steps, --gpus-a and --gpus-b must be positive: use for example --steps 50.", file=sys.stderr)
        return 2
    if not options.tolerance >= 0:
        print(f"error: --tolerance {options.tolerance:g} cannot be used: use 0 or more, in nats.", file=sys.stderr)
        return 2
    if not options.norm_tolerance >= 0:
        print(
            f"error: --norm-tolerance {options.norm_tolerance:g} cannot be used: use 0 or more, as 0.05.",
            file=sys.stderr,
        )
        return 2
    if not 0 < options.timeout < math.inf:
        print(
            f"error: --timeout {options.timeout:g} cannot be used: use a number of seconds, as 1800.", file=sys.stderr
        )
        return 2
    sides = [Side("a", options.a, options.gpus_a), Side("b", options.b, options.gpus_b)]
    warmup = min(WARMUP, options.steps // 2)
    both = [f"data.path={options.data.resolve()}", "logging.every=1"]
    both += [f"schedule.warmup_steps={warmup}", *options.overrides]
    runs = []
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        try:
            # First, so that what is given wins. The configurations' own batches are those of long runs.
            size = math.lcm(*(micro_batches(configured(both, side, folder), side.gpus) for side in sides))
            both.insert(0, f"training.global_batch_size={size}")
            for side in sides:  # both before the first takes its time
                check(configured(both, side, folder), side, options.steps)
        except (ConfigError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for side in sides:
            try:  # one step more than is compared: a run is left at the end of a step, before it is logged
                place, steps = Path(folder) / side.name, options.steps + 1
                run_steps([*both, *side.own], gpus=side.gpus, steps=steps, folder=place, timeout=options.timeout)
            except StepsTimeout as late:
                remedy = f"give it more than --timeout {options.timeout:g}, or fewer --steps than {options.steps}"
                print(f"error: run {side.name} failed: {late}: {remedy}.", file=sys.stderr)
                return 2
            except StepsFailed as failed:
                said = "" if str(failed).startswith("error:") else f"{failed.output}\n"  # all that there was to say
                why = str(failed).removeprefix("error: ")
                print(f"{said}error: run {side.name} failed: {why}", file=sys.stderr)
                return 2
            runs.append(read_metrics(place / "run" / "metrics.jsonl"))
    pairs = common(*runs)
    if not pairs:
        print("error: no step has a record in both runs: leave logging.every=1, or use more --steps.", file=sys.stderr)
        return 2
    print(table(pairs))
    loss, norm = largest(pairs, "train/loss"), largest(pairs, "train/grad_norm", relative=True)
    alike = loss[0] <= options.tolerance and norm[0] <= options.norm_tolerance
    print(f"\nlargest difference: loss {loss[0]:.2e} (step {loss[1]}), ", end="")
    print(f"gradient norm {norm[0]:.2e} of itself (step {norm[1]})")
    verdict = "within" if alike else "ABOVE"
    allowed = f"{options.tolerance:g} and {options.norm_tolerance:g}"
    print(f"{verdict} the tolerances of {allowed} over {len(pairs)} of {options.steps} steps")
    return 0 if alike else 1


class Side(NamedTuple):
    """One of both runs."""

    name: str
    own: list[str]  # its overrides beyond those of both
    gpus: int


def configured(both: list[str], side: Side, folder: str) -> Config:
    """The configuration of a run in `folder`. Raises ConfigError, also for what such a run has no use for."""
    try:
        return plan(train_arguments([*both, *side.own], Path(folder) / side.name)).jobs[0].config
    except (ConfigError, StepsFailed) as error:
        raise ConfigError(f"run {side.name}: {error}") from error


def micro_batches(config: Config, gpus: int) -> int:
    """Sequences of one micro-batch on each GPU."""
    return max(1, config.training.micro_batch_size) * gpus  # a value below is refused later


def check(config: Config, side: Side, steps: int) -> None:
    """Raise ConfigError or DataError for a run that cannot start here, or ends before `steps` steps have records."""
    try:
        config.validate(side.gpus)
        check_device([f"training.device={config.training.device}"], option="")
        if config.training.device != "cpu" and side.gpus > (here := torch.cuda.device_count()):
            raise ConfigError(f"--gpus-{side.name} {side.gpus} cannot be used: use {here}, which are here, or fewer.")
        key = "steps" if config.training.stop_at is None else "stop_at"
        last = getattr(config.training, key)
        if last <= steps:
            raise ConfigError(
                f"training.{key}={last} ends the run before --steps {steps} are recorded: use training.{key}="
                f"{steps + 1} or more, or fewer --steps."
            )
        if on_gpu(config):  # what it keeps of a GPU ends with its process
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(preflight, config, say).result()
        else:
            preflight(config, say)
    except (ConfigError, DataError, ValueError) as error:
        raise ConfigError(f"run {side.name}: {error}") from error


def say(line: str) -> None:
    """What takes long is told."""
    print(line, file=sys.stderr, flush=True)


def common(a: list[Record], b: list[Record]) -> list[Pair]:
    """The records of both runs at each step that both have recorded; those of an evaluation alone are left out."""
    others = {record["step"]: record for record in b if "train/loss" in record}
    return [(record, others[record["step"]]) for record in a if "train/loss" in record and record["step"] in others]


def largest(pairs: list[Pair], key: str, relative: bool = False) -> tuple[float, int]:
    """Largest difference of a value over the steps of both, and its step; what is no number is infinite.

    `relative`: as a fraction of the larger of both values, which are positive.
    """
    differences = []
    for x, y in pairs:
        difference = abs(x[key] - y[key])
        if relative and difference:
            difference /= max(x[key], y[key])
        differences.append((math.inf if math.isnan(difference) else difference, x["step"]))
    return max(differences)


def table(pairs: list[Pair]) -> str:
    """Both runs side by side at some ten steps, the last one included."""
    stride = max(1, len(pairs) // LINES)
    shown = pairs[stride - 1 :: stride]
    shown += [pairs[-1]] if shown[-1] is not pairs[-1] else []
    lines = ["| step | loss a | loss b | difference | gradient norm a | b |", "|---|---|---|---|---|---|"]
    for x, y in shown:
        loss, norm = (x["train/loss"], y["train/loss"]), (x["train/grad_norm"], y["train/grad_norm"])
        cells = f"{loss[0]:.5f} | {loss[1]:.5f} | {loss[1] - loss[0]:+.1e} | {norm[0]:.4f} | {norm[1]:.4f}"
        lines.append(f"| {x['step']} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
