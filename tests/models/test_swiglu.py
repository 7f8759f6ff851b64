"""SwiGLU of a fused projection in one kernel each way against its definition in float64: in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from moda import kernels
from models import swiglu
from tests.moda.interpreter import run_interpreted

SHAPES = [(1, 1, 2), (2, 5, 48), (3, 1, 130), (7, 96), (2, 3, 2 * 1500)]  # of the product


def case(shape, dtype, device):
    """The product and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (*shape[:-1], shape[-1] // 2)
    return [(3 * torch.randn(size, generator=generator)).to(dtype).to(device) for size in sizes]


def definition(product):
    gate, up = product.chunk(2, -1)
    return F.silu(gate) * up


def results(function, product, dout):
    product = product.detach().requires_grad_()
    out = function(product)
    return out, torch.autograd.grad(out, product, dout)[0]


def check(shape, dtype, device, tolerance):
    product, dout = case(shape, dtype, device)
    got = results(swiglu.swiglu, product, dout)
    want = results(definition, product.double(), dout.double())
    for name, g, w in zip(("out", "dproduct"), got, want, strict=True):
        assert (g.dtype, g.shape) == (dtype, w.shape)
        assert g.is_contiguous()
        assert (g.double() - w).norm() <= tolerance * w.norm(), name


if not kernels.INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter():
        run_interpreted(__file__, "not in_the_interpreter")

else:

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_output_and_gradient_are_those_of_the_definition(shape):
        check(shape, torch.float32, "cpu", 1e-6)

    def test_strided_product_and_gradient():
        product, dout = case((4, 6, 64), torch.float32, "cpu")
        product, dout = product.transpose(0, 1), dout[0, 0].expand(6, 4, 32)
        for got, want in zip(results(swiglu.swiglu, product, dout), results(definition, product, dout), strict=True):
            torch.testing.assert_close(got, want)

    def test_values_far_from_zero():
        product = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]])
        out, grad = results(swiglu.swiglu, product, torch.ones(1, 5))
        want = results(definition, product, torch.ones(1, 5))
        torch.testing.assert_close(out, want[0])
        torch.testing.assert_close(grad, want[1])

    def test_a_product_that_has_no_halves_is_refused():
        with pytest.raises(AssertionError):
            swiglu.swiglu(torch.ones(3, 7))

    def test_the_operator_is_a_good_citizen():
        product, _ = case(SHAPES[1], torch.float32, "cpu")
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(swiglu._swiglu, (product.requires_grad_(),), test_utils=tests)
