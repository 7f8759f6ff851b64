"""`moda.attention` as a functional pair of registered operators, with fake kernels and a gradient: it compiles.

In: checked arguments (`moda.attention` has the user's interface). Out: new tensors that alias nothing. What is kept for
backward is inputs, o and lse, never scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moda.backends import choose_backend
from moda.first_order import first_order
from moda.reference import Slots


@torch.library.custom_op("moda::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None,
    depth_v: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output [batch, time, query_heads, head_dim], contiguous, and lse [batch, time, query_heads] in memory
    [batch, query_heads, time], in `_lse_dtype`."""
    check_documents(q, cu_seqlens)  # here, as code compiled around the call has no values before it runs
    check_scale(scale)
    operations = choose_backend(backend, q, k, cu_seqlens)
    out, lse = operations.joint_forward(q, k, v, _slots(depth_k, depth_v), scale, cu_seqlens)
    lse = lse.to(_lse_dtype(q)).transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous(), lse


@attention.register_fake
def _(q, k, v, depth_k, depth_v, scale, cu_seqlens, backend):
    batch, time, query_heads, _ = q.shape
    lse = q.new_empty(batch, query_heads, time, dtype=_lse_dtype(q))
    return q.new_empty(q.shape), lse.transpose(1, 2)


@torch.library.custom_op("moda::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None,
    depth_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the slots (of no elements where there are no slots), contiguous."""
    operations = choose_backend(backend, q, k, cu_seqlens)
    # What was compiled in between may have given lse other strides.
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    slots = _slots(depth_k, depth_v)
    dq, dk, dv, read = operations.joint_backward(do, q, k, v, out, lse, slots, scale, cu_seqlens)
    depth_dk, depth_dv = read[0] if read else (k.new_empty(_no_slots(depth_k)), v.new_empty(_no_slots(depth_v)))
    gradients = zip((dq, dk, dv, depth_dk, depth_dv), (q, k, v, k, v), strict=True)
    return tuple(gradient.to(like.dtype).contiguous() for gradient, like in gradients)


@attention_backward.register_fake
def _(do, q, k, v, depth_k, depth_v, out, lse, scale, cu_seqlens, backend):
    of_slots = [k.new_empty(_no_slots(slots) if slots is None else slots.shape) for slots in (depth_k, depth_v)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *of_slots


def _setup_context(ctx, inputs, output):
    q, k, v, depth_k, depth_v, scale, cu_seqlens, backend = inputs
    ctx.save_for_backward(q, k, v, depth_k, depth_v, *output, cu_seqlens)
    ctx.scale, ctx.backend = scale, backend
    ctx.set_materialize_grads(False)


@first_order
def _backward(ctx, do, _):
    q, k, v, depth_k, depth_v, out, lse, cu_seqlens = ctx.saved_tensors
    if do is None:
        return (None,) * 8
    *gradients, depth_dk, depth_dv = attention_backward(
        do, q, k, v, depth_k, depth_v, out, lse, ctx.scale, cu_seqlens, ctx.backend
    )
    of_slots = (None, None) if depth_k is None else (depth_dk, depth_dv)
    return *gradients, *of_slots, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)


def check_documents(q: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to the tokens of q; a GPU's is not read, to stall no queue."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    ends, tokens = cu_seqlens.tolist(), q.shape[0] * q.shape[1]
    if ends[0] != 0 or ends[-1] != tokens or sorted(ends) != ends:
        raise ValueError(f"cu_seqlens must rise from 0 to batch * time = {tokens}, got {ends}.")


def check_scale(scale: float) -> None:
    """Raise ValueError for a factor of the scores that would make every output no number.

    Kernels take it in fp32, times log2(e) for scores in powers of two.
    """
    if not abs(scale) * math.log2(math.e) <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"scale={scale} is no finite number in fp32: use one of the size of head_dim ** -0.5, or None for that."
        )


def _lse_dtype(q: Tensor) -> torch.dtype:
    """fp32 for bf16 and fp16, else fp64: of fp32 inputs `fused` gives and takes more of lse than fp32 can hold."""
    return torch.float32 if q.dtype.itemsize == 2 else torch.float64


def _slots(depth_k: Tensor | None, depth_v: Tensor | None) -> Slots:
    if depth_k is None or depth_v is None or not len(depth_k):
        return []
    return [(depth_k.contiguous(), depth_v.contiguous())]


def _no_slots(depth: Tensor | None) -> tuple[int, ...]:
    return (0,) if depth is None else tuple(depth.shape)


@register_flop_formula(torch.ops.moda.attention)
def _forward_flops(q_shape, k_shape, v_shape, depth_k_shape, *args, **kwargs) -> int:
    """As PyTorch counts attention: two products over the whole square, and the same over the slots."""
    batch, time, query_heads, head_dim = q_shape
    slots = 0 if depth_k_shape is None else depth_k_shape[0]
    return 4 * batch * time * query_heads * head_dim * (k_shape[1] + slots)


@register_flop_formula(torch.ops.moda.attention_backward)
def _backward_flops(do_shape, *shapes, **kwargs) -> int:
    """Five products where the forward has two: scores again, and the gradients of p, q, k and v."""
    return _forward_flops(*shapes) * 5 // 2
