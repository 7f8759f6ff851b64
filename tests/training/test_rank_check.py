"""Ranks that cannot train together are told apart before anything is built, in one sentence that names the rank."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

import training.rank_check
from models.accounting import count_parameters
from models.config import ConfigError
from tests.shards import tiny_config
from training.rank_check import Seen, compare
from training.trainer import train

ALIKE = Seen("a", 1000.0, "2.11", "data", {"optimizer.lr": 0.1, "run.dir": "runs/x"}, True, 2.0)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"torch": "2.13"}, "rank 1 on b has torch 2.13 and rank 0 on a has 2.11"),
        ({"data": "other"}, "rank 1 on b has the data other"),
        (
            {"config": {"optimizer.lr": 0.2, "model.norm": "pre"}},
            "(?s)rank 1 on b has another configuration than rank 0 on a: start every host with the same command.*"
            r"key +rank 0 +rank 1\n +model.norm +null +pre\n +optimizer.lr +0.1 +0.2$",
        ),
        ({"sees_run_dir": False}, "run.dir=runs/x of rank 0 does not exist for rank 1 on b"),
        ({"clock": 1045.0}, r"the clock of rank 1 on b differs .* by \+45 s"),
        ({"sum_over_devices": 1.0}, "a sum over the devices of 2 ranks gave 1 on rank 1"),
    ],
)
def test_what_differs_is_named_with_rank_and_host(difference, words):
    compare([ALIKE, replace(ALIKE, host="b", clock=1001.0)], "runs/x")
    with pytest.raises(ConfigError, match=words):
        compare([ALIKE, replace(ALIKE, host="b", **difference)], "runs/x")


def test_hosts_may_have_data_under_paths_of_their_own():
    elsewhere = {**ALIKE.config, "data.path": "/local/shards", "run.dir": "/mnt/runs/x"}
    compare([ALIKE, replace(ALIKE, host="b", config=elsewhere)], "runs/x")


def test_a_disk_without_room_for_a_checkpoint_is_named_before_the_first_step(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(training.rank_check, "BYTES_PER_PARAMETER", 10**18)
    config = tiny_config(shards, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"MB free and a checkpoint needs .* make room"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_disk_without_room_for_those_that_stay_is_a_warning(shards, tmp_path, monkeypatch, capsys):
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.checkpoint.keep = 3, 2
    needed = training.rank_check.BYTES_PER_PARAMETER * count_parameters(config.model).total
    for free, words in ((3 * needed, None), (3 * needed - 1, "room for 2 checkpoints"), (needed, "room for 1")):
        monkeypatch.setattr(training.rank_check.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        train(config)
        printed = capsys.readouterr().out
        if words is None:
            assert "warning: run.dir" not in printed
        else:
            assert f"{words}" in printed
            assert "checkpoint.keep=2 comes to 3" in printed
        config.run.dir += "-again"
