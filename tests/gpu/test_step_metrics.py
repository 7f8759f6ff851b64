"""Values of steps on a GPU: fetched without a wait, read while the next step runs, speed by the device's own clock."""

import itertools
import time

import pytest
import torch

from tests.gpu.test_speed import configured
from training.metrics import read_metrics
from training.step_metrics import Numbers, StepMetrics
from training.trainer import Trainer, train

CYCLES = 400_000_000  # of the device's clock: 0.2 s at 2 GHz


def test_numbers_arrive_without_a_wait_and_know_their_time():
    scalars = [torch.tensor(0.1, device="cuda"), torch.tensor(2**40, device="cuda")]
    # The first of them load kernels and take page-locked memory, for which CUDA waits.
    for numbers in [Numbers(scalars) for _ in range(3)]:
        numbers.read()
    before = Numbers(scalars)
    before.read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begin = time.perf_counter()
        torch.cuda._sleep(CYCLES)
        numbers = Numbers(scalars)
        queued = time.perf_counter() - begin
        torch.cuda._sleep(CYCLES)
        assert numbers.read() == [torch.tensor(0.1).item(), 2**40]
        read = time.perf_counter() - begin
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    assert queued < 0.5 * read  # the second sleep is not waited for
    assert read < 0.75 * whole
    seconds = numbers.seconds_since(before)
    assert seconds == pytest.approx(read, rel=0.2)


@pytest.mark.parametrize("depth", [False, True], ids=["baseline", "moda"])
def test_a_record_is_read_when_the_next_step_is_queued_and_its_speed_is_that_of_the_steps(
    depth, shards, tmp_path, monkeypatch
):
    config = configured(shards, tmp_path / "run", depth)
    config.training.steps, config.evaluation.every, config.logging.every = 20, 9, 3
    delays, begun = [], {}
    record, begin = Trainer._record, StepMetrics.begin

    def noted(self, step, *given):
        delays.append((step, self.state.step - step))
        record(self, step, *given)

    def marked(self, *given):
        torch.cuda.synchronize()
        begun[given[0].step] = self.clock.stepping
        begin(self, *given)

    monkeypatch.setattr(Trainer, "_record", noted)
    monkeypatch.setattr(StepMetrics, "begin", marked)
    train(config)
    assert delays == [(0, 0), (3, 1), (6, 1), (9, 0), (12, 1), (15, 1), (18, 0), (20, 0)]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")[2:]
    tokens = config.training.global_batch_size * config.data.sequence_length
    for one, other in itertools.pairwise(records):
        speed = tokens * (other["step"] - one["step"]) / (begun[other["step"]] - begun[one["step"]])
        assert other["throughput/tokens_per_second"] == pytest.approx(speed, rel=0.2)
