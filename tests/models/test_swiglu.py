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


def case(shape, dtype, device, biased=False):
    """x, gate_up, down, with `biased` their biases, and the output's gradient."""
    lead, width, intermediate, out = shape
    generator = torch.Generator().manual_seed(0)
    scaled = [
        ((*lead, width), 3.0),
        ((2 * intermediate, width), width**-0.5),
        ((out, intermediate), intermediate**-0.5),
    ]
    scaled += [((2 * intermediate,), 1.0), ((out,), 1.0)] * biased
    scaled.append(((*lead, out), 1.0))
    tensors = [s * torch.randn(size, generator=generator, dtype=torch.float64) for size, s in scaled]
    return [tensor.to(dtype).to(device) for tensor in tensors]


def definition(x, gate_up, down, gate_up_bias=None, down_bias=None):
    gate, up = F.linear(x, gate_up, gate_up_bias).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down, down_bias)


def results(function, *inputs_and_dout):
    *inputs, dout = inputs_and_dout
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, dout)


def check(shape, dtype, device, tolerance, biased=False):
    given = case(shape, dtype, device, biased)
    got = results(swiglu.swiglu, *given)
    want = results(definition, *(x.double() for x in given))
    names = ["out", "dx", "dgate_up", "ddown", "dgate_up_bias", "ddown_bias"]
    for name, g, w in zip(names[: len(want)], got, want, strict=True):
        assert (g.dtype, g.shape) == (dtype, w.shape)
        assert g.is_contiguous()
        assert (g.double() - w).norm() <= tolerance * w.norm(), name


if not kernels.INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter():
        run_interpreted(__file__)

    @pytest.mark.parametrize("biased", [False, True], ids=["no biases", "biases"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_in_pytorch_they_are_those_of_the_definition(shape, dtype, biased):
        check(shape, dtype, "cpu", 2e-2 if dtype == torch.bfloat16 else 1e-13, biased)

    def test_products_with_swiglu_inside_are_put_together_to_the_same(monkeypatch):
        """What the package does, done here: an interleaved product, and the gradient of one."""

        counters = []

        def counted(tile_count_semaphore, is_dynamic_persistent):
            assert is_dynamic_persistent
            assert tile_count_semaphore.dtype == torch.int32
            assert tile_count_semaphore.tolist() == [0]
            assert all(tile_count_semaphore is not other for other in counters), "each call has a counter of its own"
            counters.append(tile_count_semaphore)

        def forward(name, A, B, D, PostAct, concat_layout, tile_count_semaphore, is_dynamic_persistent, **_):
            assert (name, concat_layout) == ("gemm_act", ("B",))
            counted(tile_count_semaphore, is_dynamic_persistent)
            D.copy_(A @ gated_products.interleaved(B[0]).mT)
            PostAct.copy_(F.silu(D[..., ::2]) * D[..., 1::2])

        def backward(name, A, B, Out, PreAct, PostAct, tile_count_semaphore, is_dynamic_persistent, **_):
            assert name == "gemm_dact"
            counted(tile_count_semaphore, is_dynamic_persistent)
            with torch.enable_grad():
                product = PreAct.detach().requires_grad_()
                hidden = F.silu(product[..., ::2]) * product[..., 1::2]
                hidden.backward(A @ B.mT)
            Out.copy_(product.grad)
            PostAct.copy_(hidden.detach())

        monkeypatch.setattr(gated_products, "available", lambda *_: True)
        monkeypatch.setattr(gated_products.FORWARD, "call", forward, raising=False)
        monkeypatch.setattr(gated_products.BACKWARD, "call", backward, raising=False)
        for shape in SHAPES:
            check(shape, torch.float64, "cpu", 1e-13)

    def test_products_that_cannot_be_built_are_not_used(monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (gated_products.HOPPER, 0))
        for package in (gated_products.FORWARD, gated_products.BACKWARD):
            monkeypatch.setattr(package, "missing", lambda: None, raising=False)
            monkeypatch.setattr(package, "call", lambda *_, **__: 1 / 0, raising=False)
        with pytest.warns(UserWarning, match="quack-kernels fails .ZeroDivisionError: division by zero"):
            assert not gated_products._installed.__wrapped__(torch.device("cpu"), torch.bfloat16)

    def test_no_rows_at_all():
        x, gate_up, down, dout = case(SHAPES[3], torch.float64, "cpu")
        out, dx, *weights = results(swiglu.swiglu, x[:0], gate_up, down, dout[:0])
        assert (out.shape, dx.shape) == ((0, 16), (0, 16))
        assert not any(grad.any() for grad in weights)

    def test_a_tangent_is_refused_instead_of_lost():
        x, gate_up, down, _ = case(SHAPES[1], torch.float64, "cpu")
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            swiglu.swiglu(torch.autograd.forward_ad.make_dual(x, x), gate_up, down)

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
        check(shape, torch.float32, "cpu", 1e-6, biased=True)

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
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        for biased in (False, True):
            *inputs, dout = case(SHAPES[1], torch.float32, "cpu", biased)
            inputs = tuple(t.requires_grad_() for t in (*inputs, *[torch.empty(0)] * (2 * (not biased))))
            torch.library.opcheck(swiglu._swiglu, inputs, test_utils=tests)
            product = swiglu._swiglu(*inputs)[1].detach()
            torch.library.opcheck(swiglu._swiglu_backward, (dout, *inputs[:4], product), test_utils=tests[:2])
