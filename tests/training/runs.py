"""Short runs that tests of training begin with, and what of their records is compared."""

from pathlib import Path
from typing import Any

from tests.shards import tiny_config
from training.metrics import read_metrics

TIMED = ("throughput/", "memory/", "time/")
# For `short`: a checkpoint every second step, too, but no write that training must wait for before the next.
OVERLAPPING: dict[str, Any] = {"every": 100, "permanent_every": 2, "keep": None}


def untimed(run_dir):
    """The records of a run without what a clock or an allocator says."""
    return [
        {key: value for key, value in record.items() if not key.startswith(TIMED)}
        for record in read_metrics(Path(run_dir) / "metrics.jsonl")
    ]


def short(shards, run_dir, **checkpoint):
    """Eight steps, a checkpoint every second, by the writing thread, nothing else."""
    config = tiny_config(shards, run_dir)
    config.training.steps, config.checkpoint.every, config.evaluation.every = 8, 2, 0
    config.checkpoint.asynchronous = True
    for name, value in checkpoint.items():
        setattr(config.checkpoint, name, value)
    return config
