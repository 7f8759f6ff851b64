"""The feed-forward layer and its gradients against a definition in float64: PyTorch, and Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moda import kernels
from models import gated_products, swiglu
from tests.moda.interpreter import run_interpreted

# leading axes, in_features, intermediate_size, out_features
SHAPES = [((1, 1), 2, 1, 3), ((2, 5), 8, 24, 8), ((3, 1), 7, 65, 5), ((7,), 16, 48, 16), ((2, 3), 12, 1500, 4)]


def case(shape, dtype, device):
    """x, gate_up, down, and the output's gradient."""
    lead, width, intermediate, out = shape
    generator = torch.Generator().manual_seed(0)
    scaled = (
        ((*lead, width), 3.0),
        ((2 * intermediate, width), width**-0.5),
        ((out, intermediate), intermediate**-0.5),
    )
    tensors = [s * torch.randn(size, generator=generator, dtype=torch.float64) for size, s in scaled]
    tensors.append(torch.randn(*lead, out, generator=generator, dtype=torch.float64))
    return [tensor.to(dtype).to(device) for tensor in tensors]


def definition(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def results(function, *inputs_and_dout):
    *inputs, dout = inputs_and_dout
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, dout)


def check(shape, dtype, device, tolerance):
    given = case(shape, dtype, device)
    got = results(swiglu.swiglu, *given)
    want = results(definition, *(x.double() for x in given))
    for name, g, w in zip(("out", "dx", "dgate_up", "ddown"), got, want, strict=True):
        assert (g.dtype, g.shape) == (dtype, w.shape)
        assert g.is_contiguous()
        assert (g.double() - w).norm() <= tolerance * w.norm(), name


if not kernels.INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter():
        run_interpreted(__file__, "interpreted")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_in_pytorch_they_are_those_of_the_definition(shape, dtype):
        check(shape, dtype, "cpu", 2e-2 if dtype == torch.bfloat16 else 1e-13)

    def test_frozen_weights_and_second_derivatives():
        x, gate_up, down, dout = case(SHAPES[1], torch.float64, "cpu")
        out = swiglu.swiglu(x.requires_grad_(), gate_up, down)
        (dx,) = torch.autograd.grad(out, x, dout, retain_graph=True)
        torch.testing.assert_close(dx, results(definition, x, gate_up, down, dout)[1])
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(out, x, dout, create_graph=True)

    def test_products_are_counted():
        x, *weights = case(SHAPES[1], torch.float64, "cpu")[:3]
        with FlopCounterMode(display=False) as counter:
            swiglu.swiglu(x.requires_grad_(), *weights).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 10 * (48 * 8 + 24 * 8)

    def test_interleaving_a_weight_and_back():
        weight = torch.arange(12).view(6, 2)
        assert gated_products.interleaved(weight)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]
        assert torch.equal(gated_products.side_by_side(gated_products.interleaved(weight)), weight)

else:

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_interpreted_they_are_those_of_the_definition(shape):
        check(shape, torch.float32, "cpu", 1e-6)

    def test_interpreted_strided_input_and_gradient():
        x, gate_up, down, dout = case(((4, 6), 8, 24, 8), torch.float32, "cpu")
        x, dout = x.transpose(0, 1), dout[0, 0].expand(6, 4, 8)
        got = results(swiglu.swiglu, x, gate_up.t().contiguous().t(), down, dout)
        for ours, theirs in zip(got, results(definition, x, gate_up, down, dout), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_interpreted_values_far_from_zero():
        gates = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]])
        given = torch.ones(1, 1), torch.cat((gates, torch.full_like(gates, 2.0)), 1).t().contiguous(), torch.eye(5)
        got = results(swiglu.swiglu, *given, torch.ones(1, 5))
        for ours, theirs in zip(got, results(definition, *given, torch.ones(1, 5)), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_interpreted_operators_are_good_citizens():
        x, gate_up, down, dout = case(SHAPES[1], torch.float32, "cpu")
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        inputs = tuple(t.requires_grad_() for t in (x, gate_up, down))
        torch.library.opcheck(swiglu._swiglu, inputs, test_utils=tests)
        product = swiglu._swiglu(*inputs)[1].detach()
        torch.library.opcheck(swiglu._swiglu_backward, (dout, *inputs, product), test_utils=tests[:2])
