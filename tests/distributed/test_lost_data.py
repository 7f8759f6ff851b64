"""A shard is lost to ranks that train or evaluate: both stop with a checkpoint and its name, and go on with it."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.distributed.test_faults import ended, start
from tests.distributed.test_training import ROOT, records

STEPS = 4000  # more than are ever made


@pytest.mark.slow
def test_both_ranks_stop_with_a_checkpoint_when_one_of_them_cannot_read(shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "shards")
    lost, run_dir = data / "train" / "00001.bin", tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {
        "model": "moda_tiny",
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.num_heads": 4,
        "model.head_dim": 8,
        "model.intermediate_size": 48,
        "data.path": data,
        "data.sequence_length": 16,
        "training.steps": STEPS,
        "training.global_batch_size": 2,
        "training.micro_batch_size": 1,
        "training.device": "cpu",
        "evaluation.every": 0,
        "logging.every": 1,
        "run.dir": run_dir,
    }
    command += [str(ROOT / "train.py"), *(f"{key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not (run_dir / "metrics.jsonl").exists() or len(records(run_dir)) < 3:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            os.rename(lost, tmp_path / "kept.bin")
            _, said = process.communicate(timeout=60)  # and no hang
        finally:
            process.kill()
    assert process.returncode == 1
    assert f"error: {lost} cannot be read any more (No such file or directory)" in said
    last = records(run_dir)[-1]["step"]
    assert f"The run has stopped after step {last}, with a checkpoint" in said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{last}"]
    os.rename(tmp_path / "kept.bin", lost)
    command += [f"training.stop_at={last + 2}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(run_dir)] == list(range(1, last + 3))


@pytest.mark.slow
def test_both_ranks_stop_with_a_checkpoint_when_one_of_them_cannot_read_validation(shards, tmp_path):
    inject = """
from data.shards import DataError, TokenDataset
original, lost = TokenDataset.__getitem__, []
def row(self, index):
    if os.environ["RANK"] == "1" and self.folder.name == "odd":
        if lost:
            raise DataError("odd/00000.bin is lost.")
        lost.append(index)  # after the evaluation at step 0
    return original(self, index)
TokenDataset.__getitem__ = row
"""
    run_dir = tmp_path / "run"
    process = start(2, shards, run_dir, "evaluation.every=3", "evaluation.instances=2", inject=inject)
    _, said, _ = ended(process)
    assert process.returncode == 1, said
    assert "error: odd/00000.bin is lost. The run has stopped after step 3, with a checkpoint" in said
    assert re.search(r"exitcode  : 1 ", said)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-3"]
    assert [record["step"] for record in records(run_dir)] == [0, 1, 2]
