"""Small runs to inject faults into: two layers on a corpus of counting documents, on the CPU in fp32.

In: an empty folder, and Python that a run executes before anything else. Out: the run's exit status, what it printed,
and whether its records are those of an undisturbed run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shard_writer import ShardWriter

ROOT = Path(__file__).resolve().parents[2]
MARKER = "checkpoint.json"
EVERY = 5  # steps between checkpoints
LIMIT = 120  # seconds that a run may take
STEPS = 60
SETTINGS = [
    "model=moda_tiny",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.head_dim=8",
    "model.intermediate_size=48",
    "data.sequence_length=16",
    f"training.steps={STEPS}",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "training.device=cpu",
    f"checkpoint.every={EVERY}",
    "evaluation.every=20",
    "logging.every=1",
]
# Python that a run executes first. `_inject` does something once, before the batch after `step` is read.
INJECT = """
import os, signal, time
import torch
from data.loader import BatchLoader
_batch = BatchLoader.batch
def _inject(step, action, rank="0"):
    todo = [action] * (os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0")
    def batch(self, position):
        if todo and os.environ.get("RANK", "0") == rank and position == 4 * step:
            todo.pop()()
        return _batch(self, position)
    BatchLoader.batch = batch
"""


@dataclass
class Row:
    """One fault."""

    fault: str
    injected: str
    times: int
    lost: str
    message: str
    passed: bool


class Bench:
    """Runs of one configuration in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_corpus(folder / "shards")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["training.trainer", "train"])  # a run then begins at once
        self.number = 0
        assert self.finish(self.run_dir("undisturbed")) == 0, "the undisturbed run failed"
        self.expected = records(folder / "undisturbed")

    def run_dir(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / name

    def start(self, run_dir: Path, *overrides: str, inject: str = "") -> multiprocessing.process.BaseProcess:
        """A run as a process of its own; what it prints is in `output`."""
        self.number += 1
        self.output = self.folder / f"output-{self.number}.txt"
        arguments = [*SETTINGS, f"data.path={self.folder / 'shards'}", f"run.dir={run_dir}", *overrides]
        process = self.context.Process(target=_run, args=(arguments, str(self.output), inject))
        process.start()
        return process

    def finish(self, run_dir: Path, *overrides: str, inject: str = "") -> int | None:
        """A run to its end. Returns the exit status; negative: a signal."""
        process = self.start(run_dir, *overrides, inject=inject)
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode

    def said(self, pattern: str) -> str:
        """What the last run printed that matches, in short, or nothing."""
        found = re.search(pattern, self.output.read_text(errors="replace"))
        return " ".join(found[0].replace(str(self.folder) + "/", "").split()) if found else ""

    def same(self, run_dir: Path) -> bool:
        """Whether every record is, bit for bit, that of the undisturbed run."""
        return records(run_dir) == self.expected


def _run(arguments: list[str], output: str, inject: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import train

    exec(INJECT + inject, {})
    sys.argv = ["train.py", *arguments]
    try:
        status = train.main(arguments)
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    sys.exit(status)


def write_corpus(folder: Path) -> None:
    """A few kilobytes of documents that count up."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 60), ("validation/even", 8)):
        with ShardWriter(folder / name, vocab_size=120, eos_id=0, tokens_per_file=1500) as writer:
            starts = generator.integers(1, 119, size=count)
            texts = [[int(1 + (start + i) % 119) for i in range(60)] for start in starts]
            writer.write(texts, text_bytes=4 * sum(map(len, texts)))
            writer.finish(tokenizer={"name": "counting", "sha256": "0" * 64}, preparation={})


def records(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock or an allocator says."""
    timed = ("throughput/", "memory/", "time/")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


def last_step(run_dir: Path) -> int:
    """The last whole record of a run that was killed."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0
