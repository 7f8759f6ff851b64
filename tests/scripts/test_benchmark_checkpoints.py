"""scripts/benchmark_checkpoints.py: a whole measurement on a tiny model, and the arithmetic of its table."""

import json
import math
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import benchmark_checkpoints
from scripts.benchmark_checkpoints import SHARED, Runs, cost, largest, main
from scripts.training_benchmark.process import StepsFailed

TINY = ["num_layers=2", "hidden_size=32", "num_heads=4", "head_dim=8", "intermediate_size=48"]
SHAPE = ["--model", "moda_tiny", "--time", "16", "--micro-batch", "2", "--batch", "4", "--set=training.device=cpu"]


@pytest.mark.slow
def test_a_run_is_measured_killed_and_continued(shards, tmp_path, capsys):
    arguments = ["--data", str(shards), "--out", str(tmp_path), "--gpus", "1", "--resume-on", "1", "--every", "40"]
    status = main([*arguments, "--scratch", str(tmp_path), *SHAPE, *(f"--set=model.{field}" for field in TINY)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    results = json.loads((tmp_path / "checkpoints.json").read_text())
    saved = [row["step"] for row in results["saved"]]
    assert (saved[0], saved[-1]) == (36, 120)
    assert max(later - earlier for earlier, later in pairwise(saved)) < 40
    assert all(row["staging_seconds"] < 5 for row in results["saved"])
    assert results["apart_before"] == 0
    (resumed,) = results["resumed"]
    assert resumed["from"] == results["killed_at"] - results["lost"] >= 18
    assert results["lost"] <= results["may_lose"] == 20
    assert f"{results['lost']} steps, of 20 at most, were made again" in shown.out
    assert resumed["apart"] == 0  # the same number of ranks, fp32 on a CPU: bit for bit
    assert f"| 1 | {resumed['from']} | {resumed['from'] + 1}–{resumed['to']} | 0.0e+00 |" in shown.out
    assert not list(tmp_path.glob("checkpoints-*")), "checkpoints are deleted"


def records(seconds):
    elapsed = [sum(seconds[: count + 1]) for count in range(len(seconds))]
    return [{"step": n + 1, "train/loss": 2.0 + n, "time/elapsed_seconds": t} for n, t in enumerate(elapsed)]


def test_the_wait_of_a_checkpoint_is_that_of_the_step_after_it():
    seconds = [9.0] + [1.0] * 29  # the first step compiles
    seconds[10] = seconds[20] = 1.5  # steps 11 and 21, after the checkpoints of steps 10 and 20
    output = "checkpoint /a/step-10 | 8,512.3 MB in 12.5 s, training waited 0.40 s\n"
    output += "checkpoint /a/step-20 | 8,512.3 MB in 12.5 s, training waited 0.40 s\n"
    output += "checkpoint /a/step-30 | 8,512.3 MB in 12.5 s, training waited\n"
    found = cost(records(seconds), output, every=10)
    first, _, last = found["saved"]
    assert (first["step"], first["bytes"], first["write_seconds"]) == (10, pytest.approx(8512.3e6), 12.5)
    assert (first["staging_seconds"], first["stall_seconds"]) == (0.4, pytest.approx(0.5))
    assert (last["staging_seconds"], last["stall_seconds"]) == (None, None)
    assert found["ratio"] == pytest.approx(1 / 1.05)


def test_the_cost_is_that_of_whole_intervals_after_the_first_wait_for_a_write():
    seconds = [1.0] * 30
    seconds[10], seconds[16], seconds[23] = 9.0, 1.7, 1.7
    saved = "".join(f"checkpoint /a/step-{n} | 8.3 MB in 2.5 s, training waited 0.40 s\n" for n in (9, 16, 23, 30))
    assert cost(records(seconds), saved, every=10)["with_seconds"] == pytest.approx(1.1)
    early = saved.replace("step-30", "step-25")
    assert cost(records(seconds), early, every=10)["with_seconds"] == pytest.approx(1.1), "the last is of no interval"
    with pytest.raises(StepsFailed, match="0 checkpoints were written, and 3 are needed"):
        cost(records(seconds), "", every=10)


@pytest.mark.parametrize("reached", [38, 39])
def test_a_kill_that_loses_more_than_the_interval_is_a_failure(reached, tmp_path, monkeypatch):
    (tmp_path / "log").write_text("")
    steps = iter([20, 25, reached])
    monkeypatch.setattr(Runs, "_start", lambda *arguments: (SimpleNamespace(poll=lambda: None), tmp_path / "log"))
    monkeypatch.setattr(Runs, "_step", lambda self: next(steps))
    monkeypatch.setattr(benchmark_checkpoints, "kill", lambda process: None)
    monkeypatch.setattr(benchmark_checkpoints, "find_checkpoints", lambda run_dir: [Path("step-18")])
    marker = SimpleNamespace(state=SimpleNamespace(step=18))
    monkeypatch.setattr(benchmark_checkpoints, "read_marker", lambda path: marker)
    runs = Runs(SimpleNamespace(), tmp_path)
    if reached == 38:
        assert runs.kill(1, 20) == {"killed_at": 38, "lost": 20, "may_lose": 20}
    else:
        with pytest.raises(StepsFailed, match=r"a kill lost 21 steps, and checkpoint\.every=20 allows 20"):
            runs.kill(1, 20)


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", "3", "null", '{"saved": [{}]}', '{"saved": 3}', "no", ""])
def test_a_file_without_results_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "made.json").write_text(content)
    assert main(["--from", str(tmp_path / "made.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --from {tmp_path / 'made.json'} holds no results of this benchmark (")
    assert error.endswith("): give a checkpoints.json that it has written.\n")


def test_losses_of_the_same_steps_are_compared():
    other = records([1.0] * 5)[2:]
    other[1]["train/loss"] += 0.25
    assert largest(records([1.0] * 8), other) == 0.25
    other[1]["train/loss"] = math.nan
    assert math.isnan(largest(records([1.0] * 8), other)), "max() alone passes over a NaN that is not the first"


def test_a_cpu_is_taken_only_where_it_is_asked_for(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--data", str(shards), "--out", str(tmp_path / "new")]) == 2
    assert "A GPU is needed and none is visible" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_measured_is_one_sentence(shards, tmp_path, capsys):
    for arguments, words in (
        ([], "--data SHARDS and --out DIR are needed"),
        (["--data", str(tmp_path), "--out", str(tmp_path)], "holds no token shards"),
        (["--data", str(shards), "--out", str(tmp_path), "--every", "5"], "--every 5 leaves too few steps"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    arguments = ["--data", str(shards), "--out", str(tmp_path), "--gpus", "1", "--set=model.norm=x"]
    assert main([*arguments, *SHAPE]) == 1
    assert "error: model.norm=x cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("2,5", "5"), ("7", "7")])
def test_ranks_share_the_gpus_there_are(visible, own, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    shown = 'echo "$CUDA_VISIBLE_DEVICES $LOCAL_RANK $LOCAL_WORLD_SIZE $NCCL_HOSTID $1"'
    command = ["bash", "-c", SHARED.format(gpus="0 1"), "bash", "bash", "-c", shown, "bash", "a=b c"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{own} 0 1 host-3 a=b c\n"


def test_the_documentation_has_the_marks_of_its_section():
    benchmark_checkpoints.SECTION.check(benchmark_checkpoints.PAGE)
