"""The joined backend: a vendor's attention over the sequence, Triton kernels over the slots, on CUDA devices.

In and out as in `moda.reference`, whose mathematics this is: the sequence kernel gives (o, lse), the depth kernel
carries the softmax on over the slots in the same buffers, and a sequence kernel's own backward, given the joint o and
lse, returns the exact gradients of its part. Which sequence kernels do a call is `moda.sequence`'s choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moda import kernels, sequence
from moda.readers import Gradients, Readers
from moda.reference import Slots


def unusable(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str | None:
    """Why this backend cannot take a call, None when it can."""
    if not q.is_cuda:
        return "it needs a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, not {q.dtype}"
    if reason := kernels.unfit(q, k):
        return reason
    if not kernels.available(q.device):
        return "Triton is not installed, or the device is older than Ampere"
    return sequence.unusable(q, k, cu_seqlens)


def explain(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str:
    """What runs."""
    forward, backward = (sequence.choose(q, k, cu_seqlens, kind).name for kind in ("forward", "backward"))
    return f"{forward} forward and {backward} backward over the sequence, Triton over the slots"


def joint_forward(
    q: Tensor, k: Tensor, v: Tensor, slots: Slots, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output, and lse [batch, time, query_heads], fp32, in memory [batch, query_heads, time]."""
    o, lse = sequence.forward(q, k, v, scale, cu_seqlens)
    if slots:
        from moda.kernels import depth

        q = q.contiguous()
        for keys, values in slots:
            depth.depth_forward(q, keys, values, o, lse, scale)
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
    do = do.contiguous()
    dq, dk, dv = sequence.backward(do, q, k, v, out, lse, scale, cu_seqlens)
    gradients: Slots = []
    if slots:
        from moda.kernels import depth

        q = q.contiguous()
        delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
        for index, (keys, values) in enumerate(slots):
            d_keys, d_values = torch.empty_like(keys), torch.empty_like(values)
            depth.depth_backward_query(
                do, q, keys, values, lse, delta, dq, scale, o=out if index == 0 else None, dk=d_keys, dv=d_values
            )
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
    """dq, dk, dv; what the slots pull later is left to `readers` in the same pass."""
    from moda.kernels import depth

    do, q = depth.addressable(do), depth.addressable(q)
    dq, dk, dv = sequence.backward(do, q, k, v, out, lse, scale, cu_seqlens)
    readers.keep(layer, q, do)
    delta, lse_copy, address = readers.delta[layer], readers.lse[layer], readers.addresses[layer]
    for index, (keys, values) in enumerate(slots):
        leave = {"o": out, "address": address, "reader_lse": lse_copy} if index == 0 else {}
        depth.depth_backward_query(do, q, keys, values, lse, delta, dq, scale, **leave)
    return dq, dk, dv


def pull(
    readers: Readers,
    layers: range,
    k: Tensor,
    v: Tensor,
    scale: float,
    partial: Gradients | None,
    dtype: torch.dtype,
    out: Gradients | None = None,
) -> Gradients:
    """Gradients of slots k, v [slots, ...] from the readers of some layers, added to a partial sum; in `dtype`, and in
    the memory of `out` if it is given."""
    from moda.kernels import depth

    dk, dv = out or (torch.empty(k.shape, dtype=dtype, device=k.device) for _ in range(2))
    given = {} if partial is None else {"partial_dk": partial[0], "partial_dv": partial[1]}
    depth.depth_backward_slots(
        readers.addresses, readers.lse, readers.delta, layers.start, layers.stop, k, v, dk, dv, scale, **given
    )
    return dk, dv
