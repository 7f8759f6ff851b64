"""The joined backend: PyTorch's fused attention over the sequence, Triton kernels over the slots, on CUDA devices.

In and out as in `moda.reference`, whose mathematics this is: the sequence kernel gives (o, lse), the depth kernel
carries the softmax on over the slots in the same buffers, and the sequence kernel's own backward, given the joint o and
lse, returns the exact gradients of its part. cuDNN's kernel is taken where it is exact, FlashAttention-2's elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moda import kernels
from moda.readers import Gradients, Readers
from moda.reference import Slots

aten = torch.ops.aten
CUDNN_TIME = 128  # cuDNN's backward is right for multiples of this only


def unusable(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str | None:
    """Why this backend cannot take a call, None when it can."""
    if not q.is_cuda:
        return "it needs a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, not {q.dtype}"
    if q.shape[3] % 16 or not 16 <= q.shape[3] <= 128:
        return f"it needs a head_dim that is a multiple of 16 up to 128, not {q.shape[3]}"
    if cu_seqlens is not None:
        return "it has no document masks"
    if q.shape[1] != k.shape[1]:
        return "it needs as many queries as keys"
    if not kernels.available(q.device):
        return "Triton is not installed, or the device is older than Ampere"
    return None


def explain(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str:
    """What runs."""
    return f"{'cuDNN' if _takes_cudnn(q) else 'FlashAttention-2'} of PyTorch over the sequence, Triton over the slots"


def joint_forward(
    q: Tensor, k: Tensor, v: Tensor, slots: Slots, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and lse [batch, time, query_heads] (fp32, a view of the kernel's own buffer)."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if _takes_cudnn(q):
        result = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, True, False, scale=scale)
    else:
        result = aten._scaled_dot_product_flash_attention(*heads_first, 0.0, True, False, scale=scale)
    o = result[0].transpose(1, 2).contiguous()
    lse = result[1].view(result[1].shape[:3]).transpose(1, 2)
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
    from moda.kernels import depth

    do, q = do.contiguous(), q.contiguous()
    dq, dk, dv = _sequence_backward(do, q, k, v, out, lse, scale)
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    gradients = []
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

    do, q = do.contiguous(), q.contiguous()
    dq, dk, dv = _sequence_backward(do, q, k, v, out, lse, scale)
    readers.keep(layer, q, do)
    delta, lse_copy, address = readers.delta[layer], readers.lse[layer], readers.addresses[layer]
    for index, (keys, values) in enumerate(slots):
        leave = {"o": out, "address": address, "reader_lse": lse_copy} if index == 0 else {}
        depth.depth_backward_query(do, q, keys, values, lse, delta, dq, scale, **leave)
    return dq, dk, dv


def pull(
    readers: Readers, layers: range, k: Tensor, v: Tensor, scale: float, partial: Gradients | None, dtype: torch.dtype
) -> Gradients:
    """Gradients of slots k, v [slots, ...] from the readers of some layers, added to a partial sum; in `dtype`."""
    from moda.kernels import depth

    dk, dv = (torch.empty(k.shape, dtype=dtype, device=k.device) for _ in range(2))
    given = {} if partial is None else {"partial_dk": partial[0], "partial_dv": partial[1]}
    depth.depth_backward_slots(
        readers.addresses, readers.lse, readers.delta, layers.start, layers.stop, k, v, dk, dv, scale, **given
    )
    return dk, dv


def _takes_cudnn(q: Tensor) -> bool:
    return q.shape[1] % CUDNN_TIME == 0 and not torch.are_deterministic_algorithms_enabled()


def _sequence_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads_first = [x.transpose(1, 2) for x in (do, q, k, v, out)]
    lse = lse.transpose(1, 2)  # the forward kernel's own layout again
    time = q.shape[1]
    seed = torch.empty(2, dtype=torch.int64, device=q.device)  # of the dropout that is not there: never read
    if _takes_cudnn(q):
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse[..., None], seed[0], seed[1], None, None, None, time, time, 0.0, True, scale=scale
        )
    else:
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *heads_first, lse, None, None, time, time, 0.0, True, seed[0], seed[1], scale=scale
        )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq.contiguous(), dk, dv
