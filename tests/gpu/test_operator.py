"""The operator and the stream on a GPU against the definition in float64, in every dtype; run again, the same bits."""

import pytest
import torch

import moda
from moda import reference
from tests.models.plain import PlainStream, build, small, tokens

# Relative norms. Inputs are rounded before both sides see them: what is left is the rounding of outputs and products.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
SHAPES = [(1, 1, 1, 1, 64, 0), (2, 65, 2, 4, 64, 7), (1, 1000, 2, 2, 128, 72), (4, 127, 1, 8, 32, 1)]


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_definition(shape, dtype):
    batch, time, kv_heads, group, head_dim, slots = shape
    torch.manual_seed(0)
    token = (batch, time, kv_heads, head_dim)
    sizes = [(batch, time, kv_heads * group, head_dim), token, token, (slots, *token), (slots, *token)]
    inputs = [torch.randn(*s, device="cuda", dtype=dtype).requires_grad_() for s in sizes]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected, _ = reference.definition(*wide)
    out = moda.attention(*inputs)
    do = torch.randn_like(out)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    got = torch.autograd.grad(out, inputs, do, retain_graph=True)
    want = torch.autograd.grad(expected, wide, do.double())
    for g, w in zip(got, want, strict=True):
        if time > 1 or slots:  # one token alone: the gradients of q and k are exactly zero
            assert relative_error(g, w) < 2 * TOLERANCE[dtype]
    again = torch.autograd.grad(out, inputs, do)
    same = slice(0, None) if dtype == torch.float32 else slice(3, None)  # fused kernels add up dq in no fixed order
    assert all(torch.equal(a, b) for a, b in zip(got[same], again[same], strict=True))


def test_the_decoder_equals_the_plain_definition_in_float64(monkeypatch):
    model = build(small(depth_kv=True, ffn_kv_proj=True, attn_kv_proj=True)).cuda()
    ids, targets = (t.cuda() for t in tokens())
    sum(model(ids, targets)).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(moda, "DepthStream", PlainStream)
    sum(model(ids, targets)).backward()
    for name, parameter in model.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got[name] - want).norm() <= 1e-5 * want.norm() + 1e-9, name


def test_the_storage_of_a_step_is_given_back_to_the_allocator():
    model = build(small(depth_kv=True, ffn_kv_proj=True), torch.float32).cuda()
    ids, targets = (t.cuda() for t in tokens(batch=4, time=256))
    used, losses = [], []
    for _ in range(4):
        losses.append(sum(model(ids, targets)))  # held on to, graph and all
        losses[-1].backward()
        used.append(torch.cuda.memory_allocated())
    assert used[3] - used[1] < 16_384  # scalars, not slots
