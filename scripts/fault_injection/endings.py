"""Runs that end before their time: killed, told to stop, or refused because another one is at work."""

from __future__ import annotations

import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from scripts.fault_injection.bench import EVERY, MARKER, Bench, Row, last_step

APART = 20  # steps between checkpoints that are written beside training, so that a write spans some of them
SLOW_WRITE = """
from training.storage import ChecksummedWriter
_write_data = ChecksummedWriter.write_data
def write_data(self, *arguments):
    written = _write_data(self, *arguments)
    time.sleep(0.3)
    return written
ChecksummedWriter.write_data = write_data
"""


def killed(bench: Bench, times: int) -> Row:
    """SIGKILL while checkpoints are written beside training."""
    return _killed(bench, times, "killed", APART, "checkpoint.asynchronous=true", f"checkpoint.every={APART}")


def killed_waiting(bench: Bench, times: int) -> Row:
    """SIGKILL, half as often, where training waits for checkpoints."""
    return _killed(bench, max(2, times // 2), "killed, asynchronous=false", EVERY, "checkpoint.asynchronous=false")


def _killed(bench: Bench, times: int, fault: str, every: int, *settings: str) -> Row:
    """At random moments, and each third time inside a save that lasts: when a folder without a marker is there.

    Lost are at most `every` steps: those on record after the newest checkpoint with a marker.
    """
    chance, lost, inside = random.Random(0), list[int](), 0
    name = bench.run_dir(fault.replace(", ", "-").replace("=", "-"))
    for number in range(2 * times):  # some come too late
        if len(lost) == times:
            break
        in_save = number % 3 == 0
        run = bench.start(name, *settings, inject=SLOW_WRITE if in_save else "")
        before = last_step(name)
        further = before + chance.randint(1, 20)
        while run.going_on():
            reached = last_step(name)
            if (reached > before and _being_written(name)) if in_save else reached >= further:
                time.sleep(chance.uniform(0, 0.3 if in_save else 0.1))  # some steps, or a part of one
                break
        unmarked = _being_written(name)
        run.kill()
        if run.status() == 0:  # it came to its end before: begin again
            shutil.rmtree(name)
            continue
        inside += bool(unmarked)
        reached = last_step(name)
        lost.append(reached - newest_step(name))
    status, message = bench.finish(name, *settings), bench.said(r"continuing [^\n]*")
    passed = status == 0 and bench.same(name) and len(lost) == times and max(lost) <= every
    how = f"SIGKILL, {inside} of them inside a save, a checkpoint every {every} steps"
    untouched = bench.single.result().untouched
    return Row(fault, how, len(lost), f"at most {max(lost, default=0)} steps, {untouched}", message, passed)


def newest_step(run_dir: Path) -> int:
    """Of its checkpoints with a marker, 0 for none."""
    whole = [int(path.parent.name.partition("-")[2]) for path in run_dir.glob(f"checkpoints/step-*/{MARKER}")]
    return max(whole, default=0)


def _being_written(run_dir: Path) -> list[Path]:
    """Checkpoints with files and without a marker."""
    found = []
    for path in run_dir.glob("checkpoints/step-*"):
        with suppress(FileNotFoundError):  # it has just been deleted
            if any(path.iterdir()) and not (path / MARKER).exists():
                found.append(path)
    return found


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
_evaluations = iter((0, 20, 40, 60))
def batches(self, dataset):
    step = next(_evaluations)
    for index, batch in enumerate(_batches(self, dataset)):
        if index == 1 and step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
PerplexityEvaluator._batches = batches
"""
    status = bench.finish(run_dir, inject=stop)
    passed = status == 143 and last_step(run_dir) == 19 and bench.finish(run_dir) == 0 and bench.same(run_dir)
    rows.append(Row("SIGTERM in an evaluation", "os.kill in its second batch", 1, "nothing", "", passed))
    run_dir = bench.run_dir("twice")
    twice = (
        "_inject(13, lambda: (os.kill(os.getpid(), 15), time.sleep(1.5), os.kill(os.getpid(), 15), time.sleep(1000)))"
    )
    status = bench.finish(run_dir, inject=twice)
    message = bench.said(r"SIGTERM came again[^\n]*")
    passed = status == 143 and bench.finish(run_dir) == 0 and bench.same(run_dir)
    rows.append(Row("SIGTERM twice", "os.kill, 1.5 s apart", 1, f"at most {EVERY} steps", message, passed))
    return rows


def second(bench: Bench, times: int) -> Row:
    """A second process in the run directory of one that is killed later."""
    run_dir = bench.run_dir("second")
    first = bench.start(run_dir, inject="_inject(10, lambda: time.sleep(1000))")
    while last_step(run_dir) < 10 and first.going_on():
        time.sleep(0.01)
    status = bench.finish(run_dir)
    message = bench.said(r"error: [^\n]*")
    first.kill()
    first.status()
    passed = status == 2 and bench.finish(run_dir) == 0 and bench.same(run_dir)
    return Row("second process", "the same command, then SIGKILL of the first", 1, "nothing", message, passed)
