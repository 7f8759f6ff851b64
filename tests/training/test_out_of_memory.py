"""training/out_of_memory.py: a device without memory left ends a run with sizes that the estimate says fit."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.shards import tiny_config
from training.config import TrainingError
from training.memory_estimate import estimate
from training.out_of_memory import USABLE, explain, is_out_of_memory, what_would_fit
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


def test_where_the_run_itself_would_fit_something_else_is_named(shards, tmp_path):
    config = tiny_config(shards, tmp_path)
    text = what_would_fit(config, WORLD, 10**9)
    assert "which the 1.0 GB of the device would hold: look at what else takes its memory. The same" in text
    config.evaluation.micro_batch_size = 256
    assert "its memory, or give evaluation.micro_batch_size=256 less. The" in what_would_fit(config, WORLD, 10**9)


def test_what_other_processes_take_is_passed_on(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1e9))
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB of which 0 bytes is "
        "free. Process 7 has 0.90 GiB memory in use. Of the allocated memory 0 bytes is allocated by PyTorch."
    )
    world = SimpleNamespace(device=torch.device("cuda"), **vars(WORLD))
    text = explain(torch.OutOfMemoryError(said), tiny_config(shards, tmp_path), world)
    assert "Process 7 has 0.90 GiB memory in use. training.micro_batch_size=2 with" in text
    assert "Of the allocated" not in text


def test_a_host_without_memory_ends_a_run_with_a_sentence(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", lambda *arguments: torch.empty(2**60))
    config = tiny_config(shards, tmp_path / "run")
    config.evaluation.every = 0
    with pytest.raises(
        TrainingError, match=r"the host is out of memory.* 4611686018427387904 bytes.* training\.micro_b"
    ):
        train(config)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("another"))


@pytest.mark.parametrize("where", ["_step", "_restore"])
def test_a_run_that_has_no_memory_left_ends_with_them(where, shards, tmp_path, monkeypatch):
    def step(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, where, step)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=5e5))
    config = tiny_config(shards, tmp_path / "run")
    config.evaluation.every, config.parallel.compile = 0, False
    with pytest.raises(
        TrainingError,
        match=r"CUDA out of memory\. Tried to allocate 2 GB\. .*training.* a rank, and the device has 0\.0 GB",
    ):
        train(config)
