"""The chunked output layer against its definition over whole logits, in float64; its kernel in Triton's interpreter.

As in tests/moda/test_kernels.py, the kernel is tested in a pytest of its own with TRITON_INTERPRET=1.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

import models.cross_entropy
from moda import kernels
from models.cross_entropy import chunk_tokens, linear_cross_entropy
from tests.moda.interpreter import run_interpreted

Z = 0.03


def case(tokens=300, hidden_size=16, vocabulary=97, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::7] = -1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def definition(hidden, weight, targets):
    """Both terms from whole logits in float64."""
    logits = hidden.double() @ weight.double().T
    counted = targets >= 0
    return F.cross_entropy(logits[counted], targets[counted]), Z * logits.logsumexp(-1)[counted].square().mean()


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def gradients(terms, use, hidden, weight):
    return torch.autograd.grad(use(*terms), (hidden, weight))


@pytest.fixture
def in_chunks(monkeypatch):
    """Chunks of 128 tokens of the case above; its last one is partial."""
    monkeypatch.setattr(models.cross_entropy, "CHUNK_BYTES", 128 * 97 * 8)
    assert chunk_tokens(300, 97, torch.float64) == 128


if not kernels.INTERPRETED:
    USES = {
        "sum": lambda ce, z: ce + z,
        "scaled sum": lambda ce, z: (0 + ce + z) / 3,
        "cross-entropy": lambda ce, z: 2 * ce,
        "z-loss": lambda ce, z: z.square(),
        "unequal": lambda ce, z: ce.square() - 5 * z,
    }

    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    def test_values_and_gradients_are_those_of_whole_logits_for_any_use_of_the_terms(use, in_chunks):
        hidden, weight, targets = case()
        got, want = linear_cross_entropy(hidden, weight, targets, Z), definition(hidden, weight, targets)
        torch.testing.assert_close(tuple(got), want, rtol=1e-12, atol=0)
        for ours, theirs in zip(*(gradients(terms, use, hidden, weight) for terms in (got, want)), strict=True):
            assert error(ours, theirs) < 1e-12

    def test_the_sum_of_the_terms_costs_one_pass_over_the_chunks_and_no_gradient_none(in_chunks, monkeypatch):
        passes = []
        original = models.cross_entropy._over_chunks
        monkeypatch.setattr(models.cross_entropy, "_over_chunks", lambda *a: (passes.append(a[-1]), original(*a))[1])
        hidden, weight, targets = case()
        (sum(linear_cross_entropy(hidden, weight, targets, Z)) / 4).backward()
        assert passes == [(True, True)]
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, targets, Z)
        linear_cross_entropy(hidden.detach(), weight, targets, Z)
        assert passes[1:] == [(False, False), (False, True)]

    def test_a_retained_graph_gives_its_gradients_again(in_chunks):
        hidden, weight, targets = case()
        loss = sum(linear_cross_entropy(hidden, weight, targets, Z))
        first, again = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(loss, hidden, create_graph=True)

    def test_without_a_counted_target_loss_and_gradients_are_zero():
        hidden, weight, targets = case()
        loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -1), Z)
        assert loss == (0, 0)
        assert not any(gradient.any() for gradient in torch.autograd.grad(sum(loss), (hidden, weight)))

    def test_without_a_token_loss_and_gradients_are_zero():
        hidden, weight, targets = (x[:0] if i != 1 else x for i, x in enumerate(case()))
        loss = linear_cross_entropy(hidden, weight, targets, Z)
        assert loss == (0, 0)
        assert not any(gradient.any() for gradient in torch.autograd.grad(sum(loss), (hidden, weight)))

    def test_in_bf16_values_are_fp32_and_gradients_as_good_as_those_of_whole_logits_however_many_chunks(monkeypatch):
        hidden, weight, targets = case(tokens=4096, vocabulary=512, dtype=torch.bfloat16)
        want = definition(hidden, weight, targets)
        exact = torch.autograd.grad(sum(want), (hidden, weight))
        logits, counted = F.linear(hidden, weight).float(), targets >= 0
        whole = F.cross_entropy(logits[counted], targets[counted]) + Z * logits.logsumexp(-1)[counted].square().mean()
        whole_errors = [error(*pair) for pair in zip(torch.autograd.grad(whole, (hidden, weight)), exact, strict=True)]
        for size in (128, 4096):
            monkeypatch.setattr(models.cross_entropy, "CHUNK_BYTES", size * 512 * 2)
            got = linear_cross_entropy(hidden, weight, targets, Z)
            assert got.cross_entropy.dtype == torch.float32
            for ours, theirs in zip(got, want, strict=True):
                assert abs(ours - theirs) / theirs < 1e-4  # a logit is rounded to 2^-9, the errors average out
            errors = [error(*pair) for pair in zip(torch.autograd.grad(sum(got), (hidden, weight)), exact, strict=True)]
            assert errors == pytest.approx(whole_errors, rel=0.02)

    @pytest.mark.parametrize(
        ("tokens", "vocabulary", "dtype", "size"),
        [
            (32768, 100352, torch.bfloat16, 4096),
            (32768, 100352, torch.float32, 2048),
            (5000, 100352, torch.bfloat16, 4096),
            (65536, 50304, torch.bfloat16, 8192),
            (10, 100352, torch.bfloat16, 10),
            (1000, 2**26, torch.float32, 128),
        ],
    )
    def test_chunks_are_a_power_of_two_of_tokens_within_the_limit(tokens, vocabulary, dtype, size):
        assert chunk_tokens(tokens, vocabulary, dtype) == size

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
    def test_the_kernel_in_the_interpreter():
        run_interpreted(__file__)

else:

    @pytest.mark.parametrize("vocabulary", [97, 128, 20000])
    @pytest.mark.parametrize("size", [12, 13])
    def test_the_kernel_gives_values_and_gradients_of_whole_logits(vocabulary, size, monkeypatch):
        monkeypatch.setattr(models.cross_entropy, "chunk_tokens", lambda *_: size)
        hidden, weight, targets = case(tokens=25, vocabulary=vocabulary, dtype=torch.float32)
        got, want = linear_cross_entropy(hidden, weight, targets, Z), definition(hidden, weight, targets)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
        for ours, theirs in zip(
            *(torch.autograd.grad(sum(terms), (hidden, weight)) for terms in (got, want)), strict=True
        ):
            assert error(ours, theirs) < 1e-5
