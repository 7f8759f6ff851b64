"""training/out_of_memory.py: a device without memory left ends a run with sizes that the estimate says fit."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.shards import tiny_config
from training.config import TrainingError
from training.memory_estimate import estimate
from training.out_of_memory import USABLE, what_would_fit
from training.trainer import Trainer, train

WORLD = SimpleNamespace(size=1, compute_dtype=lambda precision: torch.bfloat16, compile_backend=lambda compiled: None)


def needed(config, size, kind):
    return estimate(
        config, 1, compute_dtype=torch.bfloat16, compiled=False, activation_checkpointing=kind, micro_batch_size=size
    ).total


def test_the_sizes_that_are_named_fit_and_divide_the_batch(shards, tmp_path):
    config = tiny_config(shards, tmp_path)
    config.data.sequence_length, config.training.global_batch_size, config.training.micro_batch_size = 256, 12, 12
    capacity = needed(config, 5, "none") / USABLE
    text = what_would_fit(config, WORLD, capacity)
    assert text.startswith("training.micro_batch_size=12 with parallel.activation_checkpointing=none needs about")
    (none,) = re.findall(r"what fits is training.micro_batch_size=(\d+) \(", text)
    assert int(none) == 4
    size, kind = re.findall(r"training.micro_batch_size=(\d+) parallel.activation_checkpointing=(\w+)", text)[0]
    assert 12 % int(size) == 0
    assert needed(config, int(size), kind) <= USABLE * capacity
    assert "no micro-batch fits" in what_would_fit(config, WORLD, 1000)


@pytest.mark.parametrize("where", ["_step", "_restore"])
def test_a_run_that_has_no_memory_left_ends_with_them(where, shards, tmp_path, monkeypatch):
    def step(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, where, step)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1e6))
    config = tiny_config(shards, tmp_path / "run")
    config.evaluation.every, config.parallel.compile = 0, False
    with pytest.raises(TrainingError, match=r"CUDA out of memory\. training.* a rank, and the device has 0\.0 GB"):
        train(config)
