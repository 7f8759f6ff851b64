"""QK-norm and rotary embedding in one kernel against the layers' PyTorch in float64: in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from moda import kernels
from models import norm_rotary
from models.kernels import available
from models.layers import rotary_tables, rotate
from tests.moda.interpreter import run_interpreted

# batch, time, query heads (0: a product without queries), kv heads, head_dim, tables of each sequence
SHAPES = [
    (1, 1, 1, 1, 16, False),
    (2, 5, 4, 2, 16, False),
    (2, 7, 6, 3, 24, True),
    (1, 9, 0, 2, 32, False),
    (3, 3, 2, 1, 64, True),
]


def definition(product, q_weight, k_weight, cos, sin, head_dim, eps):
    """q, k, v by the layers of the model, in the dtype of the product."""
    widths, outputs = (len(q_weight), len(k_weight), len(k_weight)), []
    for part, weight in zip(product.split(widths, -1), (q_weight, k_weight, None), strict=True):
        if weight is not None and len(weight):
            part = F.rms_norm(part, weight.shape, weight, eps)
        heads = part.unflatten(-1, (part.shape[-1] // head_dim, head_dim))
        outputs.append(heads if weight is None else rotate(heads, (cos, sin)))
    return outputs


def case(shape, dtype, device):
    """Inputs and gradients of the outputs, in float64 and as the kernel gets them."""
    batch, time, heads, kv_heads, head_dim, own_tables = shape
    generator = torch.Generator().manual_seed(0)
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype).to(device)

    positions = torch.randint(0, 4096, (batch if own_tables else 1, time), generator=generator).to(device)
    cos, sin = rotary_tables(positions, head_dim, 5e5)
    inputs = [random(batch, time, sum(widths)), 1 + random(widths[0]) / 8, 1 + random(widths[1]) / 8]
    grads = [random(batch, time, width // head_dim, head_dim) for width in widths]
    return inputs, (cos, sin), grads, head_dim


def results(function, inputs, tables, grads, head_dim):
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, *tables, head_dim, 1e-6)
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)]


def check(shape, dtype, device, tolerance):
    inputs, tables, grads, head_dim = case(shape, dtype, device)
    got = results(norm_rotary._norm_rotary, inputs, tables, grads, head_dim)
    wide = [[x.double() for x in part] for part in (inputs, tables, grads)]
    want = results(definition, *wide, head_dim)
    for name, g, w in zip(("q", "k", "v", "dproduct", "dq_weight", "dk_weight"), got, want, strict=True):
        if w is not None and w.numel():
            assert g.dtype == dtype
            assert (g.double() - w).norm() <= tolerance * w.norm(), name


if not kernels.INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter():
        run_interpreted(__file__)

    def test_the_layers_keep_to_pytorch_where_no_kernel_runs():
        assert not available(torch.device("cpu"), torch.bfloat16)
        assert not available(torch.device("meta"), torch.bfloat16)

else:
    from models import norm_rotary_kernel
    from models.parallelize import prepare_blocks
    from tests.models.plain import build, small, tokens

    @pytest.mark.parametrize("programs", [1056, 2])
    @pytest.mark.parametrize("narrow", [512, 0])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_outputs_and_gradients_are_those_of_the_layers(shape, narrow, programs, monkeypatch):
        monkeypatch.setattr(norm_rotary_kernel, "BACKWARD_PROGRAMS", programs)
        monkeypatch.setattr(norm_rotary_kernel, "NARROW", narrow)
        check(shape, torch.float32, "cpu", 1e-6)

    def test_the_operator_is_a_good_citizen():
        inputs, tables, _, head_dim = case(SHAPES[2], torch.float32, "cpu")
        leaves = [x.requires_grad_() for x in inputs]
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(norm_rotary._norm_rotary, (*leaves, *tables, head_dim, 1e-6), test_utils=tests)

    def test_second_derivatives_are_refused():
        inputs, tables, _, head_dim = case(SHAPES[1], torch.float32, "cpu")
        leaves = [x.requires_grad_() for x in inputs]
        q, _, _ = norm_rotary._norm_rotary(*leaves, *tables, head_dim, 1e-6)
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(q.square().sum(), leaves, create_graph=True)

    def test_a_model_with_it_is_the_model_without(monkeypatch):
        def run():
            model = build(small(depth_kv=True, ffn_kv_proj=True, value_norm=True), dtype=torch.float32)
            loss = sum(model(*tokens()))
            loss.backward()
            return loss.detach(), [parameter.grad for parameter in model.parameters()]

        loss, gradients = run()
        monkeypatch.setattr("models.kernels.available", lambda device, dtype: False)
        want_loss, want = run()
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
        for got, wanted in zip(gradients, want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-4, atol=1e-6)

    @pytest.mark.parametrize("backend", [None, "aot_eager"])
    def test_a_model_with_it_writes_to_its_slots_at_once(backend, monkeypatch):
        copies = []
        copy = torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *rest: copies.append(self.shape) or copy(self, *rest))

        def run(**changes):
            model = build(small(depth_kv=True, ffn_kv_proj=True, **changes), dtype=torch.float32)
            prepare_blocks(model, "none", backend)
            copies.clear()
            loss = sum(model(*tokens()))
            copied = [shape for shape in copies if len(shape) == 4]
            loss.backward()
            return copied, [loss.detach(), *(parameter.grad for parameter in model.parameters())]

        copied, got = run()
        assert not copied
        for changes in ({"attn_kv_proj": True}, {"value_norm": True}):
            assert bool(run(**changes)[0]) == ("value_norm" in changes), "what the value norm returns lies elsewhere"
        monkeypatch.setattr("moda.slot_memory", lambda place: None)
        copied, want = run()
        assert copied
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
