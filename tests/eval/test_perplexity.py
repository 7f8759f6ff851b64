"""Validation losses against a plain sum over tokens; the same for any number of ranks and any micro-batch."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.shards import DataError, TokenDataset, read_manifest, validation_domains
from eval.perplexity import PerplexityEvaluator
from tests.models.plain import build, small
from tests.shards import VOCAB

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return build(small(vocab_size=VOCAB, depth_kv=True, ffn_kv_proj=True), torch.float32)


def domains(shards):
    return {name: Path(shards) / "validation" / name for name in validation_domains(shards)}


def expected_loss(model, shards, domain, instances):
    dataset = TokenDataset(Path(shards) / "validation" / domain, 16)
    rows = [torch.from_numpy(dataset[i]) for i in range(min(instances or len(dataset), len(dataset)))]
    with torch.no_grad():
        losses = [F.cross_entropy(model(row[None, :-1])[0], row[1:]) for row in rows]
    return torch.stack(losses).double().mean().item()


@pytest.mark.parametrize("instances", [1, 5, None])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_loss_perplexity_and_bits_per_byte_of_every_domain(model, shards, instances, micro_batch_size):
    evaluator = PerplexityEvaluator(domains(shards), 16, instances=instances, micro_batch_size=micro_batch_size)
    metrics = evaluator.evaluate(model, CPU)
    losses = []
    for domain in ("even", "odd"):
        loss = expected_loss(model, shards, domain, instances)
        manifest = read_manifest(Path(shards) / "validation" / domain)
        assert metrics[f"validation/{domain}/loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics[f"validation/{domain}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        bits = loss / math.log(2) * manifest.tokens / manifest.bytes
        assert metrics[f"validation/{domain}/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        losses.append(loss)
    assert metrics["validation/mean/loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_read_what_one_reads(model, shards, world_size):
    """Every rank sees equally many batches; their sums are those of one process."""
    alone = PerplexityEvaluator(domains(shards), 16, instances=5, micro_batch_size=2).evaluate(model, CPU)
    totals, batches = {}, set()

    def keep(rank):
        seen = iter(range(99))

        def reduce(total):
            index = next(seen)
            totals[index] = totals.get(index, 0) + total
            return total.clamp_min(1)

        evaluator = PerplexityEvaluator(
            domains(shards), 16, instances=5, micro_batch_size=2, rank=rank, world_size=world_size, reduce=reduce
        )
        batches.add(tuple(len(evaluator._batches(dataset)) for dataset in evaluator.datasets.values()))
        evaluator.evaluate(model, CPU)

    for rank in range(world_size):
        keep(rank)
    assert len(batches) == 1
    for index, domain in enumerate(("even", "odd")):
        nats, count = totals[index].tolist()
        assert count == 5 * 16
        assert nats / count == pytest.approx(alone[f"validation/{domain}/loss"], rel=1e-6)


@pytest.mark.parametrize(("instances", "size", "told"), [(5, 10, [4, 1, 4, 1]), (1, 2, [1, 1])])
def test_what_is_done_is_told_after_each_batch(model, shards, instances, size, told):
    heard = []
    evaluator = PerplexityEvaluator(domains(shards), 16, instances=instances, micro_batch_size=2, world_size=2)
    evaluator.evaluate(model, CPU, done=heard.append)
    assert (evaluator.size, heard) == (size, told)


@pytest.mark.parametrize(("instances", "ranks", "rows"), [(2, 1, 2), (5, 2, 3), (5, 8, 1), (None, 1, 4)])
def test_all_batches_have_one_size_and_no_more_rows_than_the_largest_domain(shards, instances, ranks, rows):
    evaluator = PerplexityEvaluator(
        domains(shards), 16, instances=instances, micro_batch_size=4, world_size=ranks, rank=ranks - 1
    )
    sizes = [len(batch) for dataset in evaluator.datasets.values() for batch in evaluator._batches(dataset)]
    assert sizes
    assert set(sizes) == {rows}


def test_a_domain_that_cannot_be_read_is_told_to_stop_and_raised_where_that_stops_nothing(model, shards, monkeypatch):
    evaluator = PerplexityEvaluator(domains(shards), 16, instances=1, micro_batch_size=1)
    told = []

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(TokenDataset, "__getitem__", fails)
    assert evaluator.evaluate(model, CPU, lambda failure: bool(told.append(failure)) or failure is not None) is None
    assert told == [f"{shards}/validation/even cannot be read ([Errno 5] Input/output error)."]
    with pytest.raises(DataError, match="validation/even cannot be read"):
        evaluator.evaluate(model, CPU)


def test_evaluation_leaves_no_graph_and_can_be_followed_by_training(model, shards):
    PerplexityEvaluator(domains(shards), 16, instances=2, micro_batch_size=2).evaluate(model, CPU)
    ids = torch.arange(1, 18)[None]
    sum(model(ids[:, :-1], ids[:, 1:])).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
