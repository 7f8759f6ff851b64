"""One of two ranks is lost, under torchrun; on GPUs each has its own, and the ranks wait for each other in NCCL."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial

from scripts.fault_injection.bench import LIMIT, Bench, Row, last_step
from scripts.fault_injection.endings import newest_step
from scripts.training_benchmark.process import kill

APART = 10  # steps between checkpoints that are written beside training
STEPS = "training.steps=30"
BESIDE = ("checkpoint.every=100", "checkpoint.permanent_every=10")  # training waits for none of these writes
LOAD = """
from torch.distributed.checkpoint import FileSystemReader
_read = FileSystemReader.read_data
def read_data(self, *arguments):
    if _here("1"):
        time.sleep(1000)
    return _read(self, *arguments)
FileSystemReader.read_data = read_data
"""
AGAIN = """
def batch(self, position):
    if os.environ["RANK"] == "1" and position == 4 * 23:
        raise RuntimeError("as always")
    return _batch(self, position)
BatchLoader.batch = batch
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
SLEEP = "time.sleep(1000)"
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
RAISE = "(_ for _ in ()).throw(OSError('the disk is gone'))"


def undisturbed(bench: Bench, times: int) -> Row:
    """What the other rows are compared with."""
    fault = "none, two ranks"
    if skipped := _too_few_gpus(bench):
        return Row(fault, "the same command", 0, "", "", False, skipped)
    name = "rank-undisturbed"
    return bench.undisturbed(fault, name, lambda name: bench.launch(name, "", STEPS), bench.pair)


def _lost(fault: str, reached: int, inject: str, bench: Bench, times: int) -> Row:
    """The others end soon and name rank 1; torchrun starts all again, and the records are the undisturbed ones.

    `reached`: steps done before. Those of step 20 are saved: training has waited for that, or an error does.
    """
    where = f"after step {reached}"
    if skipped := _too_few_gpus(bench):
        return Row(f"rank 1 {fault}", where, 0, "", "", False, skipped)
    run_dir = bench.run_dir(f"rank-{fault.replace(' ', '-')}")
    if inject == LOAD:
        bench.launch(run_dir.name, "", STEPS, "training.stop_at=20")
    begun = time.monotonic()
    status = bench.launch(run_dir.name, inject, STEPS, *(BESIDE if "after a save" in fault else ()))
    # Inside a step nothing tells a rank that sleeps from one that waits for it on a CPU; their stack traces do.
    named = "(rank 1|on all ranks)" if "in a step" in fault and bench.device == "cpu" else "rank 1"
    message = bench.said(rf"(?<=error: )[^;\n]*{named}[^;\n]*")
    how = f"{where}, {time.monotonic() - begun:.0f} s with the restart"
    lost = reached - int(bench.said(r"(?<=at step )\d+") or 0)  # as the second start says
    traces = {file.name for file in run_dir.glob("stacks/*")}  # of all that could still write them
    traced = traces == {"rank-0.txt", "rank-1.txt"} if "sleeps" in fault else "rank-0.txt" in traces
    bench.note(f"exit status {status}, {lost} steps lost, stack traces {sorted(traces)}")
    passed = status == 0 and message != "" and traced and lost <= reached - 20
    passed = passed and bench.same(run_dir, bench.pair.result())
    return Row(f"rank 1 {fault}", how, 1, f"{lost} steps, made again" if lost else "nothing", message, passed)


def _again(bench: Bench, times: int) -> Row:
    """A launch that fails at the same step again and again ends."""
    fault, how = "rank 1 raises, always", "before step 24"
    if skipped := _too_few_gpus(bench):
        return Row(fault, how, 0, "", "", False, skipped)
    status = bench.launch("rank-again", AGAIN, STEPS, restarts=4)
    message = bench.said(r"3 starts in a row[^\n:]*")
    return Row(fault, how, 1, "3 steps, to be made again", message, status == 1 and message != "")


def _all_killed(bench: Bench, times: int) -> Row:
    """SIGKILL of both ranks and their launcher at random moments, a quarter as often as of a single process."""
    fault = "both ranks killed"
    if skipped := _too_few_gpus(bench):
        return Row(fault, "SIGKILL", 0, "", "", False, skipped)
    chance, lost, times = random.Random(0), list[int](), max(2, times // 4)
    settings = (STEPS, "checkpoint.asynchronous=true", f"checkpoint.every={APART}")
    run_dir = bench.run_dir("ranks-killed")
    for _ in range(2 * times):  # some come too late
        if len(lost) == times:
            break
        before = last_step(run_dir)
        process = bench.start_ranks(run_dir.name, "", *settings, restarts=0)
        further = before + chance.randint(1, 5)
        end = time.monotonic() + LIMIT
        while process.poll() is None and last_step(run_dir) < further and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))  # a part of a step
        if process.poll() is not None:  # it came to its end before: begin again
            shutil.rmtree(run_dir, ignore_errors=True)
            continue
        kill(process)
        lost.append(last_step(run_dir) - newest_step(run_dir))
    status, message = bench.launch(run_dir.name, "", *settings), bench.said(r"continuing [^\n]*")
    most = max(lost, default=0)
    passed = status == 0 and bench.same(run_dir, bench.pair.result()) and len(lost) == times and most <= APART
    how = f"SIGKILL of both and of torchrun, a checkpoint every {APART} steps"
    untouched = bench.pair.result().untouched
    return Row(fault, how, len(lost), f"at most {most} steps, {untouched}", message, passed)


def _too_few_gpus(bench: Bench) -> str:
    few = bench.device == "cuda" and bench.gpus < 2
    return f"it needs two GPUs, and there is {bench.gpus}" if few else ""


RANKS: dict[str, Callable[[Bench, int], Row]] = {
    "ranks-undisturbed": undisturbed,
    "ranks-again": _again,
    "ranks-all-killed": _all_killed,
    "ranks-load": partial(_lost, "sleeps in the load", 20, LOAD),
}
for _fault, _action, _step in (
    ("stopped", STOP, 23),
    ("sleeps", SLEEP, 23),
    ("killed", KILL, 23),
    ("raises", RAISE, 23),
    ("raises after a save", RAISE, 20),
):
    _inject = f"_inject({_step}, lambda: {_action}, rank='1')"
    RANKS[f"ranks-{_fault.replace(' ', '-')}"] = partial(_lost, _fault, _step, _inject)
for _fault, _action in (("sleeps in a step", SLEEP), ("killed in a step", KILL)):
    _inject = f"_inject_in(24, lambda: {_action}, rank='1')"
    RANKS[f"ranks-{_fault.replace(' ', '-')}"] = partial(_lost, _fault, 23, _inject)
