"""Faults in runs on two ranks: one dies, stands still or fails; the others stop soon, name it, and the run goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_training import ROOT, arguments, launch, records

WATCHED = ("training.hang_seconds=4", "training.steps=2000", "checkpoint.every=20", "evaluation.every=0")


def start(ranks, shards, run_dir, *overrides, inject="", launcher=()):
    """A run in the background; `inject` is Python that every rank runs first."""
    folder = Path(shards).parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    script = Path(run_dir).with_suffix(".py")
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport os, signal, time, train\n{inject}\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *launcher]
    return subprocess.Popen(
        [*command, str(script), *arguments(shards, run_dir), *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def at_step(step, rank, action):
    """Code that does `action` on a rank once it comes to the batch of a step, in the first attempt."""
    return f"""
from data.loader import BatchLoader
original = BatchLoader.batch
def batch(self, position):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and os.environ["RANK"] == "{rank}" and position == {4 * step}:
        {action}
    return original(self, position)
BatchLoader.batch = batch
"""


def ended(process, timeout=120):
    begin = time.monotonic()
    out, err = process.communicate(timeout=timeout)
    return out, err, time.monotonic() - begin


@pytest.mark.slow
def test_a_killed_rank_is_named_and_torchrun_starts_the_run_again(shards, tmp_path):
    kill = at_step(25, 1, "os.kill(os.getpid(), signal.SIGKILL)")
    overrides = ("training.steps=30", "checkpoint.every=10", "evaluation.every=0")
    process = start(2, shards, tmp_path / "run", *overrides, inject=kill, launcher=["--max-restarts", "1"])
    out, err, _ = ended(process)
    assert process.returncode == 0, err
    assert re.search(r"error: rank 1 \(process \d+ on .*\) is gone: it was killed, or it crashed", err)
    assert "continuing" in out
    launch(2, shards, tmp_path / "whole", *overrides)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("time.sleep(1000)", r"all ranks wait for rank 1 \(process \d+ on .*\) \(after step 25\)"),
        (
            "raise OSError('the disk is gone')",
            r"rank 1 \(process \d+ on .*\) ended: .* \(the disk is gone\)",
        ),
    ],
    ids=["sleeps", "fails"],
)
def test_a_rank_that_stands_still_or_fails_is_named_in_seconds_with_stack_traces(action, words, shards, tmp_path):
    process = start(2, shards, tmp_path / "run", *WATCHED, inject=at_step(25, 1, action))
    try:
        _, err, seconds = ended(process)
    finally:
        process.kill()
    assert process.returncode != 0
    assert re.search(words, err), err
    assert seconds < 90
    traces = (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()
    assert re.search(words, traces)
    assert "trainer.py" in traces
    if "sleep" in action:
        assert "batch" in (tmp_path / "run" / "stacks" / "rank-1.txt").read_text()


@pytest.mark.slow
def test_all_ranks_stop_at_one_step_after_a_signal_to_one_of_them(shards, tmp_path):
    signalled = at_step(7, 1, "os.kill(os.getpid(), signal.SIGUSR1)")
    process = start(2, shards, tmp_path / "run", *WATCHED, inject=signalled)
    out, err, _ = ended(process)
    assert "SIGUSR1 came: stopping after step 7" in out, err
    assert (tmp_path / "run" / "checkpoints" / "step-7" / "checkpoint.json").exists()
    assert f"exitcode  : {128 + signal.SIGUSR1}" in err.partition("Root Cause")[2]


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_write_is_named_too(shards, tmp_path):
    hang = """
from training.storage import ChecksummedWriter
write = ChecksummedWriter.write_data
def write_data(self, *arguments):
    time.sleep(1000 if os.environ["RANK"] == "1" else 0)
    return write(self, *arguments)
ChecksummedWriter.write_data = write_data
"""
    process = start(2, shards, tmp_path / "run", *WATCHED, "training.stop_at=3", inject=hang)
    try:
        _, err, _ = ended(process)
    finally:
        process.kill()
    place = "after the begin of the wait for the checkpoint of step 3"
    assert re.search(rf"all ranks wait for rank 1 \(process \d+ on .*\) \({place}\)", err), err
    assert "write_data" in (tmp_path / "run" / "stacks" / "rank-1.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_in_the_load_is_named_too(shards, tmp_path):
    overrides = (*WATCHED, "checkpoint.every=2")
    done = launch(1, shards, tmp_path / "run", *overrides, "training.stop_at=2")
    assert done.returncode == 0, done.stderr
    hang = """
from torch.distributed.checkpoint import FileSystemReader
read = FileSystemReader.read_data
def read_data(self, *arguments):
    time.sleep(1000 if os.environ["RANK"] == "1" else 0)
    return read(self, *arguments)
FileSystemReader.read_data = read_data
"""
    process = start(2, shards, tmp_path / "run", *overrides, inject=hang)
    try:
        _, err, seconds = ended(process)
    finally:
        process.kill()
    assert re.search(r"all ranks wait for rank 1 \(process \d+ on .*\) \(after the model\)", err), err
    assert seconds < 90
    assert "read_data" in (tmp_path / "run" / "stacks" / "rank-1.txt").read_text()


@pytest.mark.slow
def test_an_error_of_one_rank_in_a_save_is_a_failure_of_that_save_on_all(shards, tmp_path):
    inject = """
import training.saver
original = training.saver.first_difference
def difference(folder, checksums, **options):
    if os.environ["RANK"] == "1" and folder.name == "step-10":
        raise ValueError("no such thing")
    return original(folder, checksums, **options)
training.saver.first_difference = difference
"""
    process = start(2, shards, tmp_path / "run", "checkpoint.every=100", "checkpoint.permanent_every=10", inject=inject)
    out, err, _ = ended(process)
    assert process.returncode == 0, err
    assert "step-10 could not be saved (ValueError: no such thing)" in out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-20"]


@pytest.mark.slow
def test_while_one_rank_writes_slowly_no_rank_makes_a_step_that_a_kill_could_lose_beyond_the_interval(shards, tmp_path):
    """Before each step, on each rank: steps done - step of the newest whole checkpoint <= checkpoint.every - 1."""
    inject = """
from pathlib import Path
from data.loader import BatchLoader
from training import saver
from training.checkpoint import find_checkpoints
original, write = BatchLoader.batch, saver.ChecksummedWriter.write_data
saver.LONG_WAIT_SECONDS = 0.2
def batch(self, position):
    whole = [int(path.name.removeprefix("step-")) for path in find_checkpoints(Path(RUN_DIR))]
    print(f"lost: {position // 4 - max(whole, default=0)}", flush=True)
    return original(self, position)
def write_data(self, *arguments):
    time.sleep(1.5 * (os.environ["RANK"] == "1"))
    return write(self, *arguments)
BatchLoader.batch, saver.ChecksummedWriter.write_data = batch, write_data
""".replace("RUN_DIR", repr(str(tmp_path / "run")))
    overrides = ("training.steps=25", "checkpoint.every=10", "evaluation.every=0")
    process = start(2, shards, tmp_path / "run", *overrides, inject=inject)
    out, err, _ = ended(process)
    assert process.returncode == 0, err
    lost = [int(steps) for steps in re.findall(r"lost: (\d+)", out)]
    assert len(lost) >= 2 * 25
    assert max(lost) == 10 - 1
    assert re.search(r"training waited [\d.]+ s for \S+step-9 to be written: checkpoint.every=10 allows no more", out)


@pytest.mark.slow
def test_an_error_of_one_rank_right_after_a_save_leaves_the_checkpoint(shards, tmp_path):
    inject = """
from training.host_copy import HostCopy
HostCopy.finish = lambda self: time.sleep(2)
""" + at_step(20, 1, "raise OSError('the disk is gone')")
    overrides = (*WATCHED, "checkpoint.every=100", "checkpoint.permanent_every=20")  # no step waits for a write
    process = start(2, shards, tmp_path / "run", *overrides, inject=inject)
    _, err, _ = ended(process)
    assert re.search(r"error: rank 1 \(process \d+ on .*\) ended: .* \(the disk is gone\)", err), err
    assert (tmp_path / "run" / "checkpoints" / "step-20" / "checkpoint.json").exists()
