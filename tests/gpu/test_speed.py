"""What makes steps fast, on a GPU: compiled regions and the loss kernel give the plain results, nothing stalls."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F

import models.cross_entropy
from models.accounting import memory
from models.config import ModelConfig
from models.cross_entropy import linear_cross_entropy
from models.decoder import Decoder
from models.initialization import initialize
from models.parallelize import parallelize
from tests.shards import tiny_config
from training.config import OptimizerConfig
from training.distributed import distributed_world
from training.metrics import read_metrics
from training.optimizer import build_optimizer
from training.signals import stop_on_signals
from training.trainer import Trainer, train
from training.watchdog import Watchdog


def configured(shards, run_dir, depth=True, **parallel):
    config = tiny_config(shards, run_dir)
    config.model.head_dim, config.model.hidden_size = 32, 128
    config.model.depth_kv = config.model.ffn_kv_proj = depth
    config.training.device = "cuda"
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


@pytest.mark.parametrize("vocabulary", [100352, 4999])
def test_the_loss_of_bf16_chunks_is_that_of_whole_logits_in_float64(vocabulary, monkeypatch):
    monkeypatch.setattr(models.cross_entropy, "CHUNK_BYTES", 512 * vocabulary * 2)
    torch.manual_seed(0)
    hidden = torch.randn(1300, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, 256, device="cuda") / 8).bfloat16().requires_grad_()
    targets = torch.randint(-1, vocabulary, (1300,), device="cuda")
    loss = linear_cross_entropy(hidden, weight, targets, 1e-2)
    got = torch.autograd.grad(sum(loss) / 4, (hidden, weight))
    logits, counted = hidden.double() @ weight.double().T, targets >= 0
    want = F.cross_entropy(logits[counted], targets[counted]), 1e-2 * logits.logsumexp(-1)[counted].square().mean()
    for ours, theirs in zip(loss, want, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    for ours, theirs in zip(got, torch.autograd.grad(sum(want) / 4, (hidden, weight)), strict=True):
        assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < 8e-3


@pytest.mark.parametrize("depth", [False, True], ids=["baseline", "moda"])
@pytest.mark.parametrize(("precision", "lr", "tolerance"), [("fp32", 1e-2, 1e-3), ("bf16", 1e-3, 2e-3)])
def test_compiled_and_checkpointed_runs_follow_the_plain_one(precision, lr, tolerance, depth, shards, tmp_path):
    """bf16 with a small rate: at 1e-2 AdamW's first steps, as large for tiny gradients, make any rounding grow."""
    losses = {}
    for name, parallel in {
        "plain": {"compile": False},
        "compiled": {"compile": True},
        "selective": {"compile": True, "activation_checkpointing": "selective"},
        "full": {"compile": True, "activation_checkpointing": "full"},
    }.items():
        config = configured(shards, tmp_path / name, depth, **parallel)
        config.training.precision, config.optimizer.lr = precision, lr
        train(config)
        losses[name] = {r["step"]: r["train/loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")[1:]}
    assert losses["plain"][20] < losses["plain"][1] - 10 * lr
    for name, got in losses.items():
        for step, loss in losses["plain"].items():
            assert math.isclose(got[step], loss, rel_tol=tolerance), f"{name}, step {step}"


@pytest.mark.parametrize("depth", [False, True], ids=["baseline", "moda"])
def test_a_step_never_waits_for_the_device(depth, shards, tmp_path):
    config = configured(shards, tmp_path / "run", depth)
    with distributed_world("cuda") as world, stop_on_signals() as stop:
        trainer = Trainer(config, world, stop, Watchdog(world, tmp_path / "run", factor=0, seconds=1), None)
        batches = [trainer.loader.batch(position) for position in (0, 4, 8, 12)]
        for batch in batches[:2]:  # compiles, makes the optimizer's state
            trainer._step(batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[2:]:
                trainer._step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.loader.close()


@pytest.mark.parametrize("depth", [False, True], ids=["baseline", "moda"])
def test_the_loop_between_two_records_never_waits_for_the_device(depth, shards, tmp_path):
    """Steps 13 to 18 of the trainer's own loop: the record of step 10 is written by then, that of step 20 not begun."""
    config = configured(shards, tmp_path / "run", depth)
    config.logging.every, config.evaluation.every, config.checkpoint.every = 10, 0, 1000
    modes = []

    def switch(step):
        if step in (12, 18):
            modes.append("error" if step == 12 else "default")
            torch.cuda.set_sync_debug_mode(modes[-1])

    with distributed_world("cuda") as world, stop_on_signals() as stop:
        trainer = Trainer(config, world, stop, Watchdog(world, tmp_path / "run", factor=0, seconds=1), None)
        trainer.after_step.append(switch)
        try:
            trainer.fit()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            trainer.end_records(None, None, None)
    assert modes == ["error", "default"]
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [10, 20]


def test_the_memory_estimate_is_close_to_the_peak():
    """A model of a few hundred MB; the figures of the 700M models are in docs/benchmarks.md."""
    shape = {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 2048}
    for depth, kind in ((False, "none"), (True, "none"), (True, "selective"), (True, "full")):
        model = ModelConfig(**shape, vocab_size=32000, depth_kv=depth, ffn_kv_proj=depth)
        with distributed_world("cuda") as world:
            with torch.device("meta"):
                decoder = Decoder(model)
            decoder = parallelize(
                decoder,
                world.mesh,
                compute_dtype=torch.bfloat16,
                activation_checkpointing=kind,
                compile_backend="inductor",
            )
            initialize(decoder, 0)
            optimizer = build_optimizer(decoder, OptimizerConfig())
            ids = torch.randint(0, 32000, (8, 2049), device="cuda")
            for step in range(3):
                if step == 2:
                    torch.cuda.reset_peak_memory_stats()
                sum(decoder(ids[:, :-1], ids[:, 1:])).backward()
                optimizer.step()
                optimizer.zero_grad()
            measured = torch.cuda.max_memory_allocated()
            del decoder, optimizer
            gc.collect()  # FSDP2's cycles would keep this one's weights beside the next model
            torch.cuda.empty_cache()
        estimated = memory(model, 8, 2048, activation_checkpointing=kind, compiled=True).total
        assert estimated == pytest.approx(measured, rel=0.10), f"depth={depth} {kind}"
