"""Finished runs, once a process, and runs whose pictures are not rendered."""

import shutil
from pathlib import Path

import pytest

import training.trainer
from tests.shards import tiny_config
from tests.training.runs import short
from training import curves
from training.trainer import train


@pytest.fixture(autouse=True)
def outlined(monkeypatch):
    """Runs make their figures and do not render them, which takes half of a short run's time.

    The runs of all modules are rendered; pictures are looked at in test_curves.py and test_report.py.
    """

    def outline(run_dir):
        with monkeypatch.context() as patch:
            patch.setattr(curves, "save", lambda figure, path: path)
            return curves.draw_curves(run_dir)

    monkeypatch.setattr(training.trainer, "draw_curves", outline)


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory):
    """A run of twenty steps in one go. Read only: tests that write copy it."""
    config = tiny_config(shards, tmp_path_factory.mktemp("runs") / "finished")
    train(config)
    return Path(config.run.dir)


@pytest.fixture(scope="session")
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
