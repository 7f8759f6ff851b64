"""QK-norm and rotary embedding of a fused projection in one pass over it, forward and backward (OLMo 2, section 2.1).

In: the product of a fused projection, [batch, time, q_width + 2 * kv_width], queries before keys before values. Out:
queries and keys, normalised over their full width and rotated, and values, [batch, time, heads, head_dim] each. What
`models.layers` says in PyTorch, for GPUs, where the compiler makes of it several kernels that go through the product
two to three times: an operator of torch.library, opaque to it, around the Triton kernels of
`models.norm_rotary_kernel`. Arithmetic is fp32; nothing is rounded between the norm and the rotation.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

import moda
from moda.first_order import first_order, refuse_tangents
from models.kernels import LIBRARY, registered


def norm_rotary(
    product: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, time, heads, head_dim], contiguous, in the dtype of `product`.

    Args:
        product: [batch, time, q_width + 2 * kv_width], bf16, fp16 or fp32 (fp32 in Triton's interpreter).
        q_weight: weights of the queries' norm, [q_width]; None: the product has no queries, and q has no heads.
        k_weight: of the keys' norm, [kv_width].
        cos, sin: rotary tables [batch or 1, time, 1, head_dim / 2], fp32.
        eps: added to the mean square.
        place: of a depth slot (`moda.DepthStream.place`), whose memory k and v are written to, if it takes them.

    Gradients reach `product` and the weights, first order and reverse mode only.
    """
    if not torch.compiler.is_compiling():
        refuse_tangents(product, q_weight, k_weight)
    none = k_weight.new_empty(0) if q_weight is None else q_weight
    return _norm_rotary(product, none, k_weight, cos, sin, head_dim, eps, place)


def _forward(
    product: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
    place: Optional[Tensor] = None,  # noqa: UP045  # as infer_schema reads it
) -> tuple[Tensor, Tensor, Tensor]:
    from models.norm_rotary_kernel import forward

    # To the compiler k and v are new tensors, as they should be: nothing else uses that memory before the slot's write.
    memory = None if place is None else moda.slot_memory(place)
    tables = (cos.contiguous(), sin.contiguous())
    return forward(product.contiguous(), q_weight, k_weight, *tables, head_dim, eps, memory)


def _forward_fake(product, q_weight, k_weight, cos, sin, head_dim, eps, place=None):
    batch, time, _ = product.shape
    widths = (len(q_weight), len(k_weight), len(k_weight))
    q, k, v = (product.new_empty(batch, time, width // head_dim, head_dim) for width in widths)
    return q, k, v


def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    product: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from models.norm_rotary_kernel import backward

    gradients = (dq.contiguous(), dk.contiguous(), dv.contiguous())
    tables = (cos.contiguous(), sin.contiguous())
    return backward(*gradients, product.contiguous(), q_weight, k_weight, *tables, head_dim, eps)


def _backward_fake(dq, dk, dv, product, q_weight, k_weight, cos, sin, head_dim, eps):
    return product.new_empty(product.shape), torch.empty_like(q_weight), torch.empty_like(k_weight)


_norm_rotary = registered("norm_rotary", _forward, _forward_fake)
_norm_rotary_backward = registered("norm_rotary_backward", _backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.head_dim, ctx.eps, _ = inputs  # no place: backward does not write there
    ctx.save_for_backward(*tensors)


@first_order
def _gradients(ctx, dq, dk, dv):
    gradients = _norm_rotary_backward(dq, dk, dv, *ctx.saved_tensors, ctx.head_dim, ctx.eps)
    return *gradients, None, None, None, None, None


torch.library.register_autograd("models::norm_rotary", _gradients, setup_context=_setup_context, lib=LIBRARY)
