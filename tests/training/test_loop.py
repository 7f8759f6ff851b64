"""The training loop against a second one, written plainly: whole batches, no FSDP, no accumulation, torch's own parts.

`plain` below takes from the project the model and the data alone; loss, optimizer groups, clipping and schedule are
written out. The settings make every part matter: a clip that always cuts, an eps as large as the clipped gradients
(without one, AdamW does not see their scale), a heavy z-loss and weight decay, betas of our own.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

from data.order import InstanceOrder
from data.shards import TokenDataset
from models.decoder import Decoder
from models.initialization import initialize
from tests.shards import tiny_config
from training.metrics import read_metrics
from training.trainer import train

STEPS, BATCH, SEED = 5, 4, 3
LR, WARMUP, FINAL = 1e-2, 2, 0.1
BETAS, EPS, WEIGHT_DECAY = (0.8, 0.7), 1e-4, 0.5
MAX_NORM, Z_LOSS = 0.05, 0.02


def configured(shards, run_dir):
    config = tiny_config(shards, run_dir)
    config.model.z_loss = Z_LOSS
    config.training.steps, config.training.global_batch_size, config.training.seed = STEPS, BATCH, SEED
    config.training.max_grad_norm = MAX_NORM
    config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay = LR, EPS, WEIGHT_DECAY
    config.optimizer.beta1, config.optimizer.beta2 = BETAS
    config.schedule.name, config.schedule.warmup_steps, config.schedule.final_lr_ratio = "cosine", WARMUP, FINAL
    config.evaluation.every, config.checkpoint.every = 0, STEPS
    return config


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """Records and final weights of the plain loop."""
    config = configured(shards, tmp_path_factory.mktemp("never"))
    model = Decoder(config.model)
    initialize(model, SEED)
    dataset = TokenDataset(shards / "train", config.data.sequence_length)
    order = InstanceOrder(SEED, len(dataset))
    named = dict(model.named_parameters())
    embedding = named.pop("embedding.weight")
    optimizer = torch.optim.AdamW(
        [
            {"params": list(named.values()), "weight_decay": WEIGHT_DECAY},
            {"params": [embedding], "weight_decay": 0.0},
        ],
        betas=BETAS,
        eps=EPS,
    )
    records = []
    for step in range(1, STEPS + 1):
        instances = order.order(np.arange((step - 1) * BATCH, step * BATCH))
        rows = torch.from_numpy(np.stack([dataset[i] for i in instances]))
        logits = model(rows[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, rows[:, 1:].flatten())
        z_loss = Z_LOSS * logits.exp().sum(-1).log().square().mean()
        (loss + z_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if step <= WARMUP:
            lr = LR * step / WARMUP
        else:
            cosine = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
            lr = LR * (FINAL + (1 - FINAL) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        records.append(
            {
                "step": step,
                "train/loss": loss.item(),
                "train/z_loss": z_loss.item(),
                "train/grad_norm": norm.item(),
                "train/lr": lr,
            }
        )
    return records, {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda n: f"micro_batch_size={n}")
def run_dir(request, shards, tmp_path_factory):
    """A run of `training.trainer.train` with the same settings. Read only."""
    config = configured(shards, tmp_path_factory.mktemp("loop") / "run")
    config.training.micro_batch_size = request.param
    train(config)
    return Path(config.run.dir)


def test_every_step_has_the_loss_the_norm_and_the_rate_of_the_plain_loop(plain, run_dir):
    expected, _ = plain
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [{key: record[key] for key in expected[0]} for record in records] == [
        pytest.approx(record, rel=1e-5) for record in expected
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_last_weights_are_those_of_the_plain_loop(plain, run_dir):
    _, expected = plain
    loaded = {name: torch.full_like(weight, math.nan) for name, weight in expected.items()}
    dcp.load({"model": loaded}, checkpoint_id=run_dir / "checkpoints" / f"step-{STEPS}", no_dist=True)
    for name, weight in expected.items():
        error = ((loaded[name] - weight).norm() / weight.norm()).item()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_the_settings_leave_nothing_out(plain):
    """What the two comparisons above rely on: every part of a step counts at every step."""
    records, weights = plain
    for record in records:
        assert record["train/grad_norm"] > 2 * MAX_NORM, "clipping must cut"
        assert record["train/z_loss"] > 0.05 * record["train/loss"], "z-loss must weigh"
    for key in ("train/loss", "train/grad_norm", "train/lr"):
        assert len({round(record[key], 6) for record in records}) == STEPS, f"{key} must tell one step from another"
    assert all(weight.isfinite().all() for weight in weights.values())
