"""The public operator: joint attention over a sequence and over given depth slots, with dense gradients for all inputs.

In: queries, keys, values and, optionally, depth keys and values. Out: the attention output, and its log-sum-exp on
request. Arguments are checked here; the arithmetic is a backend's (`moda.reference`, `moda.joined`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from moda import joined, reference
from moda.first_order import first_order

BACKENDS = {"reference": reference, "joined": joined}


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal grouped-query attention where a token also reads its own depth slots, in one softmax (paper, section 3).

    Args:
        q: queries [batch, time, query_heads, head_dim].
        k, v: keys and values [batch, time, kv_heads, head_dim]; query head h reads kv head
            h // (query_heads / kv_heads).
        depth_k, depth_v: depth keys and values [slots, batch, time, kv_heads, head_dim], read at the query's own
            position only. Both or neither; zero slots are allowed.
        scale: factor of the scores; head_dim ** -0.5 when None.
        cu_seqlens: cumulative document lengths over the flattened batch * time tokens, integers from 0 to batch * time;
            a token sees its own document only. The end of a row ends a document too.
        backend: "reference" (plain PyTorch, anywhere), "joined" (fused kernels: CUDA, bf16 or fp16, no documents), or
            "auto", which takes joined where it can.
        return_lse: return the log-sum-exp of the joint scores too.

    Returns:
        out [batch, time, query_heads, head_dim] in the dtype of q; with `return_lse`, (out, lse) with lse in fp32,
        natural logarithm, [batch, time, query_heads], not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend does not exist or cannot do this.
    """
    check_sequence(q, k, v, cu_seqlens)
    _check_depth(k, depth_k, depth_v)
    operations = choose_backend(backend, q, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _Attention.apply(q, k, v, depth_k, depth_v, scale, cu_seqlens, operations)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    """Keeps inputs, o and lse, never the scores."""

    @staticmethod
    def forward(ctx, q, k, v, depth_k, depth_v, scale, cu_seqlens, operations):
        if depth_k is not None:
            depth_k, depth_v = depth_k.contiguous(), depth_v.contiguous()
        slots = [] if depth_k is None or not len(depth_k) else [(depth_k, depth_v)]
        out, lse, state = operations.joint_forward(q, k, v, slots, scale, cu_seqlens)
        ctx.save_for_backward(q, k, v, depth_k, depth_v, out, lse, cu_seqlens, *state)
        ctx.scale, ctx.operations = scale, operations
        lse_out = lse.to(torch.float32, copy=True)
        ctx.mark_non_differentiable(lse_out)
        return out, lse_out

    @staticmethod
    @first_order
    def backward(ctx, do, _):
        q, k, v, depth_k, depth_v, out, lse, cu_seqlens, *state = ctx.saved_tensors
        slots = [] if depth_k is None or not len(depth_k) else [(depth_k, depth_v)]
        dq, dk, dv, gradients = ctx.operations.joint_backward(
            do, q, k, v, out, lse, state, slots, ctx.scale, cu_seqlens
        )
        depth_dk, depth_dv = depth_k, depth_v  # of no slots, or none at all: their own gradients
        for depth_dk, depth_dv in gradients:
            depth_dk, depth_dv = depth_dk.to(k.dtype), depth_dv.to(v.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), depth_dk, depth_dv, None, None, None


def choose_backend(backend: str, q: Tensor, cu_seqlens: Tensor | None) -> ModuleType:
    """The module that does a call. Raises ValueError for a backend that does not exist or cannot take the call."""
    if backend == "auto":
        return reference if joined.unusable(q, cu_seqlens) else joined
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist: choose one of auto, {', '.join(BACKENDS)}.")
    if backend == "joined" and (reason := joined.unusable(q, cu_seqlens)):
        raise ValueError(f"backend='joined' cannot take this call: {reason}. Use backend='auto'.")
    return BACKENDS[backend]


def check_sequence(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError, with the shapes in it, unless q, k, v and cu_seqlens fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q, k and v must have the axes [batch, time, heads, head_dim], got {shapes}.")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k and v must have one shape, and batch, time and head_dim of q, got {shapes}.")
    if q.numel() == 0 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"The query heads must be a positive multiple of the kv heads, no axis empty, got {shapes}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}.")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point()):
        raise ValueError(
            "cu_seqlens must hold integers [documents + 1] from 0 to batch * time, "
            f"got shape {tuple(cu_seqlens.shape)}, dtype {cu_seqlens.dtype}."
        )
    if cu_seqlens is not None and cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on the device of q, {q.device}, got {cu_seqlens.device}.")
    if cu_seqlens is not None and not cu_seqlens.is_cuda:  # reading values on a GPU would stall its queue
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != q.shape[0] * q.shape[1] or sorted(ends) != ends:
            raise ValueError(f"cu_seqlens must rise from 0 to batch * time = {q.shape[0] * q.shape[1]}, got {ends}.")


def _check_depth(k: Tensor, depth_k: Tensor | None, depth_v: Tensor | None) -> None:
    if depth_k is None or depth_v is None:
        if depth_k is not depth_v:
            raise ValueError("depth_k and depth_v are given together or not at all.")
        return
    if depth_k.dim() != 5 or depth_k.shape != depth_v.shape or depth_k.shape[1:] != k.shape:
        raise ValueError(
            "depth_k and depth_v must both have the axes [slots, batch, time, kv_heads, head_dim] of k, "
            f"got depth_k {tuple(depth_k.shape)}, depth_v {tuple(depth_v.shape)}, k {tuple(k.shape)}."
        )
    if not depth_k.dtype == depth_v.dtype == k.dtype or not depth_k.device == depth_v.device == k.device:
        raise ValueError(
            "depth_k and depth_v must have the dtype and device of k, "
            f"got {depth_k.dtype} {depth_k.device}, {depth_v.dtype} {depth_v.device}, k {k.dtype} {k.device}."
        )
