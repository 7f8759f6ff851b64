"""One preparation over many machines, by datatrove's executors:

    python scripts/prepare_on_cluster.py --tasks 64 --partition cpu --time 12:00:00 --logs LOGS -- source=files \\
        source.path=DIR tokenizer=FILE output=SHARDS         SLURM: job arrays, each waiting for the one before
    python scripts/prepare_on_cluster.py --tasks 4 --local --logs LOGS -- source=files ...       here, the same tasks

In: the overrides of scripts/prepare_data.py after `--`. Out: its output folder, which all machines must see. Stages are
`hash`, which looks for duplicates (only with that filter), `tokenize`, which makes the parts, and `end`, which declares
the splits finished. A task is a prepare_data command with `task` and `tasks`, so the result does not depend on how many
there are, and the same command goes on after a failure.

datatrove (`pip install datatrove`) rather than the sharding of `datasets` or Ray: it submits SLURM arrays with their
dependencies, requeues what was preempted, runs the same tasks locally, and asks no more of a step than (rank, world
size), which is all that independent parts need. Any scheduler that numbers its jobs will do without it:
`task=$SLURM_ARRAY_TASK_ID tasks=64` in an array job, then the command without both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from data.prepare import PrepareOptions
from data.shards import DataError
from scripts.console import run
from scripts.prepare_data import WAITING, load_config

PREPARE = Path(__file__).resolve().with_name("prepare_data.py")


@dataclass
class Stage:
    """A step of datatrove's: the same command for every task, which says which one it is."""

    name: str
    command: list[str]
    folder: str  # where it runs, for relative paths
    shared: bool  # among several tasks, which may end before the others have; else it is one command for all

    def __call__(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> None:
        share = [f"task={rank}", f"tasks={world_size}"] if self.shared else []
        status = subprocess.run([*self.command, *share], cwd=self.folder, check=False).returncode
        if status != 0 and not (self.shared and status == WAITING):
            raise RuntimeError(f"{' '.join([*self.command, *share])} ended with status {status}.")


def stages(overrides: list[str]) -> list[Stage]:
    """The stages of a preparation, in order. Raises `DataError` for a mistake in `overrides`."""
    for override in overrides:
        if (key := override.partition("=")[0]) in ("task", "tasks"):
            raise DataError(f"{key} is set by --tasks here: leave it out.")
    config: Any = OmegaConf.to_object(load_config(overrides))
    names = ["hash", "tokenize"] if PrepareOptions(filters=config.filters).finds_duplicates else ["tokenize"]
    command = [sys.executable, str(PREPARE), *overrides]
    found = [Stage(name, command, os.getcwd(), shared=True) for name in names]
    return [*found, Stage("end", command, os.getcwd(), shared=False)]


def launch(options: argparse.Namespace) -> None:
    """Run the stages here, or submit them to SLURM.

    What is finished is told by the output alone: by datatrove's record in the logs too (`skip_completed`), a command
    with the logs of another output, or whose output was removed, would end at once and well with nothing made. Raises
    `DataError` for a mistake, `RuntimeError` when a task that runs here fails.
    """
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    if options.tasks < 1:
        raise DataError(f"--tasks {options.tasks} cannot be used: use at least 1.")
    before = None
    for stage in stages(options.overrides):
        tasks = options.tasks if stage.shared else 1
        logs = f"{options.logs}/{stage.name}"
        if options.local:
            executor = LocalPipelineExecutor(
                [stage], tasks=tasks, workers=options.workers, logging_dir=logs, skip_completed=False
            )
            executor.depends, before = before, executor
        else:
            before = SlurmPipelineExecutor(
                [stage], tasks=tasks, workers=options.workers, time=options.time, partition=options.partition,
                cpus_per_task=options.cpus, job_name=f"prepare-{stage.name}", logging_dir=logs, depends=before,
                skip_completed=False,
            )  # fmt: skip
    assert before is not None
    before.run()  # runs or submits what it depends on first


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done or submitted, 1 a task failed here, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, required=True, help="shares of the parts, at most as many as there are")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time; -1: all")
    parser.add_argument("--logs", required=True, help="folder for the logs")
    parser.add_argument("--local", action="store_true", help="run on this machine, without SLURM")
    parser.add_argument("--partition", help="SLURM partition")
    parser.add_argument("--time", default="24:00:00", help="SLURM time limit of a task")
    parser.add_argument("--cpus", type=int, default=8, help="SLURM cores of a task")
    parser.add_argument("overrides", nargs="+", help="of scripts/prepare_data.py, after --")
    options = parser.parse_args(arguments)
    if not options.local and options.partition is None:
        parser.error("--partition is missing: name one, or use --local.")
    try:
        launch(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of a stage: what was wrong the task has printed itself
        print(f"error: {error} Its own message is above; the same command goes on after it is mended.", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}: install it with pip install datatrove.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run(main)
