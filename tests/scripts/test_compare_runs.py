"""The parity tool on real runs: what changes nothing is within rounding, what changes the run is found."""

import math

import pytest

from scripts.compare_runs import largest, main

TINY = ["num_layers=2", "hidden_size=32", "num_heads=4", "num_kv_heads=2", "head_dim=8", "intermediate_size=48"]
BOTH = ["model=moda_tiny", *(f"model.{field}" for field in TINY), "data.sequence_length=16"]
BOTH += ["training.global_batch_size=4", "training.micro_batch_size=2", "training.device=cpu"]


@pytest.mark.slow
def test_checkpointing_and_two_ranks_change_nothing_and_the_command_says_so(shards, capsys):
    difference = ["--b", "parallel.activation_checkpointing=selective", "--gpus-b", "2"]
    assert main(["--data", str(shards), "--steps", "4", "--tolerance", "1e-5", *difference, *BOTH]) == 0
    shown = capsys.readouterr().out
    assert "within the tolerance of 1e-05 over 4 steps" in shown
    assert "| 4 | " in shown


@pytest.mark.slow
def test_another_learning_rate_is_found(shards, capsys):
    arguments = ["--steps", "2", "--tolerance", "1e-5", "--b", "optimizer.lr=0.5", "--b", "schedule.warmup_steps=1"]
    assert main(["--data", str(shards), *arguments, *BOTH]) == 1
    assert "ABOVE the tolerance" in capsys.readouterr().out


def test_a_value_that_is_no_number_is_the_largest_difference():
    a = [{"step": step, "train/loss": loss} for step, loss in ((1, 3.0), (2, 2.0))]
    b = [{"step": step, "train/loss": loss} for step, loss in ((1, 3.5), (2, math.nan))]
    assert largest(a, b, "train/loss") == (math.inf, 2)
    assert largest(a, a, "train/loss")[0] == 0


def test_a_run_that_fails_is_named(shards, capsys):
    assert main(["--data", str(shards), "--steps", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err
    assert main(["--data", str(shards / "nowhere"), "--steps", "1", *BOTH]) == 2
    assert "run a failed: error: data.path=" in capsys.readouterr().err
