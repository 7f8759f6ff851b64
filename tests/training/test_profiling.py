"""Profiles of steps: what a trace holds, which steps have one, what is left when a step fails."""

import contextlib
import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from eval.perplexity import PerplexityEvaluator
from models.config import ConfigError
from tests.shards import tiny_config
from training import profiling
from training.config import Config, ProfileConfig
from training.metrics import TrainingClock
from training.profiling import StepProfiler
from training.saver import CheckpointSaver
from training.trainer import Trainer, train


def configured(shards, run_dir, *steps):
    config = tiny_config(shards, run_dir)
    config.logging.profile.steps = list(steps)
    return config


def profiled(run_dir):
    return sorted(path.name for path in (Path(run_dir) / "profile").iterdir())


def test_a_trace_holds_its_step_and_not_the_evaluation_and_checkpoint_before_it(shards, tmp_path, monkeypatch):
    def marked(owner, name):
        method = getattr(owner, name)

        def inside(*arguments, **options):
            with record_function(f"marked {name}"):
                return method(*arguments, **options)

        monkeypatch.setattr(owner, name, inside)

    for owner, name in (
        (PerplexityEvaluator, "evaluate"),
        (CheckpointSaver, "save"),
        (Trainer, "_record"),
        (Trainer, "_step"),
    ):
        marked(owner, name)
    config = configured(shards, tmp_path / "run", 1, 11)  # the start has an evaluation too, and step 10 all of them
    train(config)
    assert profiled(config.run.dir) == ["step-1-rank-0.json.gz", "step-11-rank-0.json.gz"]
    for step in (1, 11):
        trace = tmp_path / "run" / "profile" / f"step-{step}-rank-0.json.gz"
        names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert {name for name in names if name.startswith("marked")} == {"marked _step"}
        assert sum(name.startswith("Optimizer.step") for name in names) == 1


def test_the_first_step_after_a_resume_is_profiled_and_a_step_behind_it_is_mentioned(shards, tmp_path, capsys):
    config = configured(shards, tmp_path / "run", 3, 7)
    config.training.stop_at, config.evaluation.every = 6, 0
    train(config)
    assert "not profiled: [7] of logging.profile.steps; this start makes 1 to 6" in capsys.readouterr().out
    config.training.stop_at = 8
    train(config)
    assert "not profiled: [3] of logging.profile.steps; this start makes 7 to 8" in capsys.readouterr().out
    assert profiled(config.run.dir) == ["step-3-rank-0.json.gz", "step-7-rank-0.json.gz"]


def test_a_step_beyond_the_run_is_refused():
    config = Config()
    config.training.steps, config.logging.profile.steps = 20, [20, 500]
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert str(caught.value) == (
        "logging.profile.steps=[20, 500] cannot be used: name steps of the run, of which training.steps=20 is the last."
    )
    config.logging.profile.steps = [20]
    config.validate()


def test_a_step_that_fails_leaves_no_profile_and_ends_the_history_of_memory(tmp_path, monkeypatch):
    history = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: history.append("waited"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: history.append(options))
    monkeypatch.setattr(profiling, "profile", lambda activities: contextlib.nullcontext())
    profiler = StepProfiler(ProfileConfig([5], memory=True), tmp_path, 0, torch.device("cuda"))
    with profiler.of_step(4):
        assert history == []
    with pytest.raises(RuntimeError, match="a step failed"), profiler.of_step(5):
        raise RuntimeError("a step failed")
    assert history == ["waited", {"max_entries": profiling.MEMORY_EVENTS}, {"enabled": None}]
    assert not profiler.folder.exists()


def test_a_profile_that_cannot_be_written_is_a_warning_of_its_rank(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file in place of the folder")
    warning = f"warning: {tmp_path}/profile cannot be written (File exists): step 5 has no profile"
    for rank, on_console, on_stderr in ((0, [warning], ""), (3, [], f"rank 3: {warning}\n")):
        said = []
        profiler = StepProfiler(ProfileConfig([5]), tmp_path, rank, torch.device("cpu"), said.append)
        with profiler.of_step(5):
            torch.ones(3).sum()
        assert (said, capsys.readouterr().err) == (on_console, on_stderr)


def test_a_trace_that_was_written_is_named_and_one_that_was_not_is_a_warning(tmp_path, monkeypatch):
    said = []
    profiler = StepProfiler(ProfileConfig([5, 6]), tmp_path, 0, torch.device("cpu"), said.append)
    with profiler.of_step(5):
        torch.ones(3).sum()
    assert said == [f"profile of step 5: {tmp_path}/profile/step-5-rank-0.json.gz"]
    said.clear()

    def full(self, path):  # as the profiler leaves it when TMPDIR is full
        Path(path).write_bytes(gzip.compress(b""))

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    with profiler.of_step(6):
        torch.ones(3).sum()
    assert len(said) == 1
    assert said[0].startswith("warning: the trace of step 6 could not be written: make room in ")
    assert profiled(tmp_path) == ["step-5-rank-0.json.gz"]


@pytest.mark.parametrize(
    ("held", "whole"),
    [
        (gzip.compress(b'{"traceEvents": []}\n'), True),
        (gzip.compress(b'{"traceEvents": ['), False),
        (gzip.compress(b'{"traceEvents": []}')[:-9], False),
        (b"", False),
        (b"no archive", False),
    ],
    ids=["whole", "half a list", "half an archive", "empty", "no archive"],
)
def test_a_trace_is_whole_or_it_is_none(tmp_path, held, whole):
    (tmp_path / "trace.json.gz").write_bytes(held)
    assert profiling.is_trace(tmp_path / "trace.json.gz") is whole


def test_the_writing_of_a_profile_is_left_out_of_the_time_of_steps(tmp_path, monkeypatch):
    now = [0.0]

    def slowly(trace, path):
        now[0] += 100.0
        Path(path).write_bytes(gzip.compress(b"{}"))

    monkeypatch.setattr(profiling.profile, "export_chrome_trace", slowly)
    clock = TrainingClock(0, now=lambda: now[0])
    profiler = StepProfiler(ProfileConfig(steps=[1]), tmp_path, 0, torch.device("cpu"), lambda line: None)
    with profiler.of_step(1, clock.paused):
        now[0] += 2.0
    assert clock.lap(1) == 2.0


def test_a_run_s_clock_stands_still_while_a_profile_is_written(shards, tmp_path, monkeypatch):
    clocks, paused, begin, export = [], [], TrainingClock.__init__, profiling.profile.export_chrome_trace

    def noted(clock, *given, **named):
        clocks.append(clock)
        begin(clock, *given, **named)

    def exported(trace, path):
        paused.append([clock for clock in clocks if clock._pause_start is not None])
        export(trace, path)

    monkeypatch.setattr(TrainingClock, "__init__", noted)
    monkeypatch.setattr(profiling.profile, "export_chrome_trace", exported)
    train(configured(shards, tmp_path / "run", 15))
    assert [len(found) for found in paused] == [1]
