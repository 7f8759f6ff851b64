"""Runs that end before their time: killed, told to stop, or refused because another one is at work."""

from __future__ import annotations

import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from scripts.fault_injection.bench import EVERY, MARKER, Bench, Row, last_step


def killed(bench: Bench, times: int) -> list[Row]:
    """SIGKILL while checkpoints are written beside training, and (half as often) while training waits for them."""
    beside = _killed(bench, times, "killed", asynchronous=True)
    return [beside, _killed(bench, max(2, times // 2), "killed, asynchronous=false", asynchronous=False)]


def _killed(bench: Bench, times: int, fault: str, *, asynchronous: bool) -> Row:
    """At random moments, and each third time inside a save: when a folder without a marker is there."""
    chance, lost, inside = random.Random(0), [], 0
    name = bench.run_dir(fault.replace(", ", "-").replace("=", "-"))
    setting = f"checkpoint.asynchronous={str(asynchronous).lower()}"
    for number in range(times):
        process = bench.start(name, setting)
        begun, wait = time.monotonic(), chance.uniform(0.2, 2.5)
        before = last_step(name)
        while process.is_alive():
            unmarked = _being_written(name)
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
    status, message = bench.finish(name, setting), bench.said(r"continuing [^\n]*")
    # A write may last until the next one is due: two intervals at most.
    bound = 2 * EVERY if asynchronous else EVERY
    passed = status == 0 and bench.same(name) and max(lost, default=0) <= bound
    how = f"SIGKILL, {inside} of them inside a save"
    return Row(fault, how, times, f"at most {max(lost, default=0)} steps, no bit of any record", message, passed)


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
