"""Short runs that tests of training begin with, and what of their records is compared."""

from pathlib import Path

from tests.shards import tiny_config
from training.metrics import read_metrics

TIMED = ("throughput/", "memory/", "time/")


def untimed(run_dir):
    """The records of a run without what a clock or an allocator says."""
    return [
        {key: value for key, value in record.items() if not key.startswith(TIMED)}
        for record in read_metrics(Path(run_dir) / "metrics.jsonl")
    ]


def short(shards, run_dir, **checkpoint):
    """Eight steps, a checkpoint every second, nothing else."""
    config = tiny_config(shards, run_dir)
    config.training.steps, config.checkpoint.every, config.evaluation.every = 8, 2, 0
    for name, value in checkpoint.items():
        setattr(config.checkpoint, name, value)
    return config
