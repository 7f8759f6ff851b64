"""Joint sequence and depth attention in plain PyTorch: the definition, and the same mathematics in parts.

`definition` is the paper's sentence as code: one softmax over the concatenated logits, differentiated by autograd. It
is the ground truth of the tests. The other functions compute the same thing in the parts that a kernel has, forward and
backward apart, without keeping scores for backward:

    o_s, lse_s            = softmax over the sequence
    lse                   = log(exp lse_s + sum_j exp s_j)                  s_j = q.k_j * scale, j over depth slots
    o                     = exp(lse_s - lse) o_s + sum_j exp(s_j - lse) v_j
    p_j = exp(s_j - lse), ds_j = p_j (do.v_j - delta),  delta = rowsum(do * o)
    dq = dq_s + sum_j ds_j k_j * scale,  dk_j = ds_j q * scale,  dv_j = p_j do,  the last two summed over the G query
    heads of a kv head; dq_s, dk, dv of the sequence follow the same formulas from the joint o and lse.

Arithmetic is in fp32 (float64 for float64 inputs), under autocast too; outputs have the dtype of the queries. Where
there are fewer queries than keys of the sequence, they are those of its last tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from moda.readers import Gradients, Readers

P = ParamSpec("P")
R = TypeVar("R")

Slots = list[tuple[Tensor, Tensor]]  # ranges of keys and values [slots, batch, time, kv_heads, head_dim]

QUERY_CHUNK = 512  # queries whose scores exist at one time: bounds the transient memory, skips most of the masked half


def in_own_dtypes(function: Callable[P, R]) -> Callable[P, R]:
    """Without autocast, which would round the factors of products, in a registered operator and its backward too."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        device = next(x for x in arguments if isinstance(x, Tensor)).device.type
        if not torch.amp.is_autocast_available(device):  # as on meta
            return function(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **options)

    return run


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: float64 for float64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def document_ids(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Number of the document of every token, [batch, time], from cumulative lengths over the flattened tokens."""
    tokens = torch.arange(batch * time, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.to(tokens.dtype), tokens, right=True).view(batch, time)


def visible(documents: Tensor | None, start: int, stop: int, device: torch.device) -> Tensor:
    """Which keys 0..stop-1 the queries at start..stop-1 may see: causal, same document. [batch or 1, queries, keys]."""
    queries = torch.arange(start, stop, device=device)
    mask = (torch.arange(stop, device=device) <= queries[:, None])[None]
    if documents is None:
        return mask
    return mask & (documents[:, start:stop, None] == documents[:, None, :stop])


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The joint softmax as it is defined (paper, section 3), differentiable by autograd in every input.

    Shapes as `moda.attention`; returns (out [batch, time, query_heads, head_dim], lse [batch, time, query_heads]) in
    the dtype of q. Memory grows with time squared.
    """
    batch, time, query_heads, head_dim = q.shape
    group = query_heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    documents = None if cu_seqlens is None else document_ids(cu_seqlens, batch, time)
    keys = k.shape[1]
    mask = visible(documents, keys - time, keys, q.device)
    logits = torch.einsum("bthd,buhd->bthu", q, k.repeat_interleave(group, 2)) * scale
    logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
    if depth_k is not None:
        depth_logits = torch.einsum("bthd,sbthd->bths", q, depth_k.repeat_interleave(group, 3)) * scale
        logits = torch.cat((logits, depth_logits), -1)
    p = logits.softmax(-1)
    out = torch.einsum("bthu,buhd->bthd", p[..., :keys], v.repeat_interleave(group, 2))
    if depth_v is not None:
        out = out + torch.einsum("bths,sbthd->bthd", p[..., keys:], depth_v.repeat_interleave(group, 3))
    return out, logits.logsumexp(-1)


def sequence_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention over the sequence alone.

    Returns o [batch, time, query_heads, head_dim] and lse [batch, time, query_heads], both in the accumulation dtype;
    lse lies in memory as [batch, query_heads, time], as in the vendors' kernels.
    """
    batch, time, _, _ = q.shape
    kv_heads, offset = k.shape[2], k.shape[1] - time
    rows, keys, values = _by_kv_head(q, kv_heads), _by_head(k), _by_head(v)
    documents = None if cu_seqlens is None else document_ids(cu_seqlens, batch, time)
    o = torch.empty_like(rows)
    lse = rows.new_empty(rows.shape[:-1])
    for start in range(0, time, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, time)
        s = _scores(rows, keys, documents, start, stop, scale)
        lse_chunk = s.logsumexp(-1)
        p = torch.exp(s - lse_chunk[..., None])
        o[..., start:stop, :] = (p.flatten(2, 3) @ values[:, :, : offset + stop]).view_as(o[..., start:stop, :])
        lse[..., start:stop] = lse_chunk
    return _by_token(o), lse.flatten(1, 2).transpose(1, 2)


def sequence_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sequence part, given the joint lse and delta = rowsum(do * o) of the joint o.

    Returns dq, dk, dv in the accumulation dtype, shaped as q, k, v.
    """
    batch, time, _, _ = q.shape
    kv_heads, offset = k.shape[2], k.shape[1] - time
    rows, keys, values, grads = _by_kv_head(q, kv_heads), _by_head(k), _by_head(v), _by_kv_head(do, kv_heads)
    lse_rows, delta_rows = _by_kv_head(lse[..., None], kv_heads), _by_kv_head(delta[..., None], kv_heads)
    documents = None if cu_seqlens is None else document_ids(cu_seqlens, batch, time)
    dq = torch.empty_like(rows)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, time, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, time)
        chunk, seen = slice(start, stop), slice(offset + stop)
        p = torch.exp(_scores(rows, keys, documents, start, stop, scale) - lse_rows[..., chunk, :])
        do_rows = grads[..., chunk, :].flatten(2, 3)
        dp = (do_rows @ values[:, :, seen].mT).view_as(p)
        ds = (p * (dp - delta_rows[..., chunk, :]) * scale).flatten(2, 3)
        dq[..., chunk, :] = (ds @ keys[:, :, seen]).view_as(dq[..., chunk, :])
        dk[:, :, seen] += ds.mT @ rows[..., chunk, :].flatten(2, 3)
        dv[:, :, seen] += p.flatten(2, 3).mT @ do_rows
    return _by_token(dq), dk.transpose(1, 2), dv.transpose(1, 2)


def depth_forward(
    q: Tensor, depth_k: Tensor, depth_v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Carry the softmax state (o, lse) on over the slots depth_k, depth_v [slots, batch, time, kv_heads, head_dim].

    Returns the new (o, lse) in the dtype of the given ones.
    """
    s = _depth_scores(q, depth_k, scale, lse.dtype)
    joint = torch.logaddexp(lse, s.logsumexp(-1))
    p = torch.exp(s - joint[..., None])
    read = torch.einsum("bthgs,sbthd->bthgd", _grouped(p, depth_k.shape[3]), depth_v.to(o.dtype))
    return o * torch.exp(lse - joint)[..., None] + read.reshape(o.shape), joint


def depth_backward_query(
    do: Tensor, q: Tensor, depth_k: Tensor, depth_v: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """What the slots add to the gradient of the queries: sum_j ds_j k_j * scale, shaped as q, accumulation dtype."""
    kv_heads = depth_k.shape[3]
    p = torch.exp(_depth_scores(q, depth_k, scale, lse.dtype) - lse[..., None])
    dp = _depth_scores(do, depth_v, 1.0, lse.dtype)
    ds = p * (dp - delta[..., None]) * scale
    return torch.einsum("bthgs,sbthd->bthgd", _grouped(ds, kv_heads), depth_k.to(lse.dtype)).reshape(q.shape)


def depth_backward_slots(
    do: Tensor, q: Tensor, depth_k: Tensor, depth_v: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the slots that one reader (q, do, lse, delta) has read; shaped as depth_k, accumulation dtype."""
    kv_heads = depth_k.shape[3]
    p = torch.exp(_depth_scores(q, depth_k, scale, lse.dtype) - lse[..., None])
    dp = _depth_scores(do, depth_v, 1.0, lse.dtype)
    ds = p * (dp - delta[..., None]) * scale
    queries, grads = _grouped(q.to(lse.dtype), kv_heads), _grouped(do.to(lse.dtype), kv_heads)
    dk = torch.einsum("bthgs,bthgd->sbthd", _grouped(ds, kv_heads), queries)
    dv = torch.einsum("bthgs,bthgd->sbthd", _grouped(p, kv_heads), grads)
    return dk, dv


def unusable(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str | None:
    """Why this backend cannot take a call: it takes every one."""
    return None


def explain(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str:
    """What runs."""
    return "plain PyTorch operations"


@in_own_dtypes
def joint_forward(
    q: Tensor, k: Tensor, v: Tensor, slots: Slots, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (dtype of q) and lse (accumulation dtype)."""
    o, lse = sequence_forward(q, k, v, scale, cu_seqlens)
    for keys, values in slots:
        o, lse = depth_forward(q, keys, values, o, lse, scale)
    return o.to(q.dtype), lse


@in_own_dtypes
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
    lse = lse.to(accumulation_dtype(q.dtype))
    dq, dk, dv, delta = _joint_backward(do, q, k, v, out, lse, slots, scale, cu_seqlens)
    return dq, dk, dv, [depth_backward_slots(do, q, *pair, lse, delta, scale) for pair in slots]


@in_own_dtypes
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
    """dq, dk, dv; q, do, lse and delta are left to `readers` under the number of the layer, for the slots to pull."""
    dq, dk, dv, delta = _joint_backward(do, q, k, v, out, lse, slots, scale, cu_seqlens)
    readers.keep(layer, q, do)
    readers.lse[layer].copy_(lse)
    readers.delta[layer].copy_(delta)
    return dq, dk, dv


@in_own_dtypes
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
    total = partial or tuple(torch.zeros_like(x, dtype=readers.delta.dtype) for x in (k, v))
    for layer in layers:
        q, do = readers.tensors[layer]
        read = depth_backward_slots(do, q, k, v, readers.lse[layer], readers.delta[layer], scale)
        total = (total[0] + read[0], total[1] + read[1])
    if out is None:
        lent = total is partial  # of no layer: memory that the next block takes
        return total[0].to(dtype, copy=lent), total[1].to(dtype, copy=lent)
    return out[0].copy_(total[0]), out[1].copy_(total[1])


def _joint_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Slots,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    delta = (do.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    dq, dk, dv = sequence_backward(do, q, k, v, lse, delta, scale, cu_seqlens)
    for keys, values in slots:
        dq = dq + depth_backward_query(do, q, keys, values, lse, delta, scale)
    return dq, dk, dv, delta


def _depth_scores(q: Tensor, depth_k: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """q.k_j * scale for every slot j. [batch, time, query_heads, slots]."""
    s = torch.einsum("bthgd,sbthd->bthgs", _grouped(q.to(dtype), depth_k.shape[3]), depth_k.to(dtype)) * scale
    return s.flatten(2, 3)


def _scores(rows: Tensor, keys: Tensor, documents: Tensor | None, start: int, stop: int, scale: float) -> Tensor:
    """Masked scores of queries start..stop-1 with the keys they may see. [batch, kv_heads, group, queries, keys]."""
    queries, offset = rows[..., start:stop, :], keys.shape[2] - rows.shape[3]
    seen = offset + stop
    s = (queries.flatten(2, 3) @ keys[:, :, :seen].mT).view(*queries.shape[:-1], seen) * scale
    return s.masked_fill_(~visible(documents, offset + start, seen, rows.device)[:, None, None], float("-inf"))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, time, query_heads, ...] to [batch, time, kv_heads, group, ...]."""
    return x.unflatten(2, (kv_heads, -1))


def _by_head(x: Tensor) -> Tensor:
    """[batch, time, kv_heads, head_dim] to [batch, kv_heads, time, head_dim], accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).transpose(1, 2)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, time, query_heads, n] to contiguous [batch, kv_heads, group, time, n], accumulation dtype."""
    return _grouped(x.to(accumulation_dtype(x.dtype)), kv_heads).permute(0, 2, 3, 1, 4).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """[batch, kv_heads, group, time, n] to [batch, time, query_heads, n]."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)
