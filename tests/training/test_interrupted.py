"""Runs that a signal stops, in a step or an evaluation: the same command goes on, with the same records."""

import os
import shutil
import signal
from contextlib import nullcontext

import pytest

import training.trainer
from tests.shards import tiny_config
from tests.training.runs import untimed
from training.checkpoint import find_checkpoints
from training.trainer import train


def test_a_signal_saves_and_stops_and_the_same_command_goes_on(shards, finished, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    original = training.trainer.Trainer._record

    def record(self, *given):
        original(self, *given)
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.trainer.Trainer, "_record", record)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-7"]
    monkeypatch.undo()
    train(config)
    assert untimed(config.run.dir) == untimed(finished)


def test_a_signal_in_an_evaluation_ends_it_and_the_next_start_makes_it(shards, finished, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    original, asked = training.trainer.Trainer._stopping, []

    def stopping(self, **options):
        if self.state.step == 10 and not options:  # asked between the batches of the evaluation
            asked.append(1)
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, **options)

    monkeypatch.setattr(training.trainer.Trainer, "_stopping", stopping)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(asked) == 2
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-10"]
    assert untimed(config.run.dir) == untimed(finished)[:10]  # steps 0 to 9
    monkeypatch.undo()
    without = tiny_config(shards, shutil.copytree(tmp_path / "run", tmp_path / "without"))
    train(config)
    assert untimed(config.run.dir) == untimed(finished)
    without.evaluation.every, without.training.stop_at = 0, 11
    train(without)
    losses = [record["train/loss"] for record in untimed(without.run.dir)[1:]]
    assert losses == [record["train/loss"] for record in untimed(finished)[1:12]]


@pytest.mark.parametrize("interrupted", [10, 20], ids=["in the middle", "at the end"])
def test_an_evaluation_that_was_made_at_a_start_without_a_checkpoint_is_made_at_the_next_again(
    interrupted, shards, finished, tmp_path, monkeypatch
):
    config = tiny_config(shards, tmp_path / "run")
    original = training.trainer.Trainer._stopping

    def stopping(self, **options):
        if self.state.step == interrupted and not options:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, **options)

    monkeypatch.setattr(training.trainer.Trainer, "_stopping", stopping)
    with pytest.raises(SystemExit):
        train(config)
    monkeypatch.undo()

    def fails(self, *given):
        record(self, *given)
        if self.state.step == interrupted + 3:
            raise RuntimeError("as good as a kill")

    record = training.trainer.Trainer._record
    monkeypatch.setattr(training.trainer.Trainer, "_record", fails)
    with pytest.raises(RuntimeError, match="as good as a kill") if interrupted < 20 else nullcontext():
        train(config)
    monkeypatch.undo()
    train(config)
    assert untimed(config.run.dir) == untimed(finished)


def test_a_signal_in_the_first_evaluation_leaves_nothing_to_continue_and_the_next_start_begins(
    shards, finished, tmp_path, monkeypatch
):
    config = tiny_config(shards, tmp_path / "run")
    original = training.trainer.Trainer._train

    def begin(self):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    monkeypatch.setattr(training.trainer.Trainer, "_train", begin)
    with pytest.raises(SystemExit):
        train(config)
    assert find_checkpoints(tmp_path / "run") == []
    monkeypatch.undo()
    train(config)
    assert untimed(config.run.dir) == untimed(finished)
