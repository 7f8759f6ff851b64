"""Starts that a launcher makes by itself: what the first began is continued, and what fails at one step is given up."""

import pytest

from models.config import ConfigError
from tests.shards import tiny_config
from training.checkpoint import find_checkpoints
from training.config import TrainingError
from training.restarts import entries, launch
from training.trainer import Trainer, train


@pytest.fixture
def config(shards, tmp_path):
    """Eight steps, a checkpoint after five of them."""
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.checkpoint.every, config.evaluation.every = 8, 5, 0
    return config


def start(monkeypatch, config, restarts, fails_before=None, launched_by="first"):
    """One attempt under torchrun; it fails before a step."""
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", launched_by)
        patch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        original = Trainer._step

        def step(self, batches):
            if self.state.step + 1 == fails_before:
                raise RuntimeError("as always")
            return original(self, batches)

        patch.setattr(Trainer, "_step", step)
        train(config)


def test_the_same_failure_three_times_is_not_tried_a_fourth_time_but_by_hand(config, tmp_path, monkeypatch):
    for restarts in range(4):  # the first leaves a checkpoint, and three continue it
        with pytest.raises(RuntimeError, match="as always"):
            start(monkeypatch, config, restarts, fails_before=8)
    with pytest.raises(TrainingError, match="3 starts in a row have continued step 5 and ended after step 7"):
        start(monkeypatch, config, 4)
    assert [(entry["step"], entry["found"]) for entry in entries(tmp_path / "run")] == [(0, -1), *[(5, 7)] * 3]
    train(config)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-5", "step-8"]


def test_starts_that_never_come_to_a_checkpoint_have_begun_anew(config, monkeypatch):
    for restarts in range(3):
        with pytest.raises(RuntimeError, match="as always"):
            start(monkeypatch, config, restarts, fails_before=4)
    with pytest.raises(TrainingError, match="3 starts in a row have begun anew and ended after step 3"):
        start(monkeypatch, config, 3)


def test_failures_at_different_steps_or_of_other_launches_are_tried_again(config, monkeypatch):
    for restarts, step in enumerate((7, 8, 7, 8)):
        with pytest.raises(RuntimeError):
            start(monkeypatch, config, restarts, fails_before=step)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            start(monkeypatch, config, 0, fails_before=8, launched_by="second")
    start(monkeypatch, config, 1, launched_by="third")


def test_never_is_about_the_first_start_of_a_launch(config, monkeypatch):
    config.checkpoint.resume = "never"
    with pytest.raises(RuntimeError):
        start(monkeypatch, config, 0, fails_before=7)
    for restarts, launched_by in ((0, "first"), (1, "second")):
        with pytest.raises(ConfigError, match="never would overwrite"):
            start(monkeypatch, config, restarts, launched_by=launched_by)
    start(monkeypatch, config, 1)


def test_a_host_that_starts_again_because_another_did_continues_without_a_count(config, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    config.checkpoint.resume = "never"
    with pytest.raises(RuntimeError):
        start(monkeypatch, config, 0, fails_before=7)
    with pytest.raises(ConfigError, match="never would overwrite"):
        start(monkeypatch, config, 0, launched_by="second")
    start(monkeypatch, config, 0)


def test_a_requeued_job_is_one_launch_wherever_it_runs(monkeypatch):
    assert launch() is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch() == "SLURM job 7"


def test_a_run_that_is_done_is_done_however_often_a_launcher_starts_it(config, monkeypatch, capsys):
    for restarts in range(5):  # as a sweep's other jobs fail
        start(monkeypatch, config, restarts)
    assert capsys.readouterr().out.count("nothing to do: the run has come to step 8 already") == 4
