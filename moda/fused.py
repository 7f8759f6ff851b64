"""The fused backend: one Triton kernel over the sequence and the slots, wherever Triton runs, document masks included.

In and out as in `moda.reference`, whose mathematics this is. Forward, the first range of slots and the sequence share
one online softmax in one kernel; further ranges, which only a bounded stream has, are carried on over in place.
Backward, the sequence part has kernels of its own, and the slots those of `moda.kernels.depth`. Every gradient is
summed in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moda import kernels
from moda.joined import pull
from moda.readers import Readers
from moda.reference import Slots

__all__ = ["explain", "joint_backward", "joint_forward", "pull", "reader_backward", "unusable"]


def unusable(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str | None:
    """Why this backend cannot take a call, None when it can."""
    dtypes = (torch.float32,) if kernels.INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
    if not kernels.available(q.device):
        return "it needs Triton and a CUDA device, Ampere or later"
    if q.dtype not in dtypes:
        where = " in Triton's interpreter (TRITON_INTERPRET)" if kernels.INTERPRETED else ""
        return f"it needs {', '.join(str(dtype) for dtype in dtypes)}{where}, not {q.dtype}"
    if reason := kernels.unfit(q, k):
        return reason
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        return "it has no document masks for queries that are fewer than the keys"
    return None


def explain(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str:
    """What runs."""
    return "Triton over sequence and slots in one kernel"


def joint_forward(
    q: Tensor, k: Tensor, v: Tensor, slots: Slots, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [batch, time, query_heads, head_dim] and lse [batch, time, query_heads] (a transposed view)."""
    from moda.kernels import depth, fused

    o, lse = fused.joint_forward(q, k, v, slots[0] if slots else None, scale, cu_seqlens)
    for keys, values in slots[1:]:
        depth.depth_forward(q.contiguous(), keys, values, o, lse, scale)
    return o, lse


def joint_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Slots,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Slots]:
    """dq, dk, dv, and the gradients of each range of slots that this one reader gives."""
    from moda.kernels import depth, fused

    do = do.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    dq, dk, dv = fused.sequence_backward(do, q, k, v, out, lse, delta, scale, cu_seqlens)
    q = q.contiguous()
    gradients = []
    for keys, values in slots:
        d_keys, d_values = torch.empty_like(keys), torch.empty_like(values)
        depth.depth_backward_query(do, q, keys, values, lse, delta, dq, scale, dk=d_keys, dv=d_values)
        gradients.append((d_keys, d_values))
    return dq, dk, dv, gradients


def reader_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Slots,
    scale: float,
    cu_seqlens: Tensor | None,
    readers: Readers,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; what the slots pull later is left to `readers`."""
    from moda.kernels import depth, fused

    do, delta = depth.addressable(do), readers.delta[layer]
    dq, dk, dv = fused.sequence_backward(do, q, k, v, out, lse, delta, scale, cu_seqlens)
    q = depth.addressable(q)
    readers.keep(layer, q, do)
    leave = {"address": readers.addresses[layer], "reader_lse": readers.lse[layer]}
    for keys, values in slots:
        depth.depth_backward_query(do, q, keys, values, lse, delta, dq, scale, **leave)
        leave = {}
    return dq, dk, dv
