"""Whole runs on a GPU: bf16 compute learns, checkpoints continue, and memory and MFU are logged."""

import math

import pytest

from data.loader import BatchLoader
from tests.shards import tiny_config
from training.checkpoint import find_checkpoints, verify
from training.metrics import read_metrics
from training.trainer import train


def run(shards, run_dir, **training):
    config = tiny_config(shards, run_dir)
    config.training.device = "cuda"
    config.checkpoint.asynchronous = True
    config.checkpoint.every, config.checkpoint.permanent_every = 100, 10  # of which training waits for none
    for name, value in training.items():
        setattr(config.training, name, value)
    train(config)
    return {record["step"]: record for record in read_metrics(run_dir / "metrics.jsonl")}


def test_bf16_training_learns_and_follows_fp32(shards, tmp_path):
    bf16, fp32 = run(shards, tmp_path / "bf16"), run(shards, tmp_path / "fp32", precision="fp32")
    assert bf16[20]["train/loss"] < bf16[1]["train/loss"] - 0.1
    for step in range(1, 21):
        assert math.isclose(bf16[step]["train/loss"], fp32[step]["train/loss"], rel_tol=0.02)
    assert bf16[20]["memory/peak_gb"] < 1


def test_a_stop_and_a_resume_continue_the_curve(shards, tmp_path):
    whole = run(shards, tmp_path / "whole")
    run(shards, tmp_path / "parts", stop_at=10)
    parts = run(shards, tmp_path / "parts")
    for step in range(1, 21):
        assert math.isclose(whole[step]["train/loss"], parts[step]["train/loss"], rel_tol=1e-3)


def test_an_error_right_after_a_save_leaves_the_checkpoint(shards, tmp_path, monkeypatch):
    """The copy to host memory ends with the next step's optimizer at the latest, which never comes."""
    original = BatchLoader.batch

    def batch(self, position):
        if position == 4 * 10:
            raise RuntimeError("as if")
        return original(self, position)

    monkeypatch.setattr(BatchLoader, "batch", batch)
    with pytest.raises(RuntimeError, match="as if"):
        run(shards, tmp_path / "run")
    (path,) = find_checkpoints(tmp_path / "run")
    assert verify(path).state.step == 10


def test_a_gpu_run_continues_on_the_cpu(shards, tmp_path):
    run(shards, tmp_path / "run", stop_at=10, precision="fp32")
    config = tiny_config(shards, tmp_path / "run")  # device: cpu
    train(config)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["step"] == 20
    assert last["train/loss"] < 4.8


def test_a_cpu_run_continues_on_the_gpu(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "whole")
    train(config)
    whole = {record["step"]: record for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")}
    config = tiny_config(shards, tmp_path / "parts")
    config.training.stop_at = 10
    train(config)
    parts = run(shards, tmp_path / "parts", precision="fp32")
    assert list(parts) == list(whole)
    for step in range(1, 21):
        assert math.isclose(whole[step]["train/loss"], parts[step]["train/loss"], rel_tol=1e-3)
