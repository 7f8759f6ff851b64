"""scripts/benchmark_waits.py: which gap of the device counts for what, and what it refuses."""

import json

import pytest

from scripts.benchmark_waits import HostTimes, main
from scripts.training_benchmark import waits

BASE = 1_000_000.0  # Unix time of a trace's zero


def trace(path, *spans):
    """`spans`: category, name, begin and end in ms after BASE."""
    events = [
        {"ph": "X", "cat": category, "name": name, "ts": begin * 1e3, "dur": (end - begin) * 1e3}
        for category, name, begin, end in spans
    ]
    path.write_text(json.dumps({"baseTimeNanoseconds": BASE * 1e9, "traceEvents": events}))
    return path


def at(*milliseconds):
    return tuple(BASE + time / 1e3 for time in milliseconds)


def test_each_gap_counts_for_what_the_host_was_at_and_a_checkpoint_s_copy_leaves_the_device_idle(tmp_path):
    path = trace(
        tmp_path / "trace.json",
        ("kernel", "gemm", 0, 10),
        ("kernel", "gemm", 10.002, 20),  # too short a gap to count
        ("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 5, 24),  # of a checkpoint, beside the computation
        ("kernel", "gemm", 25, 30),  # waited for the copy
        ("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 30, 30.005),  # the loss
        ("cuda_runtime", "cudaLaunchKernel", 30, 39),
        ("kernel", "gemm", 40, 50),  # waited for the record, and for the way into the evaluation
        ("kernel", "gemm", 53, 60),  # waited inside it
        ("kernel", "gemm", 62, 70),  # waited for the way out
        ("kernel", "gemm", 71, 80),  # waited for data
        ("kernel", "gemm", 80.5, 90),  # waited for the host
        ("kernel", "gemm", 91, 92),  # the host had not queued the step yet
        ("kernel", "gemm", 94, 94.5),  # it had
        ("kernel", "gemm", 97, 99),  # after the window
    )
    host = {
        "metrics": [at(20, 31), at(90, 90.5)],
        "evaluation": [at(32, 61)],
        "data": [at(70.2, 70.9), at(75, 75.5)],
    }
    found = waits.account(*waits.device_spans(path), host, list(at(20, 61.5, 91.5)), at(0, 95))
    seconds = {"checkpoint": 5e-3, "evaluation": 14.995e-3, "data": 1e-3, "within steps": 3e-3, "metrics": 1e-3}
    assert found.seconds == pytest.approx(seconds, abs=1e-6)
    assert found.inside_evaluations == pytest.approx(3e-3, abs=1e-6)
    assert found.window == pytest.approx(95e-3, abs=1e-6)


def test_the_table_gives_the_share_of_a_step_at_the_interval_of_each_cause():
    found = waits.Waits({"evaluation": 0.030, "metrics": 0.009, "within steps": 0.01}, 0.010, 4.0)
    times = {"evaluation": 2, "checkpoint": 0, "metrics": 9, "data": 90, "within steps": 10}
    every = {"evaluation": 1000, "checkpoint": 1000, "metrics": 10, "data": 1, "within steps": 1}
    text = waits.table(found, times, every, step_seconds=0.1)
    assert "| evaluation | 2 | 10.00 | 1,000 steps | 0.010% |" in text
    assert "| metrics | 9 | 1.00 | 10 steps | 0.100% |" in text
    assert "| checkpoint | 0 | 0.00 | 1,000 steps | 0.000% |" in text
    assert "| within steps | 10 | 1.00 | step | 1.000% |" in text
    assert "**0.110%**" in text


def test_the_host_s_times_are_noted_when_a_call_fails_too():
    host = HostTimes()
    assert host.of("data", lambda x: x + 1)(1) == 2
    with pytest.raises(ZeroDivisionError):
        host.of("data", lambda: 1 / 0)()
    assert [begin <= end for begin, end in host.spans["data"]] == [True, True]


def test_without_a_gpu_it_says_so(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--data", str(shards), "--out", str(tmp_path)]) == 2
    assert "a GPU is needed" in capsys.readouterr().err


def test_a_folder_with_a_run_is_left_alone(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (tmp_path / "run").mkdir()
    assert main(["--data", str(shards), "--out", str(tmp_path)]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("checkpoint.resume=DIR", "steps begin with new weights here"),
        ("+run.dir=DIR", "the run directory is one of this script's own"),
        ("evaluation.every=20", "the measurement depends on it"),
        ("data.path=DIR", "--data names the shards"),
    ],
)
def test_an_override_without_effect_is_refused(shards, tmp_path, monkeypatch, capsys, override, reason):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["--data", str(shards), "--out", str(tmp_path), override]) == 2
    assert f"error: {override} cannot be used: {reason}, so leave it out." in capsys.readouterr().err
