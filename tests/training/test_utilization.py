"""The share of the device's peak that a run reports, against operations counted by hand."""

import pytest
import torch

from tests.shards import VOCAB, tiny_config
from training.distributed import bf16_peak
from training.metrics import read_metrics
from training.step_metrics import StepMetrics
from training.trainer import train

PEAK = 1e9
TIME, LAYERS, WIDTH, KV_WIDTH, FFN_WIDTH = 16, 2, 32, 16, 48  # of `tiny_config`


def test_a_record_has_both_shares_of_the_operations_that_its_rate_means(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("training.step_metrics.bf16_peak", lambda device, dtype: PEAK)
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.training.global_batch_size, config.evaluation.every = 3, 2, 0
    train(config)
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH + 3 * WIDTH * FFN_WIDTH
    slot = 2 * WIDTH * KV_WIDTH  # of the first layer's FFN; the last layer leaves none
    matmul = 2 * (LAYERS * layer + slot + WIDTH * VOCAB)
    depth = 4 * WIDTH * 2  # the last layer reads both slots of the first
    full = 3 * (matmul + depth + 4 * TIME * WIDTH * LAYERS)
    causal = 3 * (matmul + depth + 2 * (TIME + 1) * WIDTH * LAYERS)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 3
    for record in records:
        rate = record["throughput/tokens_per_second"]
        assert record["throughput/mfu"] == pytest.approx(rate * full / PEAK)
        assert record["throughput/mfu_causal"] == pytest.approx(rate * causal / PEAK)


def test_without_a_known_peak_there_is_no_share(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.evaluation.every = 1, 0
    train(config)
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not {"throughput/mfu", "throughput/mfu_causal"} & record.keys()


def test_the_peak_is_that_of_bf16_products_on_a_whole_device(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert bf16_peak(cuda, torch.bfloat16) == 989e12
    assert bf16_peak(cuda, torch.float32) is None
    assert bf16_peak(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 MIG 1g.18gb")
    assert bf16_peak(cuda, torch.bfloat16) is None


def test_ranks_share_the_peak_of_all():
    metrics = StepMetrics.__new__(StepMetrics)
    metrics.peak, metrics.flops_per_token = 1e12, (4e9, 3e9)
    metrics.world, metrics.masked = type("World", (), {"size": 2})(), False
    assert metrics.utilization(100.0) == pytest.approx({"mfu": 0.2, "mfu_causal": 0.15})
    metrics.masked = True  # fewer pairs are computed than the causal count has
    assert metrics.utilization(100.0) == pytest.approx({"mfu": 0.2})
