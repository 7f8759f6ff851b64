"""Whole runs of a two-layer model on one process: what they leave, how they resume, what they refuse."""

import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import weakref

import pytest
import torch

import training.trainer
from models.config import ConfigError
from tests.shards import tiny_config, write_shards
from tests.training.runs import untimed
from training.checkpoint import find_checkpoints
from training.config import TrainingError
from training.lock import run_lock
from training.metrics import read_metrics
from training.optimizer import build_optimizer
from training.preflight import preflight
from training.trainer import train


def test_a_run_learns_and_leaves_a_directory_that_stands_alone(finished):
    records = untimed(finished)
    assert [r["step"] for r in records] == list(range(21))
    assert [r["tokens"] for r in records] == [64 * step for step in range(21)]
    assert records[-1]["train/loss"] < records[1]["train/loss"] - 0.1
    for step in (0, 10, 20):
        for key in ("validation/even/loss", "validation/odd/bits_per_byte", "validation/mean/perplexity"):
            assert key in records[step]
    assert "train/loss" not in records[0]
    assert {"train/loss", "train/z_loss", "train/grad_norm", "train/lr"} <= records[10].keys()
    assert records[20]["validation/mean/loss"] < records[0]["validation/mean/loss"] - 0.1
    for name in ("config.yaml", "versions.json", "summary.json", "curves.png"):
        assert (finished / name).stat().st_size > 0
    assert [p.name for p in find_checkpoints(finished)] == ["step-10", "step-20"]
    assert json.loads((finished / "summary.json").read_text())["stopped_at"] == 20


def test_a_stop_and_a_resume_give_the_bits_of_one_go(shards, finished, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at = 10
    train(config)
    assert len(untimed(config.run.dir)) == 11
    config.training.stop_at = None
    train(config)
    assert untimed(config.run.dir) == untimed(finished)


def test_a_kill_between_checkpoints_loses_nothing(shards, finished, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    train_until_killed(config, step=17)
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-10"]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 17
    train(config)
    assert untimed(config.run.dir) == untimed(finished)


def train_until_killed(config, step):
    """Train in a process that dies by SIGKILL once `step` is logged."""
    child = multiprocessing.get_context("spawn").Process(target=_train_and_die, args=(config, step))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL


def _train_and_die(config, step):
    os.environ.pop("WANDB_SERVICE", None)  # the parent's, if it has one: a service of its own dies with this process
    original = training.trainer.Trainer._record

    def record(self, *given):
        original(self, *given)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    training.trainer.Trainer._record = record
    train(config)


def test_a_checkpoint_without_its_marker_is_not_continued(shards, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "checkpoints" / "step-20" / "checkpoint.json").unlink()
    train(tiny_config(shards, run_dir))
    assert untimed(run_dir) == untimed(finished)
    assert [p.name for p in find_checkpoints(run_dir)] == ["step-10", "step-20"]


def test_a_finished_run_started_again_changes_no_record(shards, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    train(tiny_config(shards, run_dir))
    assert untimed(run_dir) == untimed(finished)


def test_resume_from_a_path_continues_in_another_directory_and_then_from_its_own_checkpoints(
    shards, finished, tmp_path
):
    config = tiny_config(shards, tmp_path / "fork")
    base = shutil.copytree(finished, tmp_path / "base")
    config.checkpoint.resume = str(base / "checkpoints" / "step-10")
    config.checkpoint.every, config.training.stop_at = 5, 15
    train(config)
    base.rename(tmp_path / "gone")  # as when the run that it comes from goes on
    config.training.stop_at = None
    train(preflight(config))
    records = untimed(config.run.dir)
    assert [r["step"] for r in records] == list(range(11, 21))
    assert [r["train/loss"] for r in records] == [r["train/loss"] for r in untimed(finished)[11:]]


def test_a_run_that_begins_with_a_checkpoint_takes_over_no_records_of_an_earlier_one(shards, finished, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at = 3
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had been killed before the first
    (tmp_path / "run" / "summary.json").unlink()
    config.checkpoint.resume, config.training.stop_at = str(finished / "checkpoints" / "step-10"), 12
    config.model.norm = "pre"
    with pytest.raises(ConfigError, match=r"run cannot be continued[^/]*model\.norm +reordered +pre"):
        train(config)
    config.model.norm = "reordered"
    train(config)
    assert [record["step"] for record in untimed(config.run.dir)] == [11, 12]


def test_going_back_behind_newer_checkpoints_of_the_same_run_is_refused(shards, finished):
    config = tiny_config(shards, finished)
    config.checkpoint.resume = str(finished / "checkpoints" / "step-10")
    with pytest.raises(ConfigError, match="older than step-20 of the same run"):
        train(config)


def test_one_wandb_run_over_kills_before_and_after_the_first_checkpoint(shards, finished, tmp_path):
    from tests.training.test_tracking import read_offline

    config = tiny_config(shards, tmp_path / "run")
    config.logging.wandb.mode = "offline"
    train_until_killed(config, step=4)
    train_until_killed(config, step=13)
    train(config)
    runs = read_offline(tmp_path / "run")
    assert len(runs) == 1
    (records,) = runs.values()
    assert [record["step"] for record in records] == list(range(21))
    for record, logged in zip(records, read_metrics(tmp_path / "run" / "metrics.jsonl"), strict=True):
        assert record.keys() == logged.keys()
        for key, value in logged.items():
            assert record[key] == pytest.approx(value, rel=1e-9), key
    assert untimed(config.run.dir) == untimed(finished)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.training, "micro_batch_size", 4),
        lambda c: setattr(c.parallel, "activation_checkpointing", "full"),
        lambda c: setattr(c.logging, "every", 5),
        lambda c: setattr(c.checkpoint, "keep", 1),
    ],
    ids=["micro_batch_size", "activation_checkpointing", "logging.every", "checkpoint.keep"],
)
def test_what_may_differ_on_resume_changes_no_loss(change, shards, finished, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at = 10
    train(config)
    config.training.stop_at = None
    change(config)
    train(config)
    want = {record["step"]: record["train/loss"] for record in untimed(finished)[1:]}
    got = {record["step"]: record["train/loss"] for record in untimed(config.run.dir)[1:]}
    assert got == pytest.approx({step: want[step] for step in got}, rel=1e-5)
    assert 20 in got


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c.optimizer, "lr", 1e-3), r"optimizer\.lr +0.01 +0.001"),
        (lambda c: setattr(c.model, "norm", "pre"), r"model\.norm +reordered +pre"),
        (lambda c: setattr(c.training, "seed", 7), r"training\.seed +0 +7"),
        (lambda c: setattr(c.training, "steps", 40), r"training\.steps +20 +40"),
        (lambda c: setattr(c.checkpoint, "resume", "never"), r"checkpoint.resume=never would overwrite"),
        (lambda c: setattr(c.checkpoint, "resume", "/nowhere"), r"checkpoint.resume=/nowhere is no whole checkpoint"),
    ],
    ids=["lr", "norm", "seed", "steps", "never", "path"],
)
def test_a_resume_that_would_be_another_run_is_refused_and_loses_nothing(change, words, shards, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    config = tiny_config(shards, finished)
    change(config)
    with pytest.raises(ConfigError, match=words):
        train(config)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_other_data_on_resume_is_refused(finished, tmp_path):
    config = tiny_config(write_shards(tmp_path / "other", seed=1), finished)
    with pytest.raises(ConfigError, match="was trained on other data"):
        train(config)


def test_another_tokenizer_is_refused_where_other_tokens_are_allowed(finished, tmp_path):
    config = tiny_config(write_shards(tmp_path / "other", seed=1, tokenizer="1" * 64), finished)
    config.checkpoint.allow_changes = ["data"]
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(config)


def test_the_same_data_elsewhere_is_accepted(shards, finished, tmp_path):
    shutil.copytree(shards, tmp_path / "moved")
    shutil.copytree(finished, tmp_path / "run")
    train(tiny_config(tmp_path / "moved", tmp_path / "run"))
    assert untimed(tmp_path / "run") == untimed(finished)


def test_old_checkpoints_are_deleted_and_the_newest_kept(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.checkpoint.every, config.checkpoint.keep = 8, 2, 2
    train(config)
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-6", "step-8"]


def test_a_stop_between_intervals_leaves_a_checkpoint_there(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at = 3
    train(config)
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-3"]


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_continued(shards, finished, tmp_path, capsys, damage):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    file = next((run_dir / "checkpoints" / "step-20").glob("*.distcp"))
    file.unlink() if damage == "missing" else os.truncate(file, 1000)
    train(tiny_config(shards, run_dir))
    printed = capsys.readouterr()
    assert "step-20 is damaged" in printed.err
    assert "step-10 at step 10" in printed.out
    assert untimed(run_dir) == untimed(finished)


def test_a_signal_right_after_a_resume_does_not_touch_the_only_checkpoint(shards, finished, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-20")
    before = {p: p.stat().st_mtime_ns for p in (run_dir / "checkpoints").rglob("*")}
    original = training.trainer.Trainer._restore

    def restore(self, checkpoint):
        original(self, checkpoint)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.trainer.Trainer, "_restore", restore)
    with pytest.raises(SystemExit):
        train(tiny_config(shards, run_dir))
    assert {p: p.stat().st_mtime_ns for p in (run_dir / "checkpoints").rglob("*")} == before


def test_records_without_a_checkpoint_are_not_overwritten_by_another_configuration(shards, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "summary.json").unlink()
    config = tiny_config(shards, run_dir)
    config.model.norm = "pre"
    with pytest.raises(ConfigError, match=r"model\.norm +reordered +pre"):
        train(config)
    assert untimed(run_dir) == untimed(finished)
    train(tiny_config(shards, run_dir))
    assert untimed(run_dir) == untimed(finished)


def test_a_resume_path_that_the_run_did_not_begin_with_is_refused(shards, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    config = tiny_config(shards, finished)
    config.checkpoint.resume = str(tmp_path / "other" / "checkpoints" / "step-10")
    with pytest.raises(ConfigError, match=r"is not what the run in .* began with"):
        train(config)


def test_a_second_process_in_a_run_directory_is_refused(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    words = f"in use by process {os.getpid()} on .*: wait for it to end, or choose another run\\.dir\\.$"
    with run_lock(tmp_path / "run"), pytest.raises(ConfigError, match=words):
        train(config)
    train(config)  # and free again


def test_a_run_that_diverges_stops_before_it_saves_and_keeps_what_was_good(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at, config.checkpoint.every, config.checkpoint.keep = 5, 5, 1
    train(config)
    config.training.stop_at, config.training.skip_limit = None, 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.trainer, "lr_factor", lambda *_: 1e30)
        with pytest.raises(TrainingError, match=r"diverged: 3 steps.*last saved: step 5"):
            train(config)
    assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-5"]
    assert math.isnan(read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["train/loss"])


def test_the_random_state_is_that_of_the_checkpoint(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at = 10
    states = []
    original = training.trainer.Trainer.fit

    def fit(self):
        states.append(torch.get_rng_state())
        if len(states) == 1:
            torch.manual_seed(77)
        original(self)

    monkeypatch.setattr(training.trainer.Trainer, "fit", fit)
    train(config)
    config.training.stop_at = None
    train(config)
    assert torch.equal(states[1], torch.manual_seed(77).get_state())


def test_elapsed_time_goes_on_after_a_resume(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.training.stop_at = 8, 4
    train(config)
    config.training.stop_at = None
    train(config)
    elapsed = [r["time/elapsed_seconds"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert elapsed == sorted(elapsed)


def test_a_change_that_is_allowed_by_name_is_taken_and_others_are_still_refused(shards, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-20")
    config = tiny_config(shards, run_dir)
    config.optimizer.lr, config.optimizer.weight_decay = 1e-3, 0.0
    config.checkpoint.allow_changes = ["optimizer.lr"]
    with pytest.raises(ConfigError, match=r"allow_changes=\[optimizer\.lr,optimizer\.weight_decay\]"):
        train(config)
    config.checkpoint.allow_changes = ["optimizer.lr", "optimizer.weight_decay", "training.seed"]
    with pytest.raises(ConfigError, match=r"allow_changes=\[training\.seed\] can never be"):
        train(config)
    config.checkpoint.allow_changes = ["optimizer.lr", "optimizer.weight_decay"]
    train(config)
    assert untimed(run_dir)[11]["train/lr"] == pytest.approx(untimed(finished)[11]["train/lr"] / 10)
    config.training.seed = 3
    with pytest.raises(ConfigError, match=r"training\.seed +0 +3 +cannot change"):
        train(config)
    for run_name in (run_dir.name, "new"):
        config.run.dir = str(tmp_path / run_name)
        for word in ("optimiser.lr", "optimizer.lrr", "training.stepss", "dataa", "optimizer"):
            config.checkpoint.allow_changes = [word]
            with pytest.raises(ConfigError, match=rf"allow_changes=\[{word}\] names no key: name data, optimizer\.KEY"):
                train(config)


def test_a_job_of_a_sweep_does_not_keep_the_weights_of_the_one_before(shards, tmp_path, monkeypatch):
    weights, alive = [], []

    def build(model, config):
        alive.append([weight() is not None for weight in weights])
        weights.append(weakref.ref(model.embedding.weight))
        return build_optimizer(model, config)

    monkeypatch.setattr(training.trainer, "build_optimizer", build)
    gc.disable()
    try:
        for name in "ab":
            config = tiny_config(shards, tmp_path / name)
            config.training.steps = 2
            train(config)
    finally:
        gc.enable()
    assert alive == [[], [False]]


def test_sparse_logging_and_evaluation_keep_their_steps(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.logging.every, config.evaluation.every = 11, 4, 5
    train(config)
    records = untimed(config.run.dir)
    assert [r["step"] for r in records] == [0, 4, 5, 8, 10, 11]
    assert [r["step"] for r in records if "validation/mean/loss" in r] == [0, 5, 10, 11]


def test_without_evaluation_no_validation_is_read(shards, tmp_path):
    shutil.copytree(shards / "train", tmp_path / "shards" / "train")
    config = tiny_config(tmp_path / "shards", tmp_path / "run")
    config.training.steps, config.evaluation.every = 3, 0
    train(config)
    assert [r["step"] for r in untimed(config.run.dir)] == [1, 2, 3]
