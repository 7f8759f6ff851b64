"""A long evaluation says how far it is; that of a run names its step."""

import re

from tests.training.runs import short
from training.trainer import train


def test_an_evaluation_of_a_run_tells_its_step_and_the_time_left(shards, tmp_path, monkeypatch, capsys):
    config = short(shards, tmp_path / "run")
    config.training.steps, config.evaluation.every, config.evaluation.micro_batch_size = 2, 2, 1
    monkeypatch.setattr("training.evaluation_progress.INTERVAL", 0.0)
    train(config)
    pattern = r"^evaluation at step (\d): (\d+) of (\d+) instances \| [\d.]+( k| M)? tok/s \| \d+ s left$"
    told = [tuple(map(int, found[:3])) for found in re.findall(pattern, capsys.readouterr().out, re.MULTILINE)]
    size = told[0][2]
    assert told == [(step, done, size) for step in (0, 2) for done in range(1, size)]
