"""Triton kernels of the fused backward: the sequence part, from the joint o and lse.

Rows, tiles and masks are those of `moda.kernels.fused_forward`. `backward_query` owns a tile of queries and goes
through its keys; it also computes delta. `backward_keys` owns a block of keys and goes through the rows of all query
heads that read them, with scores transposed, [keys, queries], so that p and ds are left operands as they stand. Each
gradient is summed in registers, in a fixed order.
"""

import triton
import triton.language as tl

from moda.kernels.fused_forward import key_ranges, split_rows, tile_of_program
from moda.kernels.precision import (
    LOG2E,
    PAST_END,
    add_product,
    exp2_scaled,
    in_powers_of_two,
    inner_products,
    parts,
)


@triton.jit
def query_gradients(
    dq,
    queries,
    grads,
    lse,  # for exp2, as scale
    lse_low,
    delta,
    k,
    v,
    lo,
    hi,
    position,
    start,
    key_time,
    k_time_stride,
    v_time_stride,
    scale,
    scale_low,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add to dq what the keys lo..hi-1 give, without the scale."""
    j, d = tl.arange(0, BLOCK_N), tl.arange(0, DP)
    at_k = j[:, None] * k_time_stride + d[None, :]
    at_v = j[:, None] * v_time_stride + d[None, :]
    k += tl.cast(lo, tl.int64) * k_time_stride
    v += tl.cast(lo, tl.int64) * v_time_stride
    for n in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        if MASKED:
            in_kv = (j < key_time - n)[:, None] & (d < D)[None, :]
            key = tl.load(k + at_k, mask=in_kv, other=0.0)
            value = tl.load(v + at_v, mask=in_kv, other=0.0)
        elif D == DP:
            key = tl.load(k + at_k)
            value = tl.load(v + at_v)
        else:
            key = tl.load(k + at_k, mask=(d < D)[None, :], other=0.0)
            value = tl.load(v + at_v, mask=(d < D)[None, :], other=0.0)
        s = inner_products(queries, key, FULL)
        dp = inner_products(grads, value, FULL)
        p = exp2_scaled(s, scale, scale_low, lse[:, None], lse_low[:, None] if FULL else 0.0, FULL)
        if MASKED:
            seen = (n + j)[None, :] <= position[:, None]
            if DOCUMENTS:
                seen = seen & ((n + j)[None, :] >= start[:, None])
            p = tl.where(seen, p, 0.0)
        ds = (p * (dp - delta[:, None])).to(key.dtype)
        dq = add_product(ds, key, dq, FULL)
        k += BLOCK_N * k_time_stride
        v += BLOCK_N * v_time_stride
    return dq


@triton.jit(do_not_specialize=["time", "key_time", "together"])
def backward_query(
    do,  # [batch, time, kv_heads * G, D], contiguous
    q,  # [batch, time, kv_heads * G, D], any strides
    k,  # [batch, key_time, kv_heads, D], any strides
    v,
    starts,  # [batch, key_time], where a token's document starts in its row, if DOCUMENTS
    o,  # [batch, time, kv_heads * G, D], contiguous
    lse,  # [batch, kv_heads * G, time]
    delta,  # [batch, time, kv_heads * G], out
    exponents,  # likewise in the dtype of lse: lse in powers of two
    dq,  # [batch, time, kv_heads * G, D], contiguous, out
    pairs,  # batch * kv_heads
    together,  # pairs that take turns; divides them
    kv_heads,
    time,
    key_time,
    q_batch_stride,
    q_time_stride,
    q_head_stride,
    k_batch_stride,
    k_time_stride,
    k_head_stride,
    v_batch_stride,
    v_time_stride,
    v_head_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    ALIGNED: tl.constexpr = BLOCK_M % G == 0
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    pair, tile, tiles = tile_of_program(pairs, together)
    first = (tiles - 1 - tile) * BLOCK_M  # the longest tiles first
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    first_token = first // G
    offset = key_time - time
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, DP)
    token, head = split_rows(first, i, G, ALIGNED)
    in_tile = first_token + token < time
    in_q = in_tile[:, None] & (d < D)[None, :]
    q += batch * q_batch_stride + first_token.to(tl.int64) * q_time_stride + kv_head * G * q_head_stride
    k += batch * k_batch_stride + kv_head * k_head_stride
    v += batch * v_batch_stride + kv_head * v_head_stride
    first_row = ((batch * time + first_token) * kv_heads + kv_head) * G
    at_row = token * (kv_heads * G) + head
    at_o = at_row[:, None] * D + d[None, :]

    at_q = (token * q_time_stride + head * q_head_stride)[:, None] + d[None, :]
    queries = tl.load(q + at_q, mask=in_q, other=0.0)
    grads = tl.load(do + first_row * D + at_o, mask=in_q, other=0.0)
    out = tl.load(o + first_row * D + at_o, mask=in_q, other=0.0)
    delta_rows = tl.sum(out.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + first_row + at_row, delta_rows, mask=in_tile)
    lse += (batch * kv_heads + kv_head) * G * time + first_token
    # p is 0 past the end.
    lse_rows = tl.load(lse + head * time + token, mask=in_tile, other=PAST_END) * LOG2E
    tl.store(exponents + first_row + at_row, lse_rows, mask=in_tile)
    lse_rows, lse_low = parts(lse_rows)

    position = offset + first_token + token
    start = position
    if DOCUMENTS:
        starts += batch * key_time
        start = tl.load(starts + position, mask=in_tile, other=0)
    last_token = tl.minimum((first + BLOCK_M - 1) // G, time - 1)
    lo, whole, diagonal, hi = key_ranges(starts, first_token, last_token, offset, BLOCK_N, DOCUMENTS)
    acc = tl.zeros([BLOCK_M, DP], tl.float32)
    factor, factor_low = in_powers_of_two(scale, FULL)
    if DOCUMENTS:
        acc = query_gradients(
            acc, queries, grads, lse_rows, lse_low, delta_rows, k, v, lo, whole, position, start, key_time,
            k_time_stride, v_time_stride, factor, factor_low, D, DP, BLOCK_N, STAGES, True, True, FULL,
        )  # fmt: skip
    acc = query_gradients(
        acc, queries, grads, lse_rows, lse_low, delta_rows, k, v, whole, diagonal, position, start, key_time,
        k_time_stride, v_time_stride, factor, factor_low, D, DP, BLOCK_N, STAGES, False, DOCUMENTS, FULL,
    )  # fmt: skip
    acc = query_gradients(
        acc, queries, grads, lse_rows, lse_low, delta_rows, k, v, diagonal, hi, position, start, key_time,
        k_time_stride, v_time_stride, factor, factor_low, D, DP, BLOCK_N, STAGES, True, DOCUMENTS, FULL,
    )  # fmt: skip
    tl.store(dq + first_row * D + at_o, (acc * scale).to(dq.dtype.element_ty), mask=in_q)


@triton.jit
def key_gradients(
    dk,
    dv,
    keys,
    values,
    q,  # at token 0 and the first head of the group
    do,
    exponents,
    delta,
    lo,
    hi,
    place,  # of the keys, as a position among the queries
    end,  # of their documents, likewise
    time,
    q_time_stride,
    q_head_stride,
    query_heads,
    scale,  # for exp2
    scale_low,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add to dk (without the scale) and dv what the rows lo..hi-1 of the group give."""
    ALIGNED: tl.constexpr = BLOCK_M % G == 0
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, DP)
    for first in tl.range(lo, hi, BLOCK_M, num_stages=STAGES):
        first_token = first // G
        token, head = split_rows(first, i, G, ALIGNED)
        at_token = first_token.to(tl.int64)
        at_row = token * query_heads + head
        at_q = (token * q_time_stride + head * q_head_stride)[:, None] + d[None, :]
        at_do = at_row[:, None] * D + d[None, :]
        if MASKED or D != DP:
            in_tile = token < time - first_token
            in_q = in_tile[:, None] & (d < D)[None, :]
            queries = tl.load(q + at_token * q_time_stride + at_q, mask=in_q, other=0.0)
            grads = tl.load(do + at_token * (query_heads * D) + at_do, mask=in_q, other=0.0)
            # Past the end p is 0.
            lse_rows = tl.load(exponents + at_token * query_heads + at_row, mask=in_tile, other=PAST_END)
            delta_rows = tl.load(delta + at_token * query_heads + at_row, mask=in_tile, other=0.0)
        else:
            queries = tl.load(q + at_token * q_time_stride + at_q)
            grads = tl.load(do + at_token * (query_heads * D) + at_do)
            lse_rows = tl.load(exponents + at_token * query_heads + at_row)
            delta_rows = tl.load(delta + at_token * query_heads + at_row)
        lse_rows, lse_low = parts(lse_rows)
        s = inner_products(keys, queries, FULL)
        p = exp2_scaled(s, scale, scale_low, lse_rows[None, :], lse_low[None, :] if FULL else 0.0, FULL)
        if MASKED:
            seen = (first_token + token)[None, :] >= place[:, None]
            if DOCUMENTS:
                seen = seen & ((first_token + token)[None, :] < end[:, None])
            p = tl.where(seen, p, 0.0)
        dv = add_product(p.to(grads.dtype), grads, dv, FULL)
        dp = inner_products(values, grads, FULL)
        ds = (p * (dp - delta_rows[None, :])).to(queries.dtype)
        dk = add_product(ds, queries, dk, FULL)
    return dk, dv


@triton.jit(do_not_specialize=["time", "key_time", "together"])
def backward_keys(
    do,  # [batch, time, kv_heads * G, D], contiguous
    q,  # [batch, time, kv_heads * G, D], any strides
    k,  # [batch, key_time, kv_heads, D], any strides
    v,
    ends,  # [batch, key_time], where a token's document ends in its row, if DOCUMENTS
    exponents,  # [batch, time, kv_heads * G], lse in powers of two
    delta,  # likewise
    dk,  # [batch, key_time, kv_heads, D], contiguous, out
    dv,
    pairs,  # batch * kv_heads
    together,  # pairs that take turns; divides them
    kv_heads,
    time,
    key_time,
    q_batch_stride,
    q_time_stride,
    q_head_stride,
    k_batch_stride,
    k_time_stride,
    k_head_stride,
    v_batch_stride,
    v_time_stride,
    v_head_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    FULL: tl.constexpr = exponents.dtype.element_ty == tl.float64
    pair, tile, _ = tile_of_program(pairs, together)
    first = tile * BLOCK_N  # the first keys have the most queries: they come first
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    offset = key_time - time
    j, d = tl.arange(0, BLOCK_N), tl.arange(0, DP)
    in_block = j < key_time - first
    in_kv = in_block[:, None] & (d < D)[None, :]
    k += batch * k_batch_stride + first.to(tl.int64) * k_time_stride + kv_head * k_head_stride
    v += batch * v_batch_stride + first.to(tl.int64) * v_time_stride + kv_head * v_head_stride
    keys = tl.load(k + j[:, None] * k_time_stride + d[None, :], mask=in_kv, other=0.0)
    values = tl.load(v + j[:, None] * v_time_stride + d[None, :], mask=in_kv, other=0.0)

    query_heads = kv_heads * G
    q += batch * q_batch_stride + kv_head * G * q_head_stride
    do += (batch * time * query_heads + kv_head * G) * D
    exponents += batch * time * query_heads + kv_head * G
    delta += batch * time * query_heads + kv_head * G

    # Tokens: from lo some see some of the keys, from `whole` all see all; a tile from `partial` on has tokens of other
    # documents, or ends past the last.
    place = first + j - offset
    end = place
    lo = tl.maximum(first - offset, 0)
    hi = time
    if DOCUMENTS:
        ends += batch * key_time + first
        end = tl.load(ends + j, mask=in_block, other=0)
        hi = tl.load(ends + tl.minimum(BLOCK_N, key_time - first) - 1)
    # Ranges of rows start at whole tiles from the row of lo on, so that no row is in two of them.
    lo *= G
    hi *= G
    whole = lo + tl.cdiv(tl.maximum(first + BLOCK_N - 1 - offset, 0) * G - lo, BLOCK_M) * BLOCK_M
    whole = tl.minimum(whole, lo + tl.cdiv(hi - lo, BLOCK_M) * BLOCK_M)
    dk_sum = tl.zeros([BLOCK_N, DP], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, DP], tl.float32)
    first_hi = tl.minimum(whole, hi)
    factor, factor_low = in_powers_of_two(scale, FULL)
    dk_sum, dv_sum = key_gradients(
        dk_sum, dv_sum, keys, values, q, do, exponents, delta, lo, first_hi, place, end, time, q_time_stride,
        q_head_stride, query_heads, factor, factor_low, G, D, DP, BLOCK_M, STAGES, True, DOCUMENTS, FULL,
    )  # fmt: skip
    inner = tl.load(ends) * G if DOCUMENTS else hi
    partial = whole + tl.maximum(inner - whole, 0) // BLOCK_M * BLOCK_M
    dk_sum, dv_sum = key_gradients(
        dk_sum, dv_sum, keys, values, q, do, exponents, delta, whole, partial, place, end, time, q_time_stride,
        q_head_stride, query_heads, factor, factor_low, G, D, DP, BLOCK_M, STAGES, False, DOCUMENTS, FULL,
    )  # fmt: skip
    dk_sum, dv_sum = key_gradients(
        dk_sum, dv_sum, keys, values, q, do, exponents, delta, partial, hi, place, end, time, q_time_stride,
        q_head_stride, query_heads, factor, factor_low, G, D, DP, BLOCK_M, STAGES, True, DOCUMENTS, FULL,
    )  # fmt: skip
    at_out = ((batch * key_time + first) * kv_heads + kv_head) * D
    at_kv = j[:, None] * (kv_heads * D) + d[None, :]
    tl.store(dk + at_out + at_kv, (dk_sum * scale).to(dk.dtype.element_ty), mask=in_kv)
    tl.store(dv + at_out + at_kv, dv_sum.to(dv.dtype.element_ty), mask=in_kv)
