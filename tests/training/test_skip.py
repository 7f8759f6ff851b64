"""training/skip.py: what is skipped, what is not, and that a skipped step changes no bit of weights and moments."""

import math
from pathlib import Path

import pytest
import torch

import training.trainer
from models.decoder import Decoder
from models.initialization import initialize
from tests.shards import tiny_config, write_shards
from training.checkpoint import find_checkpoints, read_marker
from training.config import OptimizerConfig, TrainingError
from training.metrics import read_metrics
from training.optimizer import build_optimizer, moments
from training.skip import SpikeFilter
from training.step_metrics import Numbers
from training.trainer import train

CPU = torch.device("cpu")


def judged(spikes, *pairs):
    """Which of the (loss, gradient norm) pairs are skipped."""
    return [bool(spikes.judge(torch.tensor(float(a)), torch.tensor(float(b)))) for a, b in pairs]


def filled(window=8, sigmas=6.0):
    """A filter that has seen a window of losses around 3 and norms around 1."""
    spikes = SpikeFilter(window, sigmas, CPU)
    assert not any(judged(spikes, *((3 + 0.1 * (i % 3), 1 + 0.05 * (i % 2)) for i in range(window))))
    return spikes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_is_skipped_from_the_first_step_and_enters_nothing(bad, which):
    spikes = SpikeFilter(8, 6.0, CPU)
    pair = [3.0, 1.0]
    pair[which] = bad
    assert judged(spikes, pair, (3, 1), pair) == [True, False, True]
    assert (spikes.in_a_row, *map(int, spikes.counts())) == (1, 2, 1)
    assert all(values.isfinite().all() for values in spikes.state().values())
    assert int(spikes.state()["entered"]) == 1


def test_a_spike_of_either_is_skipped_and_six_deviations_are_the_limit():
    losses = [3 + 0.1 * (i % 3) for i in range(8)]
    limit = torch.tensor(losses).mean() + 6 * torch.tensor(losses).std(unbiased=False)
    assert judged(filled(), (limit * 1.001, 1)) == [True]
    assert judged(filled(), (limit * 0.999, 1)) == [False]
    assert judged(filled(), (3, 1.2)) == [True]
    assert judged(filled(), (1, 0.1)) == [False], "low values are no spikes"


def test_half_a_window_must_be_known():
    spikes = SpikeFilter(8, 6.0, CPU)
    assert judged(spikes, (3, 1), (3.1, 1), (3, 1), (100, 1)) == [False] * 4
    spikes = SpikeFilter(8, 6.0, CPU)
    assert judged(spikes, (3, 1), (3.1, 1), (3, 1), (3.1, 1), (100, 1)) == [False] * 4 + [True]


def test_a_spike_does_not_blind_the_filter_to_the_next():
    assert judged(filled(), (1e6, 1), (3, 1), (1e6, 1)) == [True, False, True]


def test_a_number_whose_square_is_none_leaves_no_nan_in_the_window():
    spikes = SpikeFilter(8, 6.0, CPU)
    judged(spikes, (3, 1), (3, 1e30), *[(3 + 0.1 * (i % 3), 1) for i in range(12)])
    assert spikes.state()["values"].isfinite().all()
    assert judged(spikes, (3, 1e6)) == [True]


def test_a_new_level_is_taken_for_normal_after_some_steps():
    skipped = judged(filled(), *[(5, 1)] * 20)
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)


def test_sigmas_of_zero_skip_only_what_is_no_number():
    assert judged(filled(sigmas=0.0), (1e6, 1e6), (math.nan, 1)) == [False, True]


def test_the_window_of_a_checkpoint_protects_the_next_step():
    saved = {name: tensor.clone() for name, tensor in filled().state().items()}
    fresh = SpikeFilter(8, 6.0, CPU)
    for name, tensor in fresh.state().items():
        tensor.copy_(saved[name])
    assert judged(fresh, (100, 1)) == [True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_keeps_every_bit_of_weights_moments_and_step_count(bad):
    model = Decoder(tiny_config(Path("shards"), Path("run")).model)
    initialize(model, 0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))

    def step(gradient, skip):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.found_inf = torch.tensor(float(skip))
        optimizer.step()

    def everything():
        tensors = [*model.parameters(), *(t for state in moments(model, optimizer).values() for t in state.values())]
        return [t.detach().clone() for t in tensors]

    step(0.5, skip=False)
    before = everything()
    step(bad, skip=True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(0.5, skip=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def poisoned(monkeypatch, bad_steps, factor=math.nan):
    """The gradients of these steps, counted from 1, are multiplied by `factor`."""
    original = torch.nn.utils.get_total_norm
    calls = iter(range(1, 10**6))

    def total_norm(gradients):
        if next(calls) in bad_steps:
            for gradient in gradients:
                gradient.mul_(factor)
        return original(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", total_norm)


def test_a_run_skips_a_bad_step_counts_it_and_goes_on_with_finite_losses(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    poisoned(monkeypatch, {4})
    train(config)
    records = {r["step"]: r for r in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert math.isnan(records[4]["train/grad_norm"])
    assert [records[s]["train/skipped_steps"] for s in (3, 4, 5, 20)] == [0, 1, 1, 1]
    assert all(math.isfinite(records[s]["train/loss"]) for s in range(1, 21))
    assert records[20]["validation/mean/loss"] < records[0]["validation/mean/loss"] - 0.1


def test_a_spike_of_the_gradient_is_skipped_after_a_resume_too(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.skip_window, config.training.stop_at = 8, 10
    train(config)
    config.training.stop_at = None
    poisoned(monkeypatch, {1}, factor=1e4)
    train(config)
    records = {r["step"]: r for r in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert records[11]["train/grad_norm"] > 1e3
    assert records[11]["train/skipped_steps"] == records[10]["train/skipped_steps"] + 1


@pytest.mark.parametrize("change", ["batch", "data", "z_loss"])
def test_what_another_batch_or_other_data_bring_after_a_resume_is_no_spike(change, shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.skip_window, config.training.stop_at = 8, 10
    train(config)
    config.training.stop_at = 12
    if change == "batch":
        config.training.global_batch_size *= 2
    elif change == "data":
        config.data.path = str(write_shards(tmp_path / "other", seed=7))
    else:
        config.model.z_loss *= 2
    config.checkpoint.allow_changes = ["training.global_batch_size", "data", "model.z_loss"]
    poisoned(monkeypatch, {1}, factor=1e4)
    train(config)
    records = {r["step"]: r for r in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert records[11]["train/grad_norm"] > 1e3
    assert records[12]["train/skipped_steps"] == records[10]["train/skipped_steps"]


def test_a_checkpoint_waits_for_the_end_of_a_streak(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at, config.checkpoint.every, config.checkpoint.permanent_every = 9, 4, 4
    poisoned(monkeypatch, {4, 5})
    train(config)
    saved = {p.name: read_marker(p).state.permanent for p in find_checkpoints(tmp_path / "run")}
    assert saved == {"step-6": True, "step-8": True, "step-9": False}


def test_too_many_in_a_row_end_the_run_with_the_checkpoint_from_before(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.skip_limit, config.checkpoint.every, config.checkpoint.keep = 3, 2, 1
    poisoned(monkeypatch, set(range(6, 20)))
    with pytest.raises(TrainingError, match=r"diverged: 3 steps in a row up to step 8.*last saved: step 4;"):
        train(config)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]
    monkeypatch.undo()
    train(config)  # the same command goes on from there
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["train/skipped_steps"] == 0


def test_too_many_in_a_row_are_seen_though_the_loop_looks_only_after_they_have_ended(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.skip_limit, config.checkpoint.every, config.logging.every = 3, 4, 10
    config.evaluation.every = 0
    poisoned(monkeypatch, {5, 6, 7})
    with pytest.raises(TrainingError, match=r"diverged: 3 steps in a row up to step 8.*last saved: step 4;"):
        train(config)
    assert [p.name for p in find_checkpoints(tmp_path / "run")][-1] == "step-4"


def test_a_run_whose_last_steps_were_skipped_says_so(shards, tmp_path, monkeypatch, capsys):
    config = tiny_config(shards, tmp_path / "run")
    poisoned(monkeypatch, {config.training.steps - 1, config.training.steps})
    train(config)
    assert "warning: the last 2 steps were skipped: the weights are those of before them" in capsys.readouterr().out


def test_the_loop_asks_the_device_only_where_it_logs_or_saves(shards, tmp_path, monkeypatch):
    """`item` on the loss or the filter would be a wait of the host in each step."""
    asked = []
    read = Numbers.read
    monkeypatch.setattr(Numbers, "read", lambda self: asked.append(1) or read(self))
    for name in ("in_a_row", "longest"):
        original = getattr(SpikeFilter, name)
        reading = property(lambda self, o=original: asked.append(1) or o.fget(self))
        monkeypatch.setattr(training.trainer.SpikeFilter, name, reading)
    config = tiny_config(shards, tmp_path / "run")
    config.logging.every = config.checkpoint.every = 100
    config.evaluation.every = 0
    config.training.steps = 6
    train(config)
    assert 1 <= len(asked) <= 5  # at the end: record, check, checkpoint, warning
