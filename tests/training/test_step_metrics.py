"""Records are read when the next step is queued, as on a GPU: the same ones, in order, and none is lost at a stop."""

import os
import signal

import pytest
import torch

from tests.shards import tiny_config
from tests.training.runs import untimed
from training.checkpoint import find_checkpoints
from training.config import TrainingError
from training.metrics import TrainingClock, read_metrics
from training.step_metrics import Numbers, StepMetrics
from training.trainer import Trainer, train


@pytest.fixture
def later(monkeypatch):
    """Steps for which a record was written late, and by how many steps."""
    delays: list[tuple[int, int]] = []
    record = Trainer._record

    def noted(self, step, *given):
        delays.append((step, self.state.step - step))
        record(self, step, *given)

    monkeypatch.setattr(StepMetrics, "at_once", False)
    monkeypatch.setattr(Trainer, "_record", noted)
    return delays


def test_records_are_the_same_one_step_later(shards, finished, tmp_path, later):
    config = tiny_config(shards, tmp_path / "run")
    train(config)
    assert untimed(config.run.dir) == untimed(finished)
    # At once before the first step, with an evaluation or a checkpoint, and after the last.
    assert later == [(step, int(step not in (0, 10, 20))) for step in range(21)]


def test_records_of_every_third_step_and_the_last(shards, finished, tmp_path, later):
    config = tiny_config(shards, tmp_path / "run")
    config.logging.every, config.evaluation.every, config.checkpoint.every = 3, 0, 6
    train(config)
    assert later == [(3, 1), (6, 0), (9, 1), (12, 0), (15, 1), (18, 0), (20, 0)]
    losses = {record["step"]: record["train/loss"] for record in untimed(finished)[1:]}
    assert {r["step"]: r["train/loss"] for r in untimed(config.run.dir)} == {step: losses[step] for step, _ in later}


def test_a_signal_leaves_the_record_of_the_last_step(shards, finished, tmp_path, later, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    step = Trainer._step

    def signalled(self, *given):
        if self.state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    with monkeypatch.context() as signals:
        signals.setattr(Trainer, "_step", signalled)
        with pytest.raises(SystemExit):
            train(config)
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [*range(8)]
    assert later[-1] == (7, 0)
    assert find_checkpoints(tmp_path / "run")[-1].name == "step-7"
    train(config)
    assert untimed(config.run.dir) == untimed(finished)


def test_a_run_that_diverges_stops_one_step_later(shards, tmp_path, later, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.evaluation.every, config.training.skip_limit = 0, 3
    monkeypatch.setattr("training.trainer.gradient_norm", lambda optimizer: torch.tensor(torch.nan))
    with pytest.raises(TrainingError, match="the run diverged: 4 steps in a row up to step 4 were skipped"):
        train(config)
    assert [record["train/skipped_steps"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_the_seconds_of_a_device_count_less_its_pauses(shards, tmp_path, later, monkeypatch):
    """Two steps of 4 s each on a device whose clock, unlike the host's, knows of them."""
    monkeypatch.setattr(Numbers, "seconds_since", lambda self, before: 4.0)
    config = tiny_config(shards, tmp_path / "run")
    config.evaluation.every, config.training.steps = 0, 2
    train(config)
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [record["throughput/tokens_per_second"] for record in (first, second)]
    assert rates == [4 * 16 / 4.0] * 2
    config = tiny_config(shards, tmp_path / "paused")
    config.evaluation.every, config.training.steps = 0, 1
    monkeypatch.setattr(TrainingClock, "paused_seconds", property(lambda self: 2.0 * getattr(self, "steps_begun", 0)))
    begin = StepMetrics.begin

    def begun(self, *given):
        self.clock.steps_begun = 1
        begin(self, *given)

    monkeypatch.setattr(StepMetrics, "begin", begun)
    train(config)
    (record,) = read_metrics(tmp_path / "paused" / "metrics.jsonl")
    assert record["throughput/tokens_per_second"] == 4 * 16 / 2.0


def test_numbers_keep_their_bits():
    scalars = [torch.tensor(0.1), torch.tensor(torch.nan), torch.tensor(2**40), torch.tensor(0.1, dtype=torch.float64)]
    numbers = Numbers(scalars)
    scalars[2] += 1  # they are those of their moment
    got = numbers.read()
    assert got[0] == scalars[0].item()
    assert got[1] != got[1]
    assert got[2:] == [2**40, 0.1]
    assert numbers.seconds_since(numbers) is None
