"""Runs on two ranks through train.py and torchrun: what one rank gives, two give; runs resume bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shards import VOCAB

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("throughput/", "memory/", "time/")


def arguments(shards, run_dir):
    """Of train.py for a small run of twenty steps."""
    return [
        "model=moda_tiny",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_heads=4",
        "model.head_dim=8",
        "model.intermediate_size=48",
        f"data.path={shards}",
        "data.sequence_length=16",
        "training.steps=20",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "training.device=cpu",
        "checkpoint.every=10",
        "evaluation.every=10",
        "logging.every=1",
        *([f"run.dir={run_dir}"] if run_dir else []),
    ]


def launch(ranks, shards, run_dir, *overrides, script_arguments=()):
    """Run train.py in an empty folder and return its completed process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        *(launcher if ranks > 1 else [sys.executable]),
        str(ROOT / "train.py"),
        *script_arguments,
        *arguments(shards, run_dir),
        *overrides,
    ]
    folder = Path(shards).parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert list(folder.iterdir()) == [], "a run writes nothing where it was started"
    return done


def records(run_dir):
    found = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in found]


@pytest.fixture(scope="module")
def on_two_ranks(shards, tmp_path_factory):
    """Twenty steps in one go on two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    done = launch(2, shards, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
def test_a_stop_and_a_resume_on_two_ranks_give_the_bits_of_one_go(shards, on_two_ranks, tmp_path):
    for overrides in (["training.stop_at=10"], []):
        done = launch(2, shards, tmp_path / "run", *overrides)
        assert done.returncode == 0, done.stderr
    assert records(tmp_path / "run") == records(on_two_ranks)


@pytest.mark.slow
def test_a_run_moves_from_one_rank_to_two_to_two_copies_on_four_to_one_and_sees_the_same_batches(
    shards, on_two_ranks, tmp_path
):
    for ranks, size, stop, copies in ((1, 2, 5, 1), (2, 2, 10, 1), (4, 1, 15, 2), (1, 4, 20, 1)):
        overrides = (
            f"training.micro_batch_size={size}",
            f"training.stop_at={stop}",
            f"parallel.replicate={copies}",
        )
        done = launch(ranks, shards, tmp_path / "run", *overrides)
        assert done.returncode == 0, done.stderr
    got, want = records(tmp_path / "run"), records(on_two_ranks)
    assert [r["tokens"] for r in got] == [r["tokens"] for r in want]
    for a, b in zip(got[1:], want[1:], strict=True):  # other order of sums: equal to rounding, and so the same batches
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_sweep_runs_every_job_on_two_ranks_in_folders_of_its_own(shards, tmp_path):
    done = launch(
        2,
        shards,
        None,
        "model.ffn_kv_proj=false,true",
        "training.steps=3",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        script_arguments=["-m"],
    )
    assert done.returncode == 0, done.stderr
    for job in ("0", "1"):
        assert [r["step"] for r in records(tmp_path / "sweep" / job)] == [0, 1, 2, 3]
    assert records(tmp_path / "sweep" / "0") != records(tmp_path / "sweep" / "1")


def test_vocabulary_of_the_tests_is_padded_by_the_model(shards):
    assert json.loads((Path(shards) / "train" / "manifest.json").read_text())["vocab_size"] == VOCAB
