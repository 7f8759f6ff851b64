"""Batches on a GPU: pinned memory, document masks and packing in a step that never waits for the device."""

import numpy as np
import pytest
import torch

from data.documents import micro_batch
from models.decoder import Decoder
from models.initialization import initialize
from tests.shards import EOS, tiny_config
from training.distributed import distributed_world
from training.signals import stop_on_signals
from training.trainer import Trainer
from training.watchdog import Watchdog

pytestmark = pytest.mark.gpu


def configured(shards, run_dir, **data):
    config = tiny_config(shards, run_dir)
    config.model.hidden_size, config.model.head_dim = 128, 32
    config.training.device, config.training.precision, config.evaluation.every = "cuda", "bf16", 0
    config.data.sequence_length = 64
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_step_with_document_masks_takes_pinned_batches_and_never_waits(packing, shards, tmp_path):
    config = configured(shards, tmp_path / "run", document_mask=True, packing=packing)
    with distributed_world("cuda") as world, stop_on_signals() as stop:
        trainer = Trainer(config, world, stop, Watchdog(world, tmp_path / "run", factor=0, seconds=1), None)
        batches = [trainer.loader.batch(position) for position in (0, 4, 8, 12)]
        for part in batches[0]:
            assert part.inputs.is_pinned()
            assert part.targets.is_pinned()
            assert part.cu_seqlens.is_pinned()
            copied = part.to(world.device)
            for name in ("inputs", "targets", "cu_seqlens"):
                assert getattr(copied, name).is_cuda
                assert torch.equal(getattr(copied, name).cpu(), getattr(part, name))
        for batch in batches[:3]:  # shapes of boundaries differ: what compiles has compiled
            trainer._step(batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, norm, _ = trainer._step(batches[3])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isfinite().all()
        assert norm.isfinite()
        trainer.loader.close()


@pytest.mark.parametrize("depth", [False, True], ids=["baseline", "moda"])
def test_masked_logits_on_the_gpu_are_those_of_each_document_alone(depth, shards, tmp_path):
    config = configured(shards, tmp_path / "run").model
    config.depth_kv = config.ffn_kv_proj = depth
    rows = np.random.default_rng(0).integers(1, 120, size=(2, 65))
    rows[0, [6, 30, 31]] = rows[1, 50] = EOS
    batch = micro_batch(rows, EOS, 1.0)
    with torch.device("cuda"):
        model = Decoder(config)
    initialize(model, seed=1)
    model = model.to(torch.bfloat16)
    on_gpu = batch.to(torch.device("cuda"))
    with torch.no_grad():
        got = model(on_gpu.inputs, cu_seqlens=on_gpu.cu_seqlens).cpu()
        for row, begin, end in ((0, 0, 7), (0, 7, 31), (0, 31, 32), (0, 32, 64), (1, 0, 51), (1, 51, 64)):
            alone = model(on_gpu.inputs[row : row + 1, begin:end]).cpu()[0]
            assert (got[row, begin:end] - alone).norm() / alone.norm() < 3e-2  # bf16, by other kernels
