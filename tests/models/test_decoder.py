"""The decoder against transformers' OLMo 2 and against a stream that leaves everything to autograd."""

import numpy as np
import pytest
import torch

import moda
import models.decoder
from data.documents import micro_batch
from models.config import ConfigError
from models.decoder import Decoder, Loss
from models.huggingface import load_hugging_face, to_hugging_face
from models.initialization import initialize
from tests.models.plain import PlainStream, build, small, tokens
from training.compose import plan

VARIANTS = [
    {"norm": norm, "depth_kv": True, "ffn_kv_proj": ffn, "attn_kv_proj": attn}
    for norm in ("reordered", "pre", "post")
    for ffn, attn in ((False, False), (True, False), (True, True))
] + [
    {"depth_kv": True, "ffn_kv_proj": True, "value_norm": True, "tie_embeddings": False},
    {"depth_kv": True, "ffn_kv_proj": True, "ffn_kv_last_layer": True, "qk_norm": False, "bias": True},
    {"depth_kv": True, "num_layers": 5, "depth_recent_layers": 1, "depth_first_layers": 1},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()))
def test_loss_and_gradients_equal_the_plain_definition_in_float64(fields, monkeypatch):
    model, (ids, targets) = build(small(**fields)), tokens()
    loss = sum(model(ids, targets))
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in got.values()), "a parameter without gradient has no optimizer state"
    model.zero_grad()
    monkeypatch.setattr(moda, "DepthStream", PlainStream)
    expected = sum(model(ids, targets))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    for name, parameter in model.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (got[name] - want).norm() / want.norm().clamp_min(1e-6)
        assert error < 1e-9, f"{name}: {error:.1e}"


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, {"num_kv_heads": 4}, {"num_kv_heads": 1}], ids=str)
def test_logits_equal_those_of_transformers_olmo2_both_ways(fields):
    transformers = pytest.importorskip("transformers")
    model = build(small(**fields), torch.float32)
    hf_config, state = to_hugging_face(model, sequence_length=64)
    hf = transformers.Olmo2ForCausalLM(hf_config)
    assert_same_logits(copied_into(Decoder(model.config), hf), hf)  # random weights of theirs, copied into ours
    hf.load_state_dict(state)
    assert_same_logits(model, hf)


def test_a_random_transformers_olmo2_copied_into_olmo2_tiny_gives_its_logits():
    transformers = pytest.importorskip("transformers")
    config = plan(["model=olmo2_tiny", "model.vocab_size=200"]).jobs[0].config.model
    torch.manual_seed(0)
    hf = transformers.Olmo2ForCausalLM(to_hugging_face(Decoder(config), sequence_length=256)[0])
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(
                1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.1 * torch.randn_like(parameter)
            )
    assert_same_logits(copied_into(Decoder(config), hf), hf)


def copied_into(model, hf):
    load_hugging_face(model, hf.state_dict())
    return model


def assert_same_logits(model, hf):
    ids, _ = tokens(time=40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf(ids).logits, rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_named():
    model = build(small(), torch.float32)
    _, state = to_hugging_face(model, sequence_length=64)
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        load_hugging_face(model, state)
    with pytest.raises(ConfigError, match="depth_kv=True has no counterpart"):
        to_hugging_face(Decoder(small(depth_kv=True)), sequence_length=64)


def test_loss_is_cross_entropy_and_z_loss():
    model, (ids, targets) = build(small(z_loss=1e-3)), tokens()
    logits = model(ids)
    loss = model(ids, targets)
    assert isinstance(loss, Loss)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.cross_entropy, expected)
    torch.testing.assert_close(loss.z_loss, 1e-3 * logits.logsumexp(-1).square().mean())


def test_negative_targets_are_left_out_of_the_loss():
    model, (ids, targets) = build(small()), tokens()
    expected = model(ids[:1], targets[:1])
    targets = targets.clone()
    targets[1:] = -1
    torch.testing.assert_close(model(ids, targets), expected)
    assert model(ids, torch.full_like(targets, -1)).cross_entropy == 0


@pytest.mark.parametrize("depth", [False, True])
def test_a_token_depends_on_no_later_one(depth):
    model, (ids, _) = build(small(depth_kv=depth, ffn_kv_proj=depth)), tokens()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 100
    assert torch.equal(model(ids)[:, :6], model(changed)[:, :6])
    assert not torch.equal(model(ids)[:, 6:], model(changed)[:, 6:])


@pytest.mark.parametrize("depth", [False, True])
def test_a_document_gives_the_same_logits_alone_and_among_others(depth):
    model, (ids, _) = build(small(depth_kv=depth, ffn_kv_proj=depth)), tokens(batch=2, time=12)
    packed = model(ids, cu_seqlens=torch.tensor([0, 5, 12, 13, 24]))
    torch.testing.assert_close(packed[0, 5:], model(ids[:1, 5:])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[1, 1:], model(ids[1:, 1:])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [False, True])
def test_logits_of_a_document_do_not_change_when_its_neighbours_do(depth):
    """Boundaries as the loader makes them, filled up with documents of no tokens; the depth stream included."""
    eos, rows = 99, np.random.default_rng(0).integers(0, 99, size=(2, 25))
    rows[0, [6, 11, 12]] = rows[1, [3, 17]] = eos
    model = build(small(depth_kv=depth, ffn_kv_proj=depth), torch.float32)
    batch = micro_batch(rows, eos, 1.0)
    logits = model(batch.inputs, cu_seqlens=batch.cu_seqlens)
    assert (batch.cu_seqlens[-2:] == 48).all(), "one document of no tokens at least"
    changed = rows.copy()
    changed[0, 0:6] = (changed[0, 0:6] + 1) % 99
    changed[0, 13:] = (changed[0, 13:] + 1) % 99
    changed[1, 0], changed[1, 3], changed[1, 2] = eos, 5, eos  # boundaries move too
    other = micro_batch(changed, eos, 1.0)
    moved = model(other.inputs, cu_seqlens=other.cu_seqlens)
    assert torch.equal(moved[0, 7:13], logits[0, 7:13])
    assert torch.equal(moved[1, 18:], logits[1, 18:])
    assert not torch.equal(moved[0, :6], logits[0, :6])
    unmasked = model(batch.inputs)
    assert not torch.allclose(unmasked[0, 7:13], logits[0, 7:13])
    positions = models.decoder._positions(batch.inputs, batch.cu_seqlens)
    assert positions[0].tolist() == [*range(7), *range(5), 0, *range(11)]
    assert positions[1].tolist() == [*range(4), *range(14), *range(6)]


@pytest.mark.parametrize("depth", [False, True])
def test_a_loss_of_one_document_has_no_gradient_in_the_others(depth):
    eos, rows = 99, np.random.default_rng(0).permutation(98)[None, :25].copy()
    rows[0, [6, 14]] = eos
    model = build(small(depth_kv=depth, ffn_kv_proj=depth, tie_embeddings=False))
    batch = micro_batch(rows, eos, 1.0)
    model(batch.inputs, cu_seqlens=batch.cu_seqlens)[0, 7:15].logsumexp(-1).sum().backward()
    touched = model.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert sorted(touched) == sorted(rows[0, 7:15].tolist())


def test_depth_scores_do_not_depend_on_position(monkeypatch):
    """Keys in slots carry the rotation of their own position, which is the query's: it must cancel."""
    model, (ids, _) = build(small(depth_kv=True, ffn_kv_proj=True, attn_kv_proj=True)), tokens()
    expected = model(ids)
    monkeypatch.setattr(models.decoder, "_positions", lambda ids, _: torch.arange(ids.shape[1])[None] + 57)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)  # the tables are fp32


def test_initial_values_do_not_depend_on_other_modules():
    plain, deep = Decoder(small()), Decoder(small(depth_kv=True, ffn_kv_proj=True))
    initialize(plain, 3)
    initialize(deep, 3)
    deep_parameters = dict(deep.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, deep_parameters[name]), name
    weight = plain.blocks[0].ffn.gate_up_proj.weight
    assert 0.015 < weight.std() < 0.02
    assert weight.abs().max() <= 0.06
    before = weight.clone()
    initialize(plain, 4)
    assert not torch.equal(before, weight)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 5}, "model.num_kv_heads=2"),
        ({"norm": "after"}, "model.norm=after"),
        ({"head_dim": 7}, "model.head_dim=7"),
        ({"ffn_kv_proj": True}, "model.depth_kv=true"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"vocab_size": None}, "model.vocab_size=null"),
        ({"depth_kv": True, "depth_recent_layers": 0}, "model.depth_recent_layers=0"),
    ],
)
def test_a_shape_that_cannot_work_is_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        Decoder(small(**fields))
