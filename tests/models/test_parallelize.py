"""Compiled and checkpointed blocks against plain ones: same losses, same gradients, graphs shared by all layers."""

import itertools
import shutil

import pytest
import torch

import moda
from data.shard_writer import ShardWriter
from eval.perplexity import PerplexityEvaluator
from moda.backends import BACKENDS
from models.config import ATTENTION_BACKENDS
from models.decoder import Decoder
from models.parallelize import prepare_blocks, units
from tests.models.plain import build, small, tokens
from tests.shards import VOCAB

BASELINE = {}
MODA = {"depth_kv": True, "ffn_kv_proj": True}
PROJECTED = {**MODA, "attn_kv_proj": True}


def gradients(model, evaluates):
    """Loss and gradients of two micro-batches, if wanted with an evaluation between the forward and the backward."""
    for seed in range(2):
        loss = sum(model(*tokens(seed=seed)))
        if evaluates:
            with torch.no_grad():
                torch.testing.assert_close(sum(model(*tokens(seed=seed))), loss)
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(config, activation_checkpointing, backend, evaluates=True):
    want_loss, want = gradients(build(config), evaluates)
    model = build(config)
    prepare_blocks(model, activation_checkpointing, backend)
    loss, got = gradients(model, evaluates)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    for name, gradient in want.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-11, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("fields", [BASELINE, MODA, PROJECTED], ids=["baseline", "moda", "projected"])
def test_gradients_are_those_of_plain_blocks(fields, activation_checkpointing, backend):
    assert_same(small(**fields), activation_checkpointing, backend)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler for inductor")
def test_gradients_are_those_of_plain_blocks_under_inductor():
    assert_same(small(**MODA, norm="pre", value_norm=True, bias=True), "none", "inductor", evaluates=False)


@pytest.mark.parametrize(
    ("fields", "graphs"), [(BASELINE, 2), (MODA, 3), (PROJECTED, 4)], ids=["baseline", "moda", "projected"]
)
def test_layers_share_graphs(fields, graphs):
    """The last layer, which leaves nothing to be read, has graphs of its own; no other adds one."""
    counters = torch._dynamo.utils.counters
    for num_layers in (3, 7):
        model = build(small(num_layers=num_layers, **fields))
        prepare_blocks(model, "none", "aot_eager")
        counters.clear()
        for seed in range(2):
            sum(model(*tokens(seed=seed))).backward()
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]


@pytest.mark.parametrize(("fields", "document_mask"), [(BASELINE, False), (MODA, True), (PROJECTED, False)], ids=str)
def test_training_is_compiled_after_an_evaluation_of_domains_of_all_sizes(fields, document_mask, tmp_path):
    """PyTorch gives up compiling a function for which it has made too many graphs, one for each size of a batch."""
    folders = {}
    for instances in range(1, 12):
        folders[f"domain-{instances}"] = tmp_path / f"{instances}"
        with ShardWriter(tmp_path / f"{instances}", vocab_size=VOCAB, eos_id=0, tokens_per_file=1000) as writer:
            writer.write([[1 + token % 50 for token in range(16 * instances)]], text_bytes=1)
            writer.finish(tokenizer={"name": "counting", "sha256": "0" * 64}, preparation={})
    model = build(small(**fields, vocab_size=VOCAB), torch.float32)
    prepare_blocks(model, "none", "aot_eager")
    evaluator = PerplexityEvaluator(folders, 16, instances=None, micro_batch_size=8, document_mask=document_mask)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert len(evaluator.evaluate(model, torch.device("cpu"))) == 3 * len(folders) + 2
        sum(model(*tokens(batch=8, time=16))).backward()


@pytest.mark.parametrize("fields", [BASELINE, MODA], ids=["baseline", "moda"])
def test_selective_checkpointing_computes_attention_once_and_full_twice(fields, monkeypatch):
    calls, original = [], moda.reference.joint_forward
    monkeypatch.setattr(moda.reference, "joint_forward", lambda *a: (calls.append(1), original(*a))[1])
    for activation_checkpointing, times in (("none", 1), ("selective", 1), ("full", 2)):
        model = build(small(**fields))
        prepare_blocks(model, activation_checkpointing, None)
        calls.clear()
        sum(model(*tokens())).backward()
        assert len(calls) == times * model.config.num_layers


def test_each_kind_of_checkpointing_keeps_less_than_the_one_before():
    kept = {}
    for activation_checkpointing in ("none", "selective", "full"):
        model, total = build(small(**MODA)), []
        prepare_blocks(model, activation_checkpointing, None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, total=total: (total.append(t), t)[1], lambda t: t):
            model(*tokens())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in total}
        kept[activation_checkpointing] = sum(storages.values())
    assert all(more > 1.2 * less for more, less in itertools.pairwise(kept.values())), kept


def test_an_unknown_kind_of_checkpointing_is_refused():
    with pytest.raises(ValueError, match="choose one of none, selective, full"):
        prepare_blocks(build(small()), "some", None)


@pytest.mark.parametrize("fields", [BASELINE, MODA], ids=["baseline", "moda"])
def test_the_attention_backend_of_a_run_is_that_of_every_layer(fields):
    assert ("auto", *BACKENDS) == ATTENTION_BACKENDS
    model = build(small(**fields))
    prepare_blocks(model, "none", None, attention_backend="joined")
    with pytest.raises(ValueError, match="backend='joined' cannot take this call: it needs a CUDA device"):
        model(*tokens())


@pytest.mark.parametrize(
    ("width", "reshard_after_forward", "sizes"),
    [(16, False, [1, 6, 6]), (2048, False, [1] + [2] * 6), (4096, False, [1] * 13), (16, True, [1] * 13)],
)
def test_neighbouring_blocks_share_a_unit_unless_they_are_large_or_freed(width, reshard_after_forward, sizes):
    config = small(num_layers=13, hidden_size=width, intermediate_size=3 * width)
    with torch.device("meta"):
        model = Decoder(config)
    shared = units(model, reshard_after_forward)
    assert [len(unit) for unit in shared] == sizes
    assert [block for unit in shared for block in unit] == list(model.blocks)
