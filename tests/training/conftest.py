"""Finished runs, once a module."""

import shutil
from pathlib import Path

import pytest

from tests.shards import tiny_config
from tests.training.runs import short
from training.trainer import train


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run of twenty steps in one go. Read only: tests that write copy it."""
    config = tiny_config(shards, tmp_path_factory.mktemp("runs") / "finished")
    train(config)
    return Path(config.run.dir)


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """A finished run with checkpoints of steps 2, 4, 6, 8. Read only: tests that write copy it."""
    config = short(shards, tmp_path_factory.mktemp("saved") / "run", keep=None)
    train(config)
    return Path(config.run.dir)


@pytest.fixture
def run(saved, shards, tmp_path):
    """A copy of that run, and the configuration that continues it."""
    shutil.copytree(saved, tmp_path / "run")
    return short(shards, tmp_path / "run", keep=None)
