"""Small runs to inject faults into: two layers on a corpus of counting documents, in fp32, on a CPU or on GPUs.

In: an empty folder, and Python that a run executes before anything else. Out: the run's exit status, what it printed,
and whether its records are those of an undisturbed run.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from data.shard_writer import ShardWriter
from scripts.training_benchmark.process import kill

ROOT = Path(__file__).resolve().parents[2]
MARKER = "checkpoint.json"
EVERY = 5  # steps between checkpoints
LIMIT = 180  # seconds that a run may take
STEPS = 60
TOLERANCE = 1e-3  # of records, relative, where two undisturbed runs differ in bits
SETTINGS = [
    "model=moda_tiny",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.intermediate_size=48",
    "data.sequence_length=16",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    f"checkpoint.every={EVERY}",
    "evaluation.every=20",
    "logging.every=1",
]
OF_DEVICE = {
    "cpu": ["model.head_dim=8", "training.device=cpu"],
    # The least head_dim of the kernels; without compilation, which would take minutes for what is injected here.
    "cuda": ["model.head_dim=16", "training.device=cuda", "training.precision=fp32", "parallel.compile=false"],
}
# Python that a run executes first. `_inject` does something once, before the batch after `step` is read; `_inject_in`
# inside step `step`, when this rank's gradients are there and their norm over all ranks is not.
INJECT = """
import os, signal, time
import torch
from data.loader import BatchLoader
_batch = BatchLoader.batch
_total_norm = torch.nn.utils.get_total_norm
def _here(rank):
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and os.environ.get("RANK", "0") == rank
def _inject(step, action, rank="0"):
    todo = [action] * _here(rank)
    def batch(self, position):
        if todo and position == 4 * step:
            todo.pop()()
        return _batch(self, position)
    BatchLoader.batch = batch
def _inject_in(step, action, rank="0"):
    steps = iter(range(1, 10**6))
    def total_norm(*arguments):
        if next(steps) == step and _here(rank):
            action()
        return _total_norm(*arguments)
    torch.nn.utils.get_total_norm = total_norm
"""
# The same sums in the same order, where PyTorch leaves that open; what cannot is said in the run's log.
DETERMINISTIC = """
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = False
"""
# multiprocessing looks at all processes whenever it starts one: two threads would take the same exit status.
_processes = threading.Lock()


@dataclass
class Row:
    """One fault."""

    fault: str
    injected: str
    times: int
    lost: str
    message: str
    passed: bool
    skipped: str = ""  # why it was not injected


@dataclass
class Reference:
    """The records of an undisturbed run, and how far others may be apart from them."""

    records: list[dict[str, Any]]
    tolerance: float = 0.0

    @property
    def untouched(self) -> str:
        """What no fault may change, in words."""
        return "no bit of any record" if self.tolerance == 0 else f"no record by more than {self.tolerance:g}"


class Bench:
    """Runs of one configuration in a folder. Each fault takes a copy, `of`, with logs of its own.

    As a context manager it ends what still runs when it is left, and then starts nothing more, from any thread.
    """

    def __init__(self, folder: Path, device: str = "cpu", gpus: int = 0) -> None:
        self.folder, self.device, self.gpus = folder, device, gpus
        self.settings = [*SETTINGS, *OF_DEVICE[device], f"training.steps={STEPS}", f"data.path={folder / 'shards'}"]
        self.inject = INJECT if device == "cpu" else INJECT + DETERMINISTIC
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["training.trainer", "train"])  # a run then begins at once
        self.single: Future[Reference] = Future()  # of a run on one rank
        self.pair: Future[Reference] = Future()  # on two
        self.name, self.outputs = "", list[Path]()
        self.ended = threading.Event()
        self._ends = list[Callable[[], object]]()  # what ends each run that was started
        (folder / "logs").mkdir()
        write_corpus(folder / "shards")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        with _processes:
            self.ended.set()
        for end in self._ends:
            end()

    def of(self, name: str) -> Bench:
        """This bench for one fault; faults may be injected side by side."""
        own = copy.copy(self)
        own.name, own.outputs = name, []
        return own

    def run_dir(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / name

    def start(self, run_dir: Path, *overrides: str, inject: str = "") -> Run:
        """A run as a process of its own."""
        arguments = [*self.settings, f"run.dir={run_dir}", *overrides]
        reader, writer = self.context.Pipe(duplex=False)  # a limit for the files of the run is none for what it prints
        process = self.context.Process(target=_run, args=(arguments, writer, self.inject + inject))
        with _processes:
            self._check_going_on()
            process.start()
            run = Run(process, reader, self._output())
            self._ends.append(run.end)
        writer.close()
        return run

    def finish(self, run_dir: Path, *overrides: str, inject: str = "", limit: float = LIMIT) -> int:
        """A run to its end, within `limit` seconds. Returns the exit status; negative: a signal."""
        run, end = self.start(run_dir, *overrides, inject=inject), time.monotonic() + limit
        while run.going_on() and time.monotonic() < end:
            time.sleep(0.01)
        if run.going_on():
            run.kill(stack_traces=True)
            self.note(f"not ended after {limit} s")
        return run.status()

    def start_ranks(self, name: str, inject: str, *overrides: str, restarts: int = 1) -> subprocess.Popen[bytes]:
        """A run on two ranks under torchrun."""
        script = self.folder / f"{name}.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n{self.inject}\n{inject}\n"
            "sys.exit(train.main(sys.argv[1:]))\n"
        )
        command = self.launch_command(script, self.run_dir(name), *overrides, restarts=restarts)
        with open(self._output(), "ab") as output, _processes:
            self._check_going_on()
            process = subprocess.Popen(command, stdout=output, stderr=output)
            self._ends.append(partial(kill, process))
            return process

    def launch(self, name: str, inject: str, *overrides: str, restarts: int = 1) -> int:
        """A run on two ranks under torchrun, to its end. Returns the exit status."""
        process = self.start_ranks(name, inject, *overrides, restarts=restarts)
        try:
            return process.wait(2 * LIMIT)
        except subprocess.TimeoutExpired:
            self.note(f"not ended after {2 * LIMIT} s")
            process.terminate()  # it ends its ranks, after 30 s by SIGKILL
            return process.wait(60)

    def launch_command(self, script: Path, run_dir: Path, *overrides: str, restarts: int) -> list[str]:
        """torchrun with `script` in place of train.py."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts"]
        # On a GPU ranks connect their devices between two marks, and several runs share each device.
        hang = f"training.hang_seconds={10 if self.device == 'cpu' else 30}"
        command = [sys.executable, *launcher, str(restarts), str(script), *self.settings]
        return [*command, f"run.dir={run_dir}", hang, *overrides]

    def said(self, pattern: str) -> str:
        """What the last run printed that matches, in short, or nothing."""
        found = re.search(pattern, self.outputs[-1].read_text(errors="replace"))
        return " ".join(found[0].replace(str(self.folder) + "/", "").split()) if found else ""

    def note(self, text: str) -> None:
        """Add to what the last run printed."""
        with open(self.outputs[-1] if self.outputs else self._output(), "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")

    def log(self) -> str:
        """What all runs of this fault have printed."""
        return "".join(f"== {file.name}\n{file.read_text(errors='replace')}\n" for file in self.outputs)

    def same(self, run_dir: Path, expected: Reference | None = None) -> bool:
        """Whether every record is, bit for bit where that can be, that of the undisturbed run."""
        expected = expected or self.single.result()
        difference, where = apart(records(run_dir), expected.records)
        if difference > expected.tolerance:
            self.note(f"the records of {run_dir.name} differ from the undisturbed ones by {difference:g}: {where}")
        return difference <= expected.tolerance

    def undisturbed(self, fault: str, name: str, run: Callable[[str], int], into: Future[Reference]) -> Row:
        """What records are compared with: of two runs on a GPU, which say whether that can be bit for bit."""
        names = [name] if self.device == "cpu" else [name, f"{name}-again"]
        try:
            if any(run(name) != 0 for name in names):
                raise RuntimeError("the undisturbed run failed")
            first, last = (records(self.run_dir(name)) for name in (names[0], names[-1]))
            difference, where = apart(first, last)
            if difference > TOLERANCE:
                raise RuntimeError(f"two undisturbed runs differ by {difference:g}: {where}")
        except Exception as error:
            into.set_exception(RuntimeError(f"nothing to compare with ({error})"))
            raise
        into.set_result(Reference(first, TOLERANCE if difference else 0.0))
        how = "the same command" + (" twice" if len(names) > 1 else "")
        message = f"two runs differ by {difference:g}" if difference else ""
        return Row(fault, how, len(names), into.result().untouched, message, True)

    def _check_going_on(self) -> None:
        if self.ended.is_set():
            raise RuntimeError("the faults were interrupted")

    def _output(self) -> Path:
        self.outputs.append(self.folder / "logs" / f"{self.name}-{len(self.outputs)}.txt")
        self.outputs[-1].touch()
        return self.outputs[-1]


def undisturbed(bench: Bench, times: int) -> Row:
    """On one rank; the first run on a GPU builds kernels."""

    def run(name: str) -> int:
        return bench.finish(bench.run_dir(name), limit=2 * LIMIT)

    return bench.undisturbed("none", "undisturbed", run, bench.single)


class Run:
    """The process of a run; what it prints goes to `output`."""

    def __init__(self, process: BaseProcess, reader: Connection, output: Path) -> None:
        self._process = process
        self._printing = threading.Thread(target=self._copy, args=(reader, output), daemon=True)
        self._printing.start()

    def going_on(self) -> bool:
        """Whether it has not ended."""
        with _processes:
            return self._process.is_alive()

    def kill(self, *, stack_traces: bool = False) -> None:
        """SIGKILL, after a word of where it stands."""
        if stack_traces:
            os.kill(self._process.pid, signal.SIGUSR2)  # type: ignore[arg-type]  # it was started
            time.sleep(1)
        self._process.kill()

    def end(self) -> None:
        """SIGKILL where it has not ended; nothing is left of it then, nor written by it."""
        if self.going_on():
            self.kill()
        self.status()

    def status(self) -> int:
        """The exit status once it has one, and all that it printed is there; negative: a signal."""
        while self.going_on():
            time.sleep(0.01)
        self._printing.join(5)  # a process that it has left behind may hold the pipe
        return self._process.exitcode  # type: ignore[return-value]  # it has ended

    @staticmethod
    def _copy(reader: Connection, output: Path) -> None:
        with open(output, "ab", buffering=0) as file:
            while block := os.read(reader.fileno(), 2**16):
                file.write(block)
        reader.close()


def _run(arguments: list[str], printed: Connection, inject: str) -> None:
    for number in (1, 2):
        os.dup2(printed.fileno(), number)
    printed.close()
    faulthandler.register(signal.SIGUSR2)
    import train

    exec(inject, {})
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


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or an allocator says."""
    timed = ("throughput/", "memory/", "time/")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


def apart(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest relative difference of two lists of records, and where it is; infinite where one lacks a value."""
    steps = [[record["step"] for record in each] for each in (found, expected)]
    if steps[0] != steps[1]:
        return float("inf"), f"steps {steps[0]}, not {steps[1]}"
    largest, where = 0.0, ""
    for one, other in zip(found, expected, strict=True):
        for key in one.keys() | other.keys():
            a, b = one.get(key), other.get(key)
            if a != b:
                difference = float("inf") if a is None or b is None else abs(a - b) / max(abs(a), abs(b))
                if difference > largest:
                    largest, where = difference, f"step {one['step']}, {key} {a}, not {b}"
    return largest, where


def last_step(run_dir: Path) -> int:
    """The last whole record of a run that was killed."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0
