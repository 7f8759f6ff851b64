"""The feed-forward layer on a GPU, by Triton kernels and by products with SwiGLU inside: results of the definition."""

import pytest
import torch

from models import gated_products, swiglu
from tests.models.test_swiglu import SHAPES, case, check, results

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Widths that are multiples of 16 are done inside the products, where those are to be had.
WIDE = [((1,), 16, 16, 16), ((3, 43), 64, 48, 32), ((2, 100), 96, 5008, 112), ((4099,), 1024, 4096, 1024)]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=str)
def test_output_and_gradients_are_those_of_the_definition(shape, dtype):
    check(shape, dtype, "cuda", TOLERANCE[dtype])
    check(shape, dtype, "cuda", TOLERANCE[dtype], biased=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_without_the_package_the_results_differ_by_roundings(shape, dtype, monkeypatch):
    given = case(shape, dtype, "cuda")
    inside = results(swiglu.swiglu, *given)
    monkeypatch.setattr(gated_products, "available", lambda *_: False)
    for g, w in zip(inside, results(swiglu.swiglu, *given), strict=True):
        assert (g.double() - w.double()).norm() <= 2 * TOLERANCE[dtype] * w.double().norm()


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_the_same_inputs_give_the_same_bits(shape):
    given = case(shape, torch.bfloat16, "cuda")
    first = results(swiglu.swiglu, *given)
    for _ in range(3):
        for g, w in zip(results(swiglu.swiglu, *given), first, strict=True):
            assert torch.equal(g, w)


def test_what_the_products_cannot_take_goes_another_way():
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    if torch.cuda.get_device_capability()[0] != gated_products.HOPPER:
        pytest.skip("tiles are known for Hopper GPUs")
    x, gate_up, down, _ = case(WIDE[1], torch.bfloat16, "cuda")
    rows = x.flatten(0, -2)
    assert gated_products.available(rows, gate_up, down)
    assert not gated_products.available(rows, gate_up, down, gate_up[:, 0])
    for changed in (
        (rows.float(), gate_up.float(), down.float()),
        (rows[:0], gate_up, down),
        (rows, gate_up[:90], down[:, :45]),
        (rows.cpu(), gate_up.cpu(), down.cpu()),
    ):
        assert not gated_products.available(*changed)
        swiglu.swiglu(*changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_lie_otherwise_and_are_packed_for_backward_give_the_same_results(dtype):
    x, gate_up, down, dout = case(WIDE[1], dtype, "cuda")
    strided = [weight.t().contiguous().t() for weight in (gate_up, down)]
    want = results(swiglu.swiglu, x, gate_up, down, dout)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda packed: packed):
        got = results(swiglu.swiglu, x, *strided, dout)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w.double()).norm() <= 2 * TOLERANCE[dtype] * w.double().norm()
