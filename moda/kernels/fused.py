"""The fused kernels: joint attention forward over sequence and slots at once, and the sequence part of its backward.

Plain functions on tensors, no autograd; they allocate what they return. Queries [batch, time, query_heads, head_dim],
keys and values [batch, key_time, kv_heads, head_dim] with any strides (views of one fused projection serve as they
are); the queries are the last `time` of the key_time positions. Slots are slices of buffers [slots, batch, time,
kv_heads, head_dim] whose first axis may have any stride. lse is fp32, of fp32 inputs fp64 (`moda.kernels.precision`
says why), [batch, time, query_heads] in the memory order [batch, query_heads, time]. dtypes: bf16, fp16, fp32, one for
all; sums run in fp32 in a fixed order, so that the same inputs give the same bits. Shapes are checked by the callers,
so that what does not fit is an assertion.

Launches are looked up, never measured (`tiles`); the kernels are in `fused_forward` and `fused_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moda.kernels import MAX_GROUP, fused_backward, fused_forward
from moda.kernels.depth import lse_dtype

# Pairs of sequence and kv head take turns in a kernel, as many at a time as fit the cache and at least so many that
# there are PROGRAMS of them. A compromise for an H100, whose L2 holds 50 MB: 2**23 was faster for 8 rows
# of 4096 tokens in groups of 2, and slower for groups of 32 (docs/benchmarks.md).
CACHE_BYTES, PROGRAMS = 2**24, 256


class Tiles(NamedTuple):
    """How a kernel is launched."""

    rows: int  # queries a tile: heads of a group times tokens
    keys: int  # keys a tile
    warps: int
    stages: int  # loads in flight, in iterations over the sequence
    slot_stages: int = 3  # likewise over the slots


# By kernel, the first line that fits: largest head_dim (padded to a power of two), tiles. "forward" is over the
# sequence alone, "depth" over slots too, "query" and "keys" are the two kernels of the backward. They are the fastest
# of those timed on an H200 for groups 2 and 8 at 4096 and 16384 tokens.
HALF: dict[str, list[tuple[int, Tiles]]] = {
    "forward": [(64, Tiles(128, 64, 8, 3)), (128, Tiles(64, 64, 4, 3))],
    "depth": [(128, Tiles(64, 64, 4, 3))],
    "query": [(64, Tiles(64, 64, 4, 3)), (128, Tiles(128, 64, 8, 3))],
    "keys": [(64, Tiles(64, 64, 4, 3)), (128, Tiles(32, 64, 4, 3))],
}
# fp32 has no tensor-core product of full precision: products are plain arithmetic on small tiles.
FULL: dict[str, list[tuple[int, Tiles]]] = {
    kernel: [(128, Tiles(32, 32, 8, 1, 1))] for kernel in ("forward", "depth", "query", "keys")
}


def tiles(kernel: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """How to launch a kernel, "forward", "depth", "query" or "keys", for a head_dim and dtype."""
    table = FULL if dtype == torch.float32 else HALF
    return next(launch for dims, launch in table[kernel] if head_dim <= dims)


def taking_turns(pairs: int, tiles: int, nbytes: int) -> int:
    """How many pairs of sequence and kv head, of `tiles` programs each, go through `nbytes` each at a time.

    It divides `pairs`. Few leave the device idle; many push each other's tensors out of the cache.
    """
    wanted = min(pairs, max(CACHE_BYTES // nbytes, triton.cdiv(PROGRAMS, tiles)))
    return next(n for n in range(max(1, wanted), pairs + 1) if pairs % n == 0)


def _most_tokens(rows: int, group: int) -> int:
    """Tokens that a tile of so many rows has, or parts of."""
    return rows // group if rows % group == 0 else (rows - 2) // group + 2


def document_bounds(cu_seqlens: Tensor, batch: int, time: int) -> tuple[Tensor, Tensor]:
    """Where the document of every token starts and ends, as positions in its row, int32 [batch, time].

    cu_seqlens: cumulative lengths over the flattened tokens. The end of a row ends a document too.
    """
    tokens = torch.arange(batch * time, device=cu_seqlens.device)
    inner = torch.nn.functional.pad(cu_seqlens.to(tokens.dtype), (1, 0))
    edges = torch.nn.functional.pad(inner, (0, 1), value=batch * time)
    document = torch.searchsorted(edges, tokens, right=True)
    row = tokens // time * time
    start = torch.maximum(edges[document - 1], row) - row
    end = torch.minimum(edges[document], row + time) - row
    return start.int().view(batch, time), end.int().view(batch, time)


def joint_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: tuple[Tensor, Tensor] | None,
    scale: float,
    cu_seqlens: Tensor | None,
    launch: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """o [batch, time, query_heads, head_dim], contiguous, and lse, over the sequence and one range of slots."""
    if scale < 0:  # the kernel takes the maximum of the scores before it scales them
        q, scale = -q, -scale
    group, (q, k, v) = _check(q, k, v, cu_seqlens)
    batch, time, query_heads, head_dim = q.shape
    key_time, kv_heads = k.shape[1:3]
    depth = slots is not None and len(slots[0]) > 0
    keys, values = slots if slots is not None and depth else (k, v)
    if depth:
        _check_slots(keys, values, q, kv_heads)
    launch = launch or tiles("depth" if depth else "forward", head_dim, q.dtype)
    starts = k if cu_seqlens is None else document_bounds(cu_seqlens, batch, time)[0]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, query_heads, time, dtype=lse_dtype(q.dtype), device=q.device)
    pairs, row_tiles = batch * kv_heads, triton.cdiv(time * group, launch.rows)
    with torch.cuda.device_of(q):
        fused_forward.forward[(pairs * row_tiles,)](
            q,
            k,
            v,
            keys,
            values,
            starts,
            o,
            lse,
            pairs,
            taking_turns(pairs, row_tiles, 2 * key_time * head_dim * k.element_size()),
            kv_heads,
            time,
            key_time,
            len(keys) if depth else 0,
            keys.stride(0) if depth else 0,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            scale,
            G=group,
            D=head_dim,
            DP=triton.next_power_of_2(head_dim),
            SHARE=min(group & -group, launch.rows),
            TOKENS=triton.next_power_of_2(_most_tokens(launch.rows, group)),
            BLOCK_M=launch.rows,
            BLOCK_N=launch.keys,
            STAGES=launch.stages,
            SLOT_STAGES=launch.slot_stages,
            DEPTH=depth,
            DOCUMENTS=cu_seqlens is not None,
            num_warps=launch.warps,
        )
    return o, lse.transpose(1, 2)


def sequence_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    query_launch: Tiles | None = None,
    keys_launch: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq of the sequence part, dk, dv, contiguous, from the joint o and lse; delta = rowsum(do * o) is written.

    do, o contiguous, shaped as q; lse in the memory order that `joint_forward` gives; delta contiguous fp32 [batch,
    time, query_heads].
    """
    group, (q, k, v) = _check(q, k, v, cu_seqlens)
    batch, time, _, head_dim = q.shape
    key_time, kv_heads = k.shape[1:3]
    for tensor in (do, o):
        assert tensor.shape == q.shape
        assert tensor.dtype == q.dtype
        assert tensor.is_contiguous()
    assert delta.shape == lse.shape == q.shape[:3]
    assert delta.dtype == torch.float32
    assert lse.dtype == lse_dtype(q.dtype)
    assert delta.is_contiguous()
    assert lse.transpose(1, 2).is_contiguous()
    query_launch = query_launch or tiles("query", head_dim, q.dtype)
    keys_launch = keys_launch or tiles("keys", head_dim, q.dtype)
    starts, ends = (k, k) if cu_seqlens is None else document_bounds(cu_seqlens, batch, time)
    exponents = torch.empty(delta.shape, dtype=lse.dtype, device=q.device)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    pairs, row_tiles = batch * kv_heads, triton.cdiv(time * group, query_launch.rows)
    key_tiles = triton.cdiv(key_time, keys_launch.keys)
    sizes = (kv_heads, time, key_time, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale)
    shape = {
        "G": group,
        "D": head_dim,
        "DP": triton.next_power_of_2(head_dim),
        "DOCUMENTS": cu_seqlens is not None,
    }
    with torch.cuda.device_of(q):
        fused_backward.backward_query[(pairs * row_tiles,)](
            do,
            q,
            k,
            v,
            starts,
            o,
            lse,
            delta,
            exponents,
            dq,
            pairs,
            taking_turns(pairs, row_tiles, 2 * key_time * head_dim * k.element_size()),
            *sizes,
            **shape,
            BLOCK_M=query_launch.rows,
            BLOCK_N=query_launch.keys,
            STAGES=query_launch.stages,
            num_warps=query_launch.warps,
        )
        fused_backward.backward_keys[(pairs * key_tiles,)](
            do,
            q,
            k,
            v,
            ends,
            exponents,
            delta,
            dk,
            dv,
            pairs,
            taking_turns(pairs, key_tiles, 2 * time * group * head_dim * q.element_size()),
            *sizes,
            **shape,
            BLOCK_M=keys_launch.rows,
            BLOCK_N=keys_launch.keys,
            STAGES=keys_launch.stages,
            num_warps=keys_launch.warps,
        )
    return dq, dk, dv


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, list[Tensor]]:
    """Assert that q, k and v fit together; returns the size of a group, and the three as the kernels can read them."""
    batch, time, query_heads, head_dim = q.shape
    group = query_heads // k.shape[2]
    assert q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert q.dtype == k.dtype == v.dtype
    assert q.device == k.device == v.device
    assert head_dim % 16 == 0
    assert 16 <= head_dim <= 128
    assert k.shape == v.shape == (batch, k.shape[1], k.shape[2], head_dim)
    assert query_heads == group * k.shape[2]
    assert 1 <= group <= MAX_GROUP
    assert 1 <= time <= k.shape[1]
    assert cu_seqlens is None or time == k.shape[1]
    return group, [_readable(tensor, group) for tensor in (q, k, v)]


def _readable(tensor: Tensor, group: int) -> Tensor:
    """The tensor, or a copy where its last axis has gaps, or offsets within a tile do not fit 32 bits."""
    fits = max(group * tensor.stride(2), 256 * tensor.stride(1)) < 2**31
    return tensor if tensor.stride(3) == 1 and fits else tensor.contiguous()


def _check_slots(keys: Tensor, values: Tensor, q: Tensor, kv_heads: int) -> None:
    batch, time, _, head_dim = q.shape
    for tensor in (keys, values):
        assert tensor.shape == (len(keys), batch, time, kv_heads, head_dim)
        assert tensor.dtype == q.dtype
        assert tensor.device == q.device
        assert tensor.stride(0) == keys.stride(0) or len(keys) < 2
        assert tensor[0].is_contiguous()
