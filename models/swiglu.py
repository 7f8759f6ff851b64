"""The feed-forward layer w2(silu(w1 x) * w3 x) as one operator with a gradient of its own (OLMo 2, section 2.1).

In: x and two weights, that of gate and up fused. Out: the layer's output, in the dtype of x. Backward keeps x and the
product of gate and up, and makes silu(gate) * up again while it goes over that product: a third less to keep.

Where `models.gated_products` has them, silu(gate) * up is computed inside the products before and after it, forward and
backward, so that nothing is read to be multiplied only. Elsewhere on a GPU it is a Triton kernel each way
(`models.swiglu_kernel`), and without one it is PyTorch. All compute it in fp32 (float64 stays) and round once.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moda.first_order import first_order, refuse_tangents
from models import gated_products
from models.kernels import LIBRARY, at_least_fp32, available, registered


def swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
) -> Tensor:
    """silu(x gateᵀ) * (x upᵀ) downᵀ: [..., out_features], contiguous, in the dtype of x.

    Args:
        x: [..., in_features], of two axes or more.
        gate_up: [2 * intermediate_size, in_features], gate above up.
        down: [out_features, intermediate_size].
        gate_up_bias, down_bias: [2 * intermediate_size] and [out_features], both or neither.

    Gradients of the first order, in reverse mode; all of them are computed, those of frozen weights too.
    """
    if not torch.compiler.is_compiling():
        refuse_tangents(x, gate_up, down, gate_up_bias, down_bias)
    none = x.new_empty(0)
    biases = (none if bias is None else bias for bias in (gate_up_bias, down_bias))
    return _swiglu(x, gate_up, down, *biases)[0]


def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor, down_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The output, and the product of gate and up as the backward takes it, [rows, 2 * intermediate_size].

    A bias of no elements is none.
    """
    rows = x.flatten(0, -2).contiguous()
    if gated_products.available(rows, gate_up, down, _given(gate_up_bias)):
        product, hidden = gated_products.forward(rows, gate_up)
    else:
        product = F.linear(rows, gate_up, _given(gate_up_bias))
        hidden = _hidden(product)
    return F.linear(hidden, down, _given(down_bias)).view(*x.shape[:-1], len(down)), product


def _forward_fake(x, gate_up, down, gate_up_bias, down_bias):
    return x.new_empty(*x.shape[:-1], len(down)), x.new_empty(x[..., 0].numel(), len(gate_up))


def _backward(
    dout: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor, product: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and the biases, the last two empty where there are none."""
    rows, drows = (t.flatten(0, -2).contiguous() for t in (x, dout))
    if gated_products.available(rows, gate_up, down, _given(gate_up_bias)):
        dproduct, hidden = gated_products.backward(drows, down, product)
        dx = dproduct @ gated_products.interleaved(gate_up)
        dgate_up = gated_products.side_by_side(dproduct.t() @ rows)
    else:
        dproduct, hidden = _product_gradient(drows @ down, product)
        dx, dgate_up = dproduct @ gate_up, dproduct.t() @ rows
    biased = _given(gate_up_bias) is not None
    biases = (dproduct.sum(0), drows.sum(0)) if biased else (x.new_empty(0), x.new_empty(0))
    return dx.view(x.shape), dgate_up, drows.t() @ hidden, *biases


def _backward_fake(dout, x, gate_up, down, gate_up_bias, product):
    biases = (len(gate_up), len(down)) if len(gate_up_bias) else (0, 0)
    return *(t.new_empty(t.shape) for t in (x, gate_up, down)), *(x.new_empty(size) for size in biases)


def _given(bias: Tensor) -> Tensor | None:
    return bias if len(bias) else None


def _hidden(product: Tensor) -> Tensor:
    """silu(gate) * up of a product that has gate beside up."""
    if available(product.device, product.dtype):
        from models.swiglu_kernel import forward

        return forward(product)
    gate, up = at_least_fp32(product).chunk(2, -1)
    return (F.silu(gate) * up).to(product.dtype)


def _product_gradient(dhidden: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `product` from that of silu(gate) * up, and the latter itself once more."""
    if available(product.device, product.dtype):
        from models.swiglu_kernel import backward

        return backward(dhidden, product)
    gate, up = at_least_fp32(product).chunk(2, -1)
    silu, grad = F.silu(gate), at_least_fp32(dhidden)
    dgate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((dgate, grad * silu), -1).to(product.dtype), (silu * up).to(product.dtype)


_swiglu = registered("swiglu", _forward, _forward_fake)
_swiglu_backward = registered("swiglu_backward", _backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    *saved, _ = inputs
    ctx.save_for_backward(*saved, output[1])
    ctx.set_materialize_grads(False)


@first_order
def _gradient(ctx, dout, _):
    return (None,) * 5 if dout is None else _swiglu_backward(dout, *ctx.saved_tensors)


torch.library.register_autograd("models::swiglu", _gradient, setup_context=_setup_context, lib=LIBRARY)


@register_flop_formula(torch.ops.models.swiglu)
def _forward_flops(x_shape, gate_up_shape, down_shape, *_, **__) -> int:
    """Of the two products."""
    return 2 * prod(x_shape[:-1]) * (prod(gate_up_shape) + prod(down_shape))


@register_flop_formula(torch.ops.models.swiglu_backward)
def _backward_flops(dout_shape, *shapes, **__) -> int:
    """Of the four."""
    return 2 * _forward_flops(*shapes)
