"""Injects faults into real runs and prints what each cost: `python scripts/fault_test.py` (minutes), `--short` (one).

In: nothing; a corpus of counting documents and a two-layer model are made in a temporary folder, on the CPU in fp32.
Out: a table, a row a fault: how it was injected, how often, what was lost, what was said. Exit status 1 when a run did
not come to the end, or when its records differ in a bit from those of an undisturbed run. `--only WORD` takes the
faults whose name has the word; `--json FILE` writes the rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from data.shards import ShardWriter

MARKER = "checkpoint.json"
EVERY = 5  # steps between checkpoints
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
# Python that a run executes first. `at(step)` is true once, before the batch of that step is read.
INJECT = """
import os, signal, time
import torch
from data.loader import BatchLoader
_batch = BatchLoader.batch
def _inject(step, action, rank="0"):
    def batch(self, position):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and os.environ.get("RANK", "0") == rank and position == 4 * step:
            action()
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
        process.join(120)
        if process.is_alive():
            process.kill()
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


# Faults --------------------------------------------------------------------------------------------------------------


def killed(bench: Bench, times: int) -> Row:
    """SIGKILL at random moments, and each third time inside a save: when a folder without a marker is there."""
    chance, lost, inside = random.Random(0), [], 0
    name = bench.run_dir("killed")
    for number in range(times):
        process = bench.start(name)
        begun, wait = time.monotonic(), chance.uniform(0.2, 2.5)
        before = last_step(name)
        while process.is_alive():
            unmarked = [p for p in name.glob("checkpoints/step-*") if not (p / MARKER).exists() and any(p.iterdir())]
            if (number % 3 == 0 and unmarked and last_step(name) > before) or (
                number % 3 and last_step(name) > before and time.monotonic() - begun > wait
            ):
                inside += bool(unmarked)
                process.kill()
                break
        process.join()
        if process.exitcode == 0:  # it came to its end before: begin again
            shutil.rmtree(name)
            continue
        reached = last_step(name)
        whole = [int(p.parent.name.partition("-")[2]) for p in name.glob(f"checkpoints/step-*/{MARKER}")]
        lost.append(reached - max(whole, default=0))
    status = bench.finish(name)
    # A save may still be under way when the next one is due: two intervals at most.
    passed = status == 0 and bench.same(name) and max(lost, default=0) <= 2 * EVERY
    how = f"SIGKILL, {inside} of them inside a save"
    return Row("killed", how, times, f"at most {max(lost, default=0)} steps, no bit of any record", "", passed)


def signals(bench: Bench, times: int) -> list[Row]:
    """The three signals that ask for a stop; then SIGTERM twice."""
    rows = []
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        run_dir = bench.run_dir(name)
        status = bench.finish(run_dir, inject=f"_inject(13, lambda: os.kill(os.getpid(), signal.{name}))")
        message, saved = bench.said(r"SIG\w+ came[^\n]*"), (run_dir / "checkpoints/step-13" / MARKER).exists()
        passed = status == 128 + getattr(signal, name) and saved and bench.finish(run_dir) == 0 and bench.same(run_dir)
        rows.append(Row(name, "os.kill before step 14", 1, f"nothing; exit status {status}", message, passed))
    run_dir = bench.run_dir("evaluation")
    stop = """
from eval.perplexity import PerplexityEvaluator
_batches = PerplexityEvaluator._batches
def batches(self, dataset):
    for index, batch in enumerate(_batches(self, dataset)):
        if index == 1 and os.path.exists(marker):
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
PerplexityEvaluator._batches = batches
""".replace("marker", repr(str(run_dir / "checkpoints" / "step-15" / MARKER)))
    status = bench.finish(run_dir, inject=stop)
    passed = status == 143 and last_step(run_dir) == 19 and bench.finish(run_dir) == 0 and bench.same(run_dir)
    rows.append(Row("SIGTERM in an evaluation", "os.kill in its second batch", 1, "nothing", "", passed))
    run_dir = bench.run_dir("twice")
    twice = "_inject(13, lambda: (os.kill(os.getpid(), 15), time.sleep(1.5), os.kill(os.getpid(), 15), time.sleep(60)))"
    begun = time.monotonic()
    status = bench.finish(run_dir, inject=twice)
    message = bench.said(r"SIGTERM came again[^\n]*")
    soon = time.monotonic() - begun < 30
    passed = status == 143 and soon and bench.finish(run_dir) == 0 and bench.same(run_dir)
    rows.append(Row("SIGTERM twice", "os.kill, 1.5 s apart", 1, f"at most {EVERY} steps", message, passed))
    return rows


def damaged(bench: Bench, times: int) -> list[Row]:
    """The newest checkpoint of a run that is half done, damaged in four ways."""
    base = bench.run_dir("half")
    bench.finish(base, f"training.stop_at={STEPS // 2}")

    def flip(path: Path) -> None:
        file = max(path.glob("*.distcp"), key=os.path.getsize)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    ways: list[tuple[str, Callable[[Path], object]]] = [
        ("flipped bit", flip),
        ("truncated file", lambda path: os.truncate(next(path.glob("*.distcp")), 100)),
        ("missing shard", lambda path: next(path.glob("*.distcp")).unlink()),
        ("missing marker", lambda path: (path / MARKER).unlink()),
    ]
    rows = []
    for name, damage in ways:
        run_dir = bench.run_dir(name.replace(" ", "-"))
        shutil.copytree(base, run_dir)
        damage(run_dir / "checkpoints" / f"step-{STEPS // 2}")
        passed = bench.finish(run_dir) == 0 and bench.same(run_dir)
        message = bench.said(r"warning: [^\n]*") or bench.said(r"continuing [^\n]*")
        rows.append(Row(f"checkpoint: {name}", "in the newest one", 1, f"{EVERY} steps, made again", message, passed))
    return rows


def disk(bench: Bench, times: int) -> list[Row]:
    """Files may not grow beyond 20 kB during one save; the folder of checkpoints is no folder."""
    run_dir = bench.run_dir("full")
    limit = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
def free(): resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def batch(self, position):
    if position == 4 * 8: full()
    if position == 4 * 12: free()
    return _batch(self, position)
BatchLoader.batch = batch
"""
    passed = bench.finish(run_dir, inject=limit) == 0 and bench.same(run_dir)
    message = bench.said(r"warning: [^\n]*could not be saved[^\n]*")
    rows = [
        Row("disk full in a save", "RLIMIT_FSIZE", 1, "nothing; one checkpoint less", message, passed and message != "")
    ]
    run_dir = bench.run_dir("unwritable")
    block = "_inject(8, lambda: (os.rename(folder, folder + '.aside'), open(folder, 'w').close()))".replace(
        "folder", repr(str(run_dir / "checkpoints"))
    )
    status = bench.finish(run_dir, inject=block)
    message = bench.said(r"error: [^\n]*")
    (run_dir / "checkpoints").unlink()
    (run_dir / "checkpoints.aside").rename(run_dir / "checkpoints")
    passed = status == 1 and bench.finish(run_dir) == 0 and bench.same(run_dir)
    rows.append(
        Row("checkpoints not writable", "a file in place of the folder", 1, "trains to the end", message, passed)
    )
    return rows


def numbers(bench: Bench, times: int) -> list[Row]:
    """Gradients that are no number: once, and for good."""
    poison = """
_clip = torch.nn.utils.clip_grad_norm_
calls = iter(range(1, 10**6))
def clip(parameters, limit):
    parameters = list(parameters)
    if next(calls) in STEPS:
        for p in parameters: p.grad.mul_(float("nan"))
    return _clip(parameters, limit)
torch.nn.utils.clip_grad_norm_ = clip
"""
    run_dir = bench.run_dir("nan")
    status = bench.finish(run_dir, inject=poison.replace("STEPS", "{13}"))
    found = records(run_dir)
    finite = all(r.get("train/loss") is not None for r in found[1:]) and found[-1]["train/skipped_steps"] == 1
    rows = [Row("NaN in the gradient", "at step 13", 1, "one step", "train/skipped_steps = 1", status == 0 and finite)]
    run_dir = bench.run_dir("nan-for-good")
    status = bench.finish(run_dir, "training.skip_limit=4", inject=poison.replace("STEPS", "range(13, 999)"))
    message = bench.said(r"error: the run diverged[^)]*\)")
    passed = status == 1 and bench.finish(run_dir, "training.skip_limit=4") == 0 and bench.same(run_dir)
    rows.append(Row("NaN from a step on", "from step 13, limit 4", 1, "steps from 11 on, made again", message, passed))
    return rows


def second(bench: Bench, times: int) -> Row:
    """A second process in the run directory of one that is killed later."""
    run_dir = bench.run_dir("second")
    first = bench.start(run_dir, inject="_inject(10, lambda: time.sleep(20))")
    while last_step(run_dir) < 10 and first.is_alive():
        time.sleep(0.01)
    status = bench.finish(run_dir)
    message = bench.said(r"error: [^\n]*")
    first.kill()
    first.join()
    passed = status == 2 and bench.finish(run_dir) == 0 and bench.same(run_dir)
    return Row("second process", "the same command, then SIGKILL of the first", 1, "nothing", message, passed)


def ranks(bench: Bench, times: int) -> list[Row]:
    """One of two ranks is killed, sleeps, stands still, or raises; torchrun starts both again."""
    actions = {
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "sleeps": "time.sleep(1000)",
        "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
        "raises": "(_ for _ in ()).throw(OSError('the disk is gone'))",
    }
    rows = []
    for name, action in [("", ""), *actions.items()]:
        run_dir, script = bench.run_dir(f"rank-{name}"), bench.folder / f"rank-{name}.py"
        inject = f"_inject(23, lambda: {action}, rank='1')" if action else ""
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n{INJECT}\n{inject}\n"
            "sys.exit(train.main(sys.argv[1:]))\n"
        )
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
        command = [sys.executable, *launcher, str(script), *SETTINGS, f"data.path={bench.folder / 'shards'}"]
        begun = time.monotonic()
        done = subprocess.run(
            [*command, f"run.dir={run_dir}", "training.hang_seconds=5"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if not name:
            expected = records(run_dir)
            continue
        found = re.search(r"error: ([^\n]*?);", done.stderr)
        passed = done.returncode == 0 and records(run_dir) == expected and found is not None
        how = f"before step 24, {time.monotonic() - begun:.0f} s with the restart"
        rows.append(Row(f"rank 1 {name}", how, 1, "3 steps, made again", found[1] if found else "", passed))
    return rows


FAULTS: dict[str, Callable[[Bench, int], Row | list[Row]]] = {
    "killed": killed,
    "signals": signals,
    "damaged": damaged,
    "disk": disk,
    "numbers": numbers,
    "second": second,
    "ranks": ranks,
}
SHORT = ("killed", "damaged", "disk", "numbers")


def main(arguments: list[str] | None = None) -> int:
    """Inject all faults, or those that were asked for. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Inject faults into small runs and print what each cost.")
    parser.add_argument("--short", action="store_true", help="the faults of one process, few times")
    parser.add_argument("--only", default="", help="faults whose name has this word: " + ", ".join(FAULTS))
    parser.add_argument("--kills", type=int, help="random kills (default: 20, or 3 with --short)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    times = options.kills or (3 if options.short else 20)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name, fault in FAULTS.items():
            if options.only not in name or (options.short and name not in SHORT):
                continue
            found = fault(bench, times)
            rows += found if isinstance(found, list) else [found]
            print(f"{name}: {'done' if all(row.passed for row in rows) else 'FAILED'}", file=sys.stderr, flush=True)
    print("| fault | how injected | times | lost | message | |\n|---|---|---|---|---|---|")
    for row in rows:
        verdict = "as it should" if row.passed else "**FAILED**"
        print(f"| {row.fault} | {row.injected} | {row.times} | {row.lost} | {row.message} | {verdict} |")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return int(not rows or not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
