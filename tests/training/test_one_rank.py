"""Runs on one rank, whose weights stay gathered, against runs that gather them for each pass: the same bits."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from models.decoder import Decoder
from tests.shards import tiny_config
from tests.training.runs import untimed
from tests.training.test_skip import poisoned
from training.trainer import train

STEPS = 20


def configured(shards, run_dir, gathers):
    """Two micro-batches a step in bf16, evaluations and checkpoints between steps; `gathers`: for each pass."""
    config = tiny_config(shards, run_dir)
    config.training.precision = "bf16"
    config.parallel.reshard_after_forward = gathers
    config.evaluation.every, config.checkpoint.asynchronous = 5, True
    config.checkpoint.every, config.checkpoint.permanent_every = 100, 3  # writes beside the steps after them
    return config


def saved(config, step):
    """The weights of a checkpoint."""
    weights = {name: torch.full_like(weight, math.nan) for name, weight in Decoder(config.model).state_dict().items()}
    dcp.load({"model": weights}, checkpoint_id=Path(config.run.dir) / "checkpoints" / f"step-{step}", no_dist=True)
    return weights


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory):
    """A run that gathers for each pass and skips its fourth step. Read only."""
    config = configured(shards, tmp_path_factory.mktemp("gathers") / "run", True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        poisoned(monkeypatch, {4})
        train(config)
    return config


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("stop_at", [None, 5, 10])
def test_a_run_has_the_records_and_weights_of_one_that_gathers_for_each_pass(
    stop_at, expected, shards, tmp_path, monkeypatch
):
    config = configured(shards, tmp_path / "run", False)
    poisoned(monkeypatch, {4})
    for config.training.stop_at in dict.fromkeys((stop_at, None)):
        train(config)
    records = untimed(config.run.dir)
    assert records == untimed(expected.run.dir)
    assert records[-1]["train/skipped_steps"] == 1
    for step in (3, 12, STEPS):
        got, want = saved(config, step), saved(expected, step)
        assert all(torch.equal(got[name], weight) for name, weight in want.items()), step
