"""scripts/fault_test.py: faults in whole runs of their own; the long form is for a person's eyes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from scripts import fault_test
from scripts.fault_injection import bench as bench_module
from scripts.fault_injection import ranks, steps
from scripts.fault_injection.bench import Bench, Reference, Row
from training.compose import plan


@pytest.mark.slow
def test_random_kills_a_full_disk_and_a_device_without_memory_lose_no_bit(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    arguments = ["--only", "killed,disk,memory", "--short", "--kills", "2", "--json", str(rows)]
    assert fault_test.main(arguments) == 0, capsys.readouterr().out
    found = json.loads(rows.read_text())
    assert [row["fault"] for row in found[:3]] == ["none", "killed", "killed, asynchronous=false"]
    assert len(found) == 7
    assert all(row["passed"] for row in found)


# A shell's background jobs ignore Ctrl-C, and what they start does too: what is tested is what comes of it elsewhere.
INTERRUPTED = """
import signal
from scripts import console, fault_test

signal.signal(signal.SIGINT, signal.default_int_handler)
console.run(fault_test.main)
"""


def started_with(folder):
    """Processes whose temporary folder this is."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"TMPDIR={folder}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


@pytest.fixture
def short_folder():
    """The system allows sockets, of which the runs have some there, no more than 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
def test_ctrl_c_ends_all_runs_and_leaves_no_file(tmp_path, short_folder):
    def wait_for(what):
        end = time.monotonic() + 240
        while not what():
            assert time.monotonic() < end
            time.sleep(0.05)

    command = [sys.executable, "-c", INTERRUPTED, "--only", "killed-waiting,crafted", "--short", "--jobs", "2"]
    temporary, cache = short_folder, tmp_path / "cache"  # PyTorch's cache is kept, wherever it lies
    environment = os.environ | {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for(lambda: process.poll() is not None or list(temporary.glob("*/*/metrics.jsonl")))  # of any run
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert said.splitlines()[-1:] == [b"interrupted"]
    assert b"Traceback" not in said
    assert b"killed-waiting:" not in said, "the fault is not waited for, nor called failed"
    assert process.returncode == 130
    wait_for(lambda: not started_with(temporary))
    assert list(temporary.iterdir()) == []


def test_a_fault_that_nobody_knows_is_no_success(capsys):
    with pytest.raises(SystemExit) as ended:
        fault_test.main(["--only", "earthquake"])
    assert ended.value.code == 2
    assert "--only earthquake names no fault" in capsys.readouterr().err


def test_without_a_gpu_the_option_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(fault_test, "visible_gpus", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        fault_test.main(["--device", "cuda"])
    assert ended.value.code == 2
    assert "no CUDA device is visible" in capsys.readouterr().err


def test_faults_of_ranks_come_with_what_they_are_compared_with():
    assert fault_test.chosen("ranks-killed,disk", short=False) == [
        "ranks-undisturbed",
        "ranks-killed",
        "ranks-killed-in-a-step",
        "disk",
    ]
    assert fault_test.chosen("", short=True) == list(fault_test.SHORT)


@pytest.fixture
def on_gpus(tmp_path):
    return partial(Bench, tmp_path, "cuda")


def test_runs_on_gpus_are_valid_and_comparable_bit_for_bit(on_gpus, tmp_path):
    bench = on_gpus(gpus=2)
    command = bench.launch_command(tmp_path / "run.py", tmp_path / "run", "training.steps=30", restarts=1)
    overrides = command[command.index(str(tmp_path / "run.py")) + 1 :]
    (job,) = plan(overrides).jobs
    job.config.validate(2)
    assert (job.config.training.device, job.config.training.precision) == ("cuda", "fp32")
    assert job.config.parallel.compile is False
    assert job.config.training.hang_seconds == 30
    assert job.config.training.steps == 30
    assert job.config.model.head_dim % 16 == 0, "else the kernels do not take it"
    assert command[4:6] == ["--nproc-per-node", "2"]
    assert "use_deterministic_algorithms" in bench.inject


def test_with_one_gpu_faults_of_two_ranks_are_skipped_and_say_so(on_gpus, monkeypatch):
    monkeypatch.setattr(Bench, "launch", lambda *arguments, **options: pytest.fail("nothing is started"))
    bench = on_gpus(gpus=1)
    rows = [fault(bench.of(name), 1) for name, fault in ranks.RANKS.items()]
    assert all("**skipped**: it needs two GPUs, and there is 1" in fault_test.line(row) for row in rows)


def test_a_gpu_is_asked_for_more_memory_than_it_has(on_gpus, monkeypatch):
    injected = []
    bench = on_gpus(gpus=1).of("memory")
    bench.single.set_result(Reference([]))
    monkeypatch.setattr(Bench, "finish", lambda self, run_dir, *overrides, inject="": injected.append(inject) or 1)
    monkeypatch.setattr(Bench, "said", lambda self, pattern: "")
    row = steps.memory(bench, 1)
    assert not row.passed, "a run that says nothing has not failed as it should"
    assert "device='cuda'" in injected[0]
    assert "SimpleNamespace" not in injected[0]


def test_records_are_compared_bit_for_bit_where_two_undisturbed_runs_are_equal(on_gpus, monkeypatch):
    lines = {"a": [2.0], "a-again": [2.0], "b": [2.0], "b-again": [2.0001], "c": [2.0], "c-again": [3.0]}
    recorded = {name: [{"step": 1, "train/loss": loss} for loss in losses] for name, losses in lines.items()}
    monkeypatch.setattr(bench_module, "records", lambda run_dir: recorded[run_dir.name])
    bench = on_gpus(gpus=2).of("test")
    for name, tolerance, words in (("a", 0.0, "no bit of any record"), ("b", 1e-3, "no record by more than 0.001")):
        into = bench_module.Future()
        row = bench.undisturbed("none", name, lambda name: 0, into)
        assert (into.result().tolerance, row.lost, row.times) == (tolerance, words, 2)
    with pytest.raises(RuntimeError, match=r"differ by 0\.33.*: step 1, train/loss 2\.0, not 3\.0"):
        bench.undisturbed("none", "c", lambda name: 0, bench.single)
    assert bench.same(bench.run_dir("b-again"), into.result())
    assert not bench.same(bench.run_dir("b-again"), Reference(recorded["b"]))
    assert "step 1, train/loss" in bench.log()


def test_a_fault_that_cannot_be_injected_is_a_row_with_its_log(on_gpus, monkeypatch, tmp_path, capsys):
    def breaks(bench, times):
        bench.note("what the run said")
        raise OSError("no such thing")

    monkeypatch.setitem(fault_test.FAULTS, "disk", breaks)
    (row,) = fault_test.attempt("disk", on_gpus(gpus=1).of("disk"), 1, tmp_path / "kept")
    assert row == Row("disk", "", 0, "", "OSError: no such thing", False)
    log = (tmp_path / "kept" / "disk.log").read_text()
    assert "what the run said" in log
    assert "Traceback" in log
    assert "disk: FAILED" in capsys.readouterr().err
