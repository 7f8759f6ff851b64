"""What a run does with its data: documents, packing and mixtures reach the loss, other data is refused, a lost file
stops the run with a checkpoint."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import training.trainer
from data.loader import BatchLoader
from data.mixture import InstanceStream
from data.packing import PackedDataset
from data.shards import TokenDataset
from models.config import ConfigError
from models.decoder import Decoder
from models.initialization import initialize
from tests.shards import EOS, tiny_config, write_shards
from training.checkpoint import find_checkpoints
from training.compose import plan
from training.config import MixtureEntry, TrainingError
from training.data import open_stream
from training.metrics import read_metrics
from training.trainer import train

TIMED = ("throughput/", "memory/", "time/")


def untimed(run_dir):
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in records]


def short(shards, run_dir, **data):
    """A run of two steps of eight instances, without evaluation."""
    config = tiny_config(shards, run_dir)
    config.training.steps, config.training.global_batch_size, config.evaluation.every = 2, 8, 0
    config.data = dataclasses.replace(config.data, **data)
    return config


def document_losses(model, rows):
    """Cross-entropy of every target inside its document, each document computed alone."""
    losses = []
    for row in rows:
        ids = [int(i) if i >= 0 else ~int(i) for i in row]
        ends = [i + 1 for i, token in enumerate(ids[:-1]) if token == EOS]
        for begin, end in zip([0, *ends], [*ends, len(ids) - 1], strict=True):
            logits = model(torch.tensor([ids[begin:end]]))[0] if end > begin else []
            for place, line in zip(range(begin, end), logits, strict=True):
                if row[place + 1] >= 0:
                    losses.append(F.cross_entropy(line, torch.tensor(ids[place + 1])))
    return torch.stack(losses)


@pytest.mark.parametrize(("packing", "micro_batch_size"), [("none", 4), ("best_fit", 1), ("best_fit", 4)])
def test_the_loss_of_a_step_is_the_mean_over_the_targets_of_documents_alone(
    packing, micro_batch_size, tmp_path, monkeypatch
):
    shards = write_shards(tmp_path / "shards")
    config = short(shards, tmp_path / "run", document_mask=True, packing=packing, sequence_length=64)
    config.training.micro_batch_size, config.training.max_grad_norm = micro_batch_size, 0.0
    train(config)
    kind = PackedDataset if packing == "best_fit" else TokenDataset
    stream = InstanceStream([kind(shards / "train", 64)], [1], config.training.seed)
    rows = stream.rows(*stream.locate(np.arange(8)))
    if packing == "best_fit":
        counts = (rows[:, 1:] >= 0).sum(1)
        assert counts.min() < counts.max(), "instances must differ for the mean to tell"
    model = Decoder(config.model)
    initialize(model, config.training.seed)
    losses = document_losses(model, rows)
    z_loss = config.model.z_loss
    assert z_loss > 0
    record = untimed(config.run.dir)[0]
    assert record["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    config.model.z_loss = 0.0
    config.run.dir = str(tmp_path / "without_z")
    train(config)
    losses.mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert untimed(config.run.dir)[0]["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_document_masks_are_off_by_default_and_reach_validation(shards, tmp_path):
    losses = {}
    for mask in (False, True):
        config = tiny_config(shards, tmp_path / f"mask-{mask}")
        config.training.steps = 1
        assert config.data.document_mask is False
        config.data.document_mask = mask
        train(config)
        losses[mask] = untimed(config.run.dir)[0]["validation/even/loss"]
    assert losses[True] != losses[False]


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Three shards directories of different sizes."""
    root = tmp_path_factory.mktemp("domains")
    return [write_shards(root / f"domain{i}", documents=20 + 15 * i, seed=i) for i in range(3)]


def mixed(domains, run_dir, weights=(0.5, 0.3, 0.2)):
    config = tiny_config("", run_dir)
    config.data.mixture = [MixtureEntry(str(path), weight) for path, weight in zip(domains, weights, strict=True)]
    return config


def test_a_mixture_trains_resumes_and_validates_every_domain(domains, tmp_path):
    whole, halves = mixed(domains, tmp_path / "whole"), mixed(domains, tmp_path / "halves")
    for config in (whole, halves):
        config.training.steps, config.evaluation.every, config.evaluation.instances = 10, 5, 2
    train(whole)
    halves.training.stop_at = 5
    train(halves)
    halves.training.stop_at = None
    moved = [shutil.copytree(path, tmp_path / "moved" / path.name) for path in domains]
    halves.data.mixture = mixed(moved, tmp_path / "halves", (5, 3, 2)).data.mixture  # elsewhere, same proportions
    train(halves)
    assert untimed(whole.run.dir) == untimed(halves.run.dir)
    for number in range(3):
        assert f"validation/domain{number}-even/loss" in untimed(whole.run.dir)[0]


def test_other_shares_or_tokens_on_resume_are_refused_with_the_difference_and_can_be_allowed(domains, tmp_path):
    config = mixed(domains, tmp_path / "run")
    config.training.stop_at, config.evaluation.every = 5, 0
    train(config)
    config.training.stop_at = None
    shares = mixed(domains, tmp_path / "run", (0.6, 0.2, 0.2))
    shares.evaluation.every = 0
    with pytest.raises(ConfigError, match=r"share 1/2 → 3/5.*checkpoint\.allow_changes=\[data\]"):
        train(shares)
    tokens = mixed([domains[0], domains[1], write_shards(tmp_path / "new", seed=7)], tmp_path / "run")
    tokens.evaluation.every = 0
    with pytest.raises(ConfigError, match=r"domain2/train → .*new/train: fingerprint \w+ → \w+, documents 50 → 60"):
        train(tokens)
    before = open_stream(config).fingerprint
    tokens.checkpoint.allow_changes = ["data"]
    tokens.training.stop_at = 10
    train(tokens)
    assert [record["step"] for record in untimed(config.run.dir)] == list(range(1, 11))
    tokens.checkpoint.allow_changes = []  # the new data is the run's from now on
    tokens.training.stop_at = 12
    train(tokens)
    with pytest.raises(ConfigError, match="was trained on other data"):
        train(config)
    assert open_stream(tokens).fingerprint != before


def test_a_file_that_disappears_stops_the_run_with_a_checkpoint_and_put_back_it_goes_on(shards, tmp_path, monkeypatch):
    whole = tiny_config(shards, tmp_path / "whole")
    copy = shutil.copytree(shards, tmp_path / "copy")
    config = tiny_config(copy, tmp_path / "run")
    whole.evaluation.every = config.evaluation.every = 0
    train(whole)
    lost, kept = copy / "train" / "00001.bin", tmp_path / "kept.bin"
    original = training.trainer.Trainer._record

    def record(self, *given):
        original(self, *given)
        if self.state.step == 6 and lost.exists():
            os.rename(lost, kept)

    monkeypatch.setattr(training.trainer.Trainer, "_record", record)
    with pytest.raises(TrainingError, match=r"00001\.bin cannot be read any more .*stopped after step \d+, with a"):
        train(config)
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    assert 6 <= int(checkpoint.name.removeprefix("step-")) < 20
    os.rename(kept, lost)
    train(config)
    assert untimed(config.run.dir) == untimed(whole.run.dir)


@pytest.mark.parametrize(("lost_at", "where"), [(0, "before its first step"), (2, "after step 2, with a checkpoint")])
def test_validation_that_disappears_stops_the_run_with_a_checkpoint_and_put_back_it_is_evaluated(
    lost_at, where, shards, tmp_path, monkeypatch
):
    copy = shutil.copytree(shards, tmp_path / "copy")
    config = tiny_config(copy, tmp_path / "run")
    config.training.steps, config.evaluation.every, config.evaluation.instances = 3, 2, 1
    lost, kept = copy / "validation" / "odd" / "00000.bin", tmp_path / "kept.bin"
    original = training.trainer.Trainer._evaluate_and_record

    def evaluate_and_record(self, values):
        if self.state.step == lost_at:
            os.rename(lost, kept)
        original(self, values)

    with monkeypatch.context() as losing:
        losing.setattr(training.trainer.Trainer, "_evaluate_and_record", evaluate_and_record)
        with pytest.raises(TrainingError, match=rf"odd/00000\.bin cannot be read any more .* has stopped {where}"):
            train(config)
    checkpoints = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert checkpoints == ([f"step-{lost_at}"] if lost_at else [])
    os.rename(kept, lost)
    train(config)
    evaluated = [record["step"] for record in untimed(config.run.dir) if "validation/odd/loss" in record]
    assert evaluated == [0, 2, 3]


def test_a_mixture_is_written_on_the_command_line_and_kept_in_the_run_directory(domains, tmp_path):
    entries = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in zip(domains, (5, 3, 2), strict=True))
    (job,) = plan(["model=moda_tiny", "data=mixture", f"data.mixture=[{entries}]"]).jobs
    assert job.config.data.mixture == [MixtureEntry(str(p), w) for p, w in zip(domains, (5.0, 3.0, 2.0), strict=True)]
    job.config.validate()
    tree = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(job.config)))
    assert tree["data"]["mixture"][0] == {"path": str(domains[0]), "weight": 5.0}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("data.mixture=[{path: a, wieght: 1}]", "unknown key `data.mixture[].wieght`: did you mean"),
        ("data.mixture=[{path: a, weight: much}]", "data.mixture[].weight=much has the wrong type: use a number."),
        ("data.mixture=a", "data.mixture=a has the wrong type: use a list such as"),
        (
            "data.mixture={path: a}",
            "data.mixture={path: a} has the wrong type: use a list such as [{path: ..., weight: ...}].",
        ),
    ],
)
def test_a_mistake_in_a_mixture_is_one_sentence(typed, message):
    with pytest.raises(ConfigError) as caught:
        plan(["model=moda_tiny", "data=mixture", typed])
    assert str(caught.value).startswith(message)


def test_another_batch_size_on_resume_goes_on_with_the_same_stream(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.evaluation.every, config.training.stop_at = 0, 5
    asked = []
    original = BatchLoader.prefetch

    def prefetch(self, position):
        asked.append((position, self.global_batch_size))
        original(self, position)

    monkeypatch.setattr(BatchLoader, "prefetch", prefetch)
    train(config)
    config.training.stop_at, config.training.global_batch_size = 8, 16
    with pytest.raises(ConfigError, match=r"training\.global_batch_size"):
        train(config)
    config.checkpoint.allow_changes = ["training.global_batch_size"]
    train(config)
    first, second = asked[:5], asked[6:9]  # each start also reads one batch ahead of its end
    assert first == [(4 * step, 4) for step in range(5)]
    assert second == [(20 + 16 * step, 16) for step in range(3)]
    assert [record["tokens"] for record in untimed(config.run.dir)][-1] == (20 + 3 * 16) * 16
