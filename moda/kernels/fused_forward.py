"""Triton kernel of the fused forward: a tile of queries over its slots and its sequence, in one online softmax.

A *row* is one query head of one token. The G query heads that share a kv head are rows of one tile: row R of a kv head
is head R % G of token R // G, so that what is loaded of keys and values, of the sequence or of slots, serves all of
them. A tile goes through its slots first and from that state through the keys of its sequence. Padded head_dim (DP for
D) is masked.

The slots of a tile are products too, of all its rows with the slots of all its tokens, of which each row's own count:
tensor cores waste that faster than plain arithmetic does without. fp32, which they do not have, is plain arithmetic. As
in blocks of a sequence that are masked, a value that is no number reaches other rows of its tile (0 times infinity).

Scores are kept times log2(e), for exp2: m is their running maximum, `total` the running sum, acc the running output.
"""

import triton
import triton.language as tl

from moda.kernels.precision import (
    LN2,
    add_product,
    exp2,
    exp2_scaled,
    in_powers_of_two,
    inner_products,
    slot_exponents,
)

LOWEST = tl.constexpr(-3.0e38)  # a maximum over nothing; finite, so that its difference to itself is not NaN


@triton.jit
def tile_of_program(pairs, together):
    """Pair of sequence and kv head, and number of the tile within it, of this program, and the tiles of a pair.

    `together` pairs, whose tensors fit the cache at a time, take turns; they come to an end before the next ones begin.
    """
    tiles = tl.num_programs(0) // pairs
    program = tl.program_id(0)
    turn, within = program // (together * tiles), program % (together * tiles)
    return turn * together + within % together, within // together, tiles


@triton.jit
def split_rows(first, i, G: tl.constexpr, ALIGNED: tl.constexpr):
    """Token, counted from that of row `first`, and head within the group, of the rows first + i.

    ALIGNED: `first` is a multiple of G, and what depends on i alone can leave a loop over `first`.
    """
    r = i if ALIGNED else first % G + i
    return r // G, r % G


@triton.jit
def key_ranges(starts, first, last, offset, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Keys that a tile of the tokens first..last sees, as ends of ranges of blocks: lo (masked) whole (masked) hi.

    Between `whole` and `diagonal` every key is seen by every query.
    """
    diagonal = (offset + first + 1) // BLOCK_N * BLOCK_N
    if DOCUMENTS:
        lo = tl.load(starts + first) // BLOCK_N * BLOCK_N
        whole = tl.minimum(tl.cdiv(tl.load(starts + last), BLOCK_N) * BLOCK_N, diagonal)
    else:
        lo = 0
        whole = 0
    return lo, whole, diagonal, offset + last + 1


@triton.jit
def attend_slots(
    queries,
    keys,  # at the first token of the tile in slot 0
    values,
    token,  # of the queries, from the first of the tile on
    tokens,  # of the sequence, likewise
    slots,
    slot_stride,
    token_stride,
    scale,  # for exp2
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """State of the softmax, acc [BLOCK_M, DP], m and total [BLOCK_M], after all slots.

    TOKENS, a power of two, is no less than those of a tile; so many neighbours of a slot are loaded together, and so
    many slots that there are BLOCK_N keys, or more.
    """
    BLOCK: tl.constexpr = max(1, BLOCK_N // TOKENS)  # slots
    key, d = tl.arange(0, TOKENS * BLOCK), tl.arange(0, DP)
    j, key_token = key // TOKENS, key % TOKENS
    own = token[:, None] == key_token[None, :]
    at_kv = j[:, None].to(tl.int64) * slot_stride + (key_token * token_stride)[:, None] + d[None, :]
    step = tl.cast(slot_stride, tl.int64) * BLOCK
    acc = tl.zeros([BLOCK_M, DP], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, slots, BLOCK, num_stages=STAGES):
        there = (j < slots - first) & (key_token < tokens)
        in_kv = there[:, None] & (d < D)[None, :]
        k = tl.load(keys + at_kv, mask=in_kv, other=0.0)
        v = tl.load(values + at_kv, mask=in_kv, other=0.0)
        s = tl.where(own & there[None, :], inner_products(queries, k, False) * scale, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        shrink = tl.exp2(m - m_next)
        p = tl.exp2(s - m_next[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = add_product(p.to(v.dtype), v, acc * shrink[:, None], False)
        m = m_next
        keys += step
        values += step
    return acc, m, total


@triton.jit
def attend_slots_in_full(
    q,  # at the first token of the tile
    keys,  # at the first token of the tile in slot 0
    values,
    first,
    tokens,  # of the sequence, from the first of the tile on
    slots,
    slot_stride,
    token_stride,
    q_time_stride,
    q_head_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `attend_slots`, for fp32 (`moda.kernels.precision`).

    SHARE heads of a token, a power of two that divides G, read a key together. They are the first axis, so that a
    thread holds all the queries of what it has loaded of a key.
    """
    UNITS: tl.constexpr = BLOCK_M // SHARE
    u, d = tl.arange(0, UNITS), tl.arange(0, DP)
    token, head = split_rows(first, u * SHARE, G, ALIGNED)
    in_kv = (token < tokens)[:, None] & (d < D)[None, :]
    at_kv = token[:, None] * token_stride + d[None, :]
    heads = head[None, :] + tl.arange(0, SHARE)[:, None]
    at_q = (token[None, :] * q_time_stride + heads * q_head_stride)[:, :, None] + d[None, None, :]
    queries = tl.load(q + at_q, mask=in_kv[None, :, :], other=0.0).to(tl.float32)
    acc = tl.zeros([SHARE, UNITS, DP], tl.float64)
    m = tl.full([SHARE, UNITS], LOWEST, tl.float32)
    total = tl.zeros([SHARE, UNITS], tl.float64)
    for _ in tl.range(0, slots, num_stages=STAGES):
        key = tl.load(keys + at_kv, mask=in_kv, other=0.0).to(tl.float32)
        value = tl.load(values + at_kv, mask=in_kv, other=0.0).to(tl.float32)
        s = slot_exponents(queries, key[None, :, :], scale)
        m_next = tl.maximum(m, s.to(tl.float32))
        shrink = tl.exp2(m - m_next)
        p = exp2(s - m_next)
        total = total * shrink + p
        acc = acc * shrink[:, :, None] + p[:, :, None] * value[None, :, :]
        m = m_next
        keys += slot_stride
        values += slot_stride
    acc = tl.reshape(tl.permute(acc.to(tl.float32), (1, 0, 2)), [BLOCK_M, DP])
    return acc, tl.reshape(tl.trans(m), [BLOCK_M]), tl.reshape(tl.trans(total.to(tl.float32)), [BLOCK_M])


@triton.jit
def attend_keys(
    acc,
    m,
    total,
    queries,
    k,  # at key 0
    v,
    lo,
    hi,
    position,  # of the queries
    start,  # of their documents
    key_time,
    k_time_stride,
    v_time_stride,
    scale,  # for exp2
    scale_low,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Carry the state on over the keys lo..hi-1, in blocks."""
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
        if MASKED:
            seen = (n + j)[None, :] <= position[:, None]
            if DOCUMENTS:
                seen = seen & ((n + j)[None, :] >= start[:, None])
            if FULL:
                m_next = tl.maximum(m, tl.max(tl.where(seen, s * scale, float("-inf")), 1))
                p = tl.where(seen, exp2_scaled(s, scale, scale_low, m_next[:, None], 0.0, FULL), 0.0)
            else:
                s = tl.where(seen, s * scale, float("-inf"))
                m_next = tl.maximum(m, tl.max(s, 1))
                p = tl.exp2(s - m_next[:, None])
        else:  # a positive scale can wait, and be part of a fused multiply-add
            m_next = tl.maximum(m, tl.max(s, 1) * scale)
            p = exp2_scaled(s, scale, scale_low, m_next[:, None], 0.0, FULL)
        shrink = tl.exp2(m - m_next)
        total = total * shrink + tl.sum(p, 1)
        acc = add_product(p.to(value.dtype), value, acc * shrink[:, None], FULL)
        m = m_next
        k += BLOCK_N * k_time_stride
        v += BLOCK_N * v_time_stride
    return acc, m, total


@triton.jit(do_not_specialize=["slots", "time", "key_time", "together"])
def forward(
    q,  # [batch, time, kv_heads * G, D], any strides
    k,  # [batch, key_time, kv_heads, D], any strides
    v,
    keys,  # [slots, batch, time, kv_heads, D], one slot `slot_stride` apart, if DEPTH
    values,
    starts,  # [batch, key_time], where a token's document starts in its row, if DOCUMENTS
    o,  # [batch, time, kv_heads * G, D], out
    lse,  # [batch, kv_heads * G, time], out
    pairs,  # batch * kv_heads
    together,  # pairs that take turns; divides them
    kv_heads,
    time,
    key_time,
    slots,
    slot_stride,
    q_batch_stride,
    q_time_stride,
    q_head_stride,
    k_batch_stride,
    k_time_stride,
    k_head_stride,
    v_batch_stride,
    v_time_stride,
    v_head_stride,
    scale,  # not negative
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SHARE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SLOT_STAGES: tl.constexpr,
    DEPTH: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    ALIGNED: tl.constexpr = BLOCK_M % G == 0
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    # The last tiles, the longest ones, come first: short ones fill the gaps at the end.
    pair, tile, tiles = tile_of_program(pairs, together)
    first = (tiles - 1 - tile) * BLOCK_M
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
    factor, factor_low = in_powers_of_two(scale, FULL)

    at_q = (token * q_time_stride + head * q_head_stride)[:, None] + d[None, :]
    queries = tl.load(q + at_q, mask=in_q, other=0.0)
    at_slot = ((batch * time + first_token) * kv_heads + kv_head) * D
    tokens = time - first_token
    if not DEPTH:
        acc = tl.zeros([BLOCK_M, DP], tl.float32)
        m = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    elif FULL:
        acc, m, total = attend_slots_in_full(
            q, keys + at_slot, values + at_slot, first, tokens, slots, slot_stride, kv_heads * D, q_time_stride,
            q_head_stride, scale, G, D, DP, SHARE, BLOCK_M, ALIGNED, SLOT_STAGES,
        )  # fmt: skip
    else:
        acc, m, total = attend_slots(
            queries, keys + at_slot, values + at_slot, token, tokens, slots, slot_stride, kv_heads * D, factor, D, DP,
            BLOCK_M, BLOCK_N, TOKENS, SLOT_STAGES,
        )  # fmt: skip

    position = offset + first_token + token
    start = position
    if DOCUMENTS:
        starts += batch * key_time
        start = tl.load(starts + position, mask=in_tile, other=0)
    last_token = tl.minimum((first + BLOCK_M - 1) // G, time - 1)
    lo, whole, diagonal, hi = key_ranges(starts, first_token, last_token, offset, BLOCK_N, DOCUMENTS)
    if DOCUMENTS:
        acc, m, total = attend_keys(
            acc, m, total, queries, k, v, lo, whole, position, start, key_time, k_time_stride, v_time_stride, factor,
            factor_low, D, DP, BLOCK_N, STAGES, True, True, FULL,
        )  # fmt: skip
    acc, m, total = attend_keys(
        acc, m, total, queries, k, v, whole, diagonal, position, start, key_time, k_time_stride, v_time_stride, factor,
        factor_low, D, DP, BLOCK_N, STAGES, False, DOCUMENTS, FULL,
    )  # fmt: skip
    acc, m, total = attend_keys(
        acc, m, total, queries, k, v, diagonal, hi, position, start, key_time, k_time_stride, v_time_stride, factor,
        factor_low, D, DP, BLOCK_N, STAGES, True, DOCUMENTS, FULL,
    )  # fmt: skip

    o += ((batch * time + first_token) * kv_heads + kv_head) * (G * D)
    at_o = (token * (kv_heads * G * D) + head * D)[:, None] + d[None, :]
    tl.store(o + at_o, (acc / total[:, None]).to(o.dtype.element_ty), mask=in_q)
    lse += (batch * kv_heads + kv_head) * G * time + first_token
    if FULL:
        m, total = m.to(tl.float64), total.to(tl.float64)
    tl.store(lse + head * time + token, (m + tl.log2(total)) * LN2, mask=in_tile)
