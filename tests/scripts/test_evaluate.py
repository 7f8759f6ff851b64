"""scripts/evaluate.py gives the numbers of the training loop, and refuses what it cannot read."""

import json
import os
import re
import shutil

import pytest

from scripts import evaluate
from scripts.evaluate import main
from tests.shards import tiny_config, write_shards
from training.metrics import read_metrics
from training.trainer import train


@pytest.fixture(scope="module")
def run_dir(shards, tmp_path_factory):
    config = tiny_config(shards, tmp_path_factory.mktemp("runs") / "run")
    config.training.steps = 12
    train(config)
    return tmp_path_factory.getbasetemp() / config.run.dir


@pytest.mark.parametrize(("which", "step"), [("", 12), ("checkpoints/step-10", 10)])
def test_the_numbers_are_those_of_the_loop(run_dir, tmp_path, capsys, which, step):
    assert main([str(run_dir / which), "--device", "cpu", "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    record = next(r for r in read_metrics(run_dir / "metrics.jsonl") if r["step"] == step)
    expected = {key: value for key, value in record.items() if key.startswith("validation/")}
    assert numbers == {"step": step, **expected}
    assert f"{expected['validation/odd/bits_per_byte']:.4f}" in capsys.readouterr().out


def test_progress_is_a_line_now_and_then_with_speed_and_time_left(run_dir, monkeypatch, capsys):
    arguments = [str(run_dir), "--device", "cpu", "--instances", "4", "--micro-batch-size", "1"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == "", "an evaluation of seconds needs none"
    monkeypatch.setattr("training.evaluation_progress.INTERVAL", 0.0)
    assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7, "one a batch, and none after the last"
    assert all(
        re.fullmatch(rf"{number} of 8 instances \| [\d.]+( k| M)? tok/s \| \d+ s left", line)
        for number, line in enumerate(lines, start=1)
    )


def test_other_instances_and_other_data_change_the_numbers(run_dir, tmp_path, capsys):
    other = write_shards(tmp_path / "other", seed=5)
    for arguments in (["--instances", "0"], ["--data", str(other)]):
        assert main([str(run_dir), "--device", "cpu", *arguments]) == 0
    first, second = capsys.readouterr().out.split("step 12")[1:]
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["/nowhere"],
            "/nowhere is no whole checkpoint, nor a run that has one: give runs/NAME or runs/NAME/checkpoints",
        ),
        (["{run}", "--data", "/nowhere"], "--data /nowhere is no folder"),
        (["{run}", "--data", "{other}"], "has another tokenizer"),
        (["{run}", "--instances", "-3"], "--instances -3 cannot be used: use a positive integer, or 0 for all."),
        (["{run}", "--micro-batch-size", "0"], "--micro-batch-size 0"),
        (
            ["{run}", "--micro-batch-size", "100000000000"],
            "--micro-batch-size 100000000000 cannot be used: use at most",
        ),
        (["{run}", "--json", "/nowhere/x.json"], "/nowhere does not exist"),
        (["{run}", "--json", "{run}"], "cannot be written: name a new file"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(run_dir, tmp_path, capsys, arguments, words):
    other = write_shards(tmp_path / "other", tokenizer="1" * 64)
    assert main([a.format(run=run_dir, other=other) for a in arguments]) == 2
    assert words in capsys.readouterr().err


def test_data_that_has_moved_is_named(run_dir, tmp_path, monkeypatch, capsys):
    def moved(*arguments):
        config = config_of_checkpoint(*arguments)
        config.data.path = str(tmp_path / "moved")
        return config

    config_of_checkpoint = evaluate.config_of_checkpoint
    monkeypatch.setattr(evaluate, "config_of_checkpoint", moved)
    assert main([str(run_dir)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/moved, where the data of {run_dir}/checkpoints/step-12 was, does not exist: bring it back, "
        "or name a prepared shards directory with --data.\n"
    )


@pytest.mark.parametrize("which", ["", "checkpoints/step-12"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_named_and_no_other_evaluated(run_dir, tmp_path, capsys, damage, which):
    shutil.copytree(run_dir, tmp_path / "run")
    file = max((tmp_path / "run" / "checkpoints" / "step-12").glob("*.distcp"), key=os.path.getsize)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:100])
    assert main([str(tmp_path / "run" / which), "--device", "cpu"]) == 2
    assert "step-12 is damaged" in capsys.readouterr().err
