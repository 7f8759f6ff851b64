"""What a kill would lose, looked at before and after every step of runs whose writes are slow."""

import re
import time
from concurrent import futures

import pytest

import training.saver
from tests.training.runs import short
from training.checkpoint import find_checkpoints, read_marker
from training.saver import CheckpointSaver
from training.trainer import Trainer, train


@pytest.fixture
def endless_writes(monkeypatch):
    """Each write lasts until training waits for it, and a fifth of a second more."""
    awaited, wait, clear = set(), CheckpointSaver._await, training.saver._clear

    def waits(self, writing):
        awaited.add(f"step-{self._writing_step}")
        wait(self, writing)

    def lasts(path):
        while path.name not in awaited:
            time.sleep(0.01)
        time.sleep(0.2)
        clear(path)

    monkeypatch.setattr(CheckpointSaver, "_await", waits)
    monkeypatch.setattr(training.saver, "_clear", lasts)


@pytest.fixture
def waits(monkeypatch):
    """(steps done, whether the write was still going on) of the ends of all writes but the last one's."""
    seen, original = [], CheckpointSaver._end_write

    def end_write(self, step, stepping):
        if self._writing is not None:
            seen.append((step, not self._writing.done()))
        original(self, step, stepping)

    monkeypatch.setattr(CheckpointSaver, "_end_write", end_write)
    return seen


def newest(run_dir):
    """Step of the checkpoint that a start would continue; 0: none."""
    return max((read_marker(path).state.step for path in find_checkpoints(run_dir)), default=0)


@pytest.mark.parametrize(
    ("every", "permanent_every", "first"),
    [(3, None, 3), (10, None, 9), (10, 7, 7), (20, None, 18)],
    ids=["no lead", "a lead", "permanent ones too", "a longer lead"],
)
def test_steps_done_are_never_more_than_the_interval_ahead_of_the_newest_whole_checkpoint(
    every, permanent_every, first, shards, tmp_path, monkeypatch, endless_writes, waits, capsys
):
    """steps done - step of the newest whole checkpoint <= every, at any moment: so every - 1 when a step begins."""
    monkeypatch.setattr(training.saver, "LONG_WAIT_SECONDS", 0.05)
    config = short(shards, tmp_path / "run", every=every, permanent_every=permanent_every, keep=None)
    config.training.steps = 2 * every + 5
    original, lost = Trainer._step, []

    def step(self, batches):
        if not lost:
            self.after_step.append(lambda done: lost.append(done - newest(self.run_dir)))
        assert self.state.step - newest(self.run_dir) <= every - 1
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_step", step)
    train(config)
    assert len(lost) == config.training.steps
    assert max(lost) <= every
    at_bound = [step for step, going_on in waits if going_on]
    assert len(at_bound) > 1, "without a wait there is nothing to prove"
    printed = capsys.readouterr().out
    said = re.findall(rf"training waited [\d.]+ s for \S+step-(\d+) to be written: checkpoint\.every={every} ", printed)
    assert permanent_every or int(said[0]) == first
    in_line = {int(step): float(s) for step, s in re.findall(r"step-(\d+) \| .*training waited ([\d.]+) s", printed)}
    assert min(in_line) == first
    assert all(in_line[int(step)] > 0.05 for step in said), "the line of a checkpoint has the whole wait"


def test_after_the_first_wait_saves_begin_early_enough(shards, tmp_path, monkeypatch, waits, capsys):
    """Each write lasts for 6 steps, and no step more than that; the first has 5, from step 45 to 50."""
    config = short(shards, tmp_path / "run", every=50, keep=None)
    config.training.steps = last = 97
    original, clear, trainers = Trainer._step, training.saver._clear, []

    def step(self, batches):
        trainers.append(self)
        saver = self.saver
        if saver._writing is not None and self.state.step >= saver._writing_step + 6:
            futures.wait([saver._writing], timeout=60)
        return original(self, batches)

    def lasts(path):
        begun, trainer = int(path.name.removeprefix("step-")), trainers[0]
        while trainer.state.step < min(begun + 6, last) and trainer.saver._waits_since is None:
            time.sleep(0.001)
        clear(path)

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(training.saver, "_clear", lasts)
    train(config)
    assert waits[0] == (50, True)
    assert [step for step, going_on in waits if going_on and step < last] == [50]
    first, second, *_ = [int(step) for step in re.findall(r"step-(\d+) \|", capsys.readouterr().out)]
    assert first == 45
    assert second in range(70, 90, 5), "ten steps ahead, or more where the machine is busy"


def test_writes_that_no_lead_is_enough_for_are_said_once(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.saver, "steps_of_write", lambda write, steps, seconds: 99 if steps else 0)
    config = short(shards, tmp_path / "run", every=10, keep=None)
    config.training.steps = 22
    train(config)
    printed = capsys.readouterr().out
    assert printed.count("warning: a checkpoint takes 99 steps to be written, and checkpoint.every=10 leaves") == 1
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-9", "step-18", "step-22"]


def test_a_write_that_fails_is_tried_again_at_once_and_waited_for(shards, tmp_path, monkeypatch, waits, capsys):
    original = training.saver.first_difference

    def difference(folder, checksums, **options):
        if folder.name == "step-9":
            raise OSError("no such thing")
        time.sleep(0.2)
        return original(folder, checksums, **options)

    monkeypatch.setattr(training.saver, "first_difference", difference)
    config = short(shards, tmp_path / "run", every=10, keep=None)
    config.training.steps = 21
    train(config)
    assert "step-9 could not be saved" in capsys.readouterr().out
    assert waits[1] == (10, True)
    assert [step for step, _ in waits[:2]] == [10, 10]
    assert next(path.name for path in find_checkpoints(tmp_path / "run")) == "step-10"
