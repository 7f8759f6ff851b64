"""Triton kernels of the depth part that own queries and go through the slots: forward, and backward to the queries.

A *row* is one kv head of one token: rows = batch * time * kv_heads. All tensors are contiguous within a token, so that
in units of rows nothing else is left of the layout: keys and values of a slot are [rows, D], queries are [rows, G, D]
and programs read memory in order. Of each idea there are two kernels. `vector` takes a block of rows through one slot
at a time, in plain arithmetic; `tensor` takes one row through a block of slots, with its G queries as the rows of
tensor-core products. GP, DP are G, D padded to powers of two (GP to 16 for products); what is padded is masked.
Backward's `tensor` takes ROWS neighbouring rows as one product, of whose scores only those of a row's own queries and
keys count (nothing more is computed where ROWS * G is at most 16). What it reads and writes of a slot at once is ROWS
times as long: where slots are written as well, memory takes that better.

lse alone may have any strides: it is the buffer of the sequence part, [batch, time, query_heads] in a vendor's order.
"""

import triton
import triton.language as tl

from moda.kernels.precision import (
    LN2,
    LOG2E,
    PAST_END,
    add_product,
    exp2,
    in_powers_of_two,
    slot_exponents,
    slot_exponents_dot,
    slot_products,
)


@triton.jit
def lse_offsets(row, g, time, kv_heads, batch_stride, time_stride, head_stride, G: tl.constexpr):
    """Where the lse of query g of a row is, for broadcastable row and g."""
    token = row // kv_heads
    batch = (token // time).to(tl.int64)
    return batch * batch_stride + (token % time) * time_stride + ((row % kv_heads) * G + g) * head_stride


@triton.jit
def leave(address, q, do):
    """Write down where a reader's q and do are: the pull takes them from there."""
    tl.store(address, q.to(tl.int64, bitcast=True))
    tl.store(address + 1, do.to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["slots"])
def forward_vector(
    q,  # [rows, G, D]
    keys,  # [slots, rows, D], one slot `slot_stride` apart
    values,
    o,  # [rows, G, D], in: of the sequence; out: joint
    lse,  # [batch, time, kv_heads * G], likewise
    rows,
    slots,
    slot_stride,
    time,
    kv_heads,
    lse_batch_stride,
    lse_time_stride,
    lse_head_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * BLOCK
    i, d = tl.arange(0, BLOCK), tl.arange(0, DP)
    # The heads come first, so that a thread holds all the queries of what it has loaded of a key.
    g = tl.arange(0, GP)[:, None]
    row = pid * BLOCK + i
    in_kv = (row < rows)[:, None] & (d < D)[None, :]
    in_lse = (g < G) & (row < rows)[None, :]
    in_q = in_lse[:, :, None] & (d < D)[None, None, :]
    at_kv = i[:, None] * D + d[None, :]
    at_q = (i[None, :] * G + g)[:, :, None] * D + d[None, None, :]
    lse += lse_offsets(row[None, :], g, time, kv_heads, lse_batch_stride, lse_time_stride, lse_head_stride, G)
    q += start * G * D
    o += start * G * D
    keys += start * D
    values += start * D

    queries = tl.load(q + at_q, mask=in_q, other=0.0).to(tl.float32)
    if not FULL:
        queries *= scale * LOG2E
    acc = tl.load(o + at_q, mask=in_q, other=0.0).to(tl.float32)
    m, m_low = in_powers_of_two(tl.load(lse, mask=in_lse, other=0.0), FULL)
    total = tl.full([GP, BLOCK], 1.0, tl.float32)
    if FULL:
        total += m_low * LN2
    for _ in tl.range(0, slots, num_stages=STAGES):
        k = tl.load(keys + at_kv, mask=in_kv, other=0.0).to(tl.float32)
        v = tl.load(values + at_kv, mask=in_kv, other=0.0).to(tl.float32)
        s = slot_exponents(queries, k[None, :, :], scale) if FULL else tl.sum(queries * k[None, :, :], 2)
        m_next = tl.maximum(m, s.to(tl.float32))
        shrink = tl.exp2(m - m_next)
        p = exp2(s - m_next)
        total = total * shrink + p
        acc = acc * shrink[:, :, None] + p[:, :, None] * v[None, :, :]
        m = m_next
        keys += slot_stride
        values += slot_stride
    tl.store(o + at_q, (acc / total[:, :, None]).to(o.dtype.element_ty), mask=in_q)
    if FULL:
        m, total = m.to(tl.float64), total.to(tl.float64)
    tl.store(lse, (m + tl.log2(total)) * LN2, mask=in_lse)


@triton.jit(do_not_specialize=["slots"])
def forward_tensor(
    q,
    keys,
    values,
    o,
    lse,
    rows,
    slots,
    slot_stride,
    time,
    kv_heads,
    lse_batch_stride,
    lse_time_stride,
    lse_head_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    pid = tl.program_id(0)
    row = pid.to(tl.int64)
    g, j, d = tl.arange(0, GP), tl.arange(0, BLOCK), tl.arange(0, DP)
    in_q = (g < G)[:, None] & (d < D)[None, :]
    at_q = g[:, None] * D + d[None, :]
    at_kv = j[:, None].to(tl.int64) * slot_stride + d[None, :]
    step = tl.cast(slot_stride, tl.int64) * BLOCK
    lse += lse_offsets(pid, g, time, kv_heads, lse_batch_stride, lse_time_stride, lse_head_stride, G)
    q += row * G * D
    o += row * G * D
    keys += row * D
    values += row * D

    queries = tl.load(q + at_q, mask=in_q, other=0.0)
    acc = tl.load(o + at_q, mask=in_q, other=0.0).to(tl.float32)
    m, m_low = in_powers_of_two(tl.load(lse, mask=g < G, other=0.0), FULL)
    total = tl.full([GP], 1.0, tl.float32)
    if FULL:
        total += m_low * LN2
    for first in tl.range(0, slots, BLOCK, num_stages=STAGES):
        written = j < slots - first
        in_kv = written[:, None] & (d < D)[None, :]
        k = tl.load(keys + at_kv, mask=in_kv, other=0.0)
        v = tl.load(values + at_kv, mask=in_kv, other=0.0)
        if FULL:
            s = slot_exponents_dot(queries, tl.trans(k), scale)
            s = tl.where(written[None, :], s, -PAST_END)
        else:
            s = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            s = tl.where(written[None, :], s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s.to(tl.float32), 1))
        shrink = tl.exp2(m - m_next)
        p = exp2(s - m_next[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = add_product(p.to(v.dtype), v, acc * shrink[:, None], FULL)
        m = m_next
        keys += step
        values += step
    tl.store(o + at_q, (acc / total[:, None]).to(o.dtype.element_ty), mask=in_q)
    if FULL:
        m, total = m.to(tl.float64), total.to(tl.float64)
    tl.store(lse, (m + tl.log2(total)) * LN2, mask=g < G)


@triton.jit(do_not_specialize=["slots"])
def backward_vector(
    do,  # [rows, G, D]
    q,
    o,  # read if DELTA_FROM_O
    keys,  # [slots, rows, D]
    values,
    lse,
    delta,  # [rows, G], in, or out if DELTA_FROM_O
    dq,  # [rows, G, D], in: of the sequence; out: of both parts
    dk,  # [slots, rows, D], if SLOT_GRADIENTS
    dv,
    address,  # [2], where q and do are, if LEAVE
    reader_lse,  # [rows, G], a copy, if LEAVE
    rows,
    slots,
    slot_stride,
    gradient_stride,
    time,
    kv_heads,
    lse_batch_stride,
    lse_time_stride,
    lse_head_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DELTA_FROM_O: tl.constexpr,
    LEAVE: tl.constexpr,
    SLOT_GRADIENTS: tl.constexpr,
):
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * BLOCK
    i, d = tl.arange(0, BLOCK), tl.arange(0, DP)
    g = tl.arange(0, GP)[:, None]
    row = pid * BLOCK + i
    in_kv = (row < rows)[:, None] & (d < D)[None, :]
    in_lse = (g < G) & (row < rows)[None, :]
    in_q = in_lse[:, :, None] & (d < D)[None, None, :]
    at_kv = i[:, None] * D + d[None, :]
    at_rows = start * G + i[None, :] * G + g
    at_q = start * G * D + (i[None, :] * G + g)[:, :, None] * D + d[None, None, :]
    at_lse = lse_offsets(row[None, :], g, time, kv_heads, lse_batch_stride, lse_time_stride, lse_head_stride, G)
    keys += start * D
    values += start * D

    queries = tl.load(q + at_q, mask=in_q, other=0.0).to(tl.float32)
    grads = tl.load(do + at_q, mask=in_q, other=0.0).to(tl.float32)
    lse_rows = tl.load(lse + at_lse, mask=in_lse, other=0.0)
    if DELTA_FROM_O:
        delta_rows = tl.sum(tl.load(o + at_q, mask=in_q, other=0.0).to(tl.float32) * grads, 2)
        tl.store(delta + at_rows, delta_rows, mask=in_lse)
    else:
        delta_rows = tl.load(delta + at_rows, mask=in_lse, other=0.0)
    if LEAVE:
        if pid == 0:
            leave(address, q, do)
        tl.store(reader_lse + at_rows, lse_rows, mask=in_lse)
    lse_rows *= LOG2E
    acc = tl.zeros([GP, BLOCK, DP], tl.float64 if FULL else tl.float32)
    if SLOT_GRADIENTS:
        dk += start * D
        dv += start * D
    for _ in tl.range(0, slots, num_stages=STAGES):
        k = tl.load(keys + at_kv, mask=in_kv, other=0.0).to(tl.float32)
        v = tl.load(values + at_kv, mask=in_kv, other=0.0).to(tl.float32)
        if FULL:
            s = slot_exponents(queries, k[None, :, :], scale)
        else:
            s = tl.sum(queries * k[None, :, :], 2) * (scale * LOG2E)
        p = exp2(s - lse_rows)
        dp = slot_products(grads, v[None, :, :]) if FULL else tl.sum(grads * v[None, :, :], 2)
        ds = p * (dp - delta_rows).to(tl.float32) * scale
        acc += ds[:, :, None] * k[None, :, :]
        if SLOT_GRADIENTS:
            # Products are fma's with nothing: one contracted into the sum of two threads would be rounded otherwise in
            # each of them, and both write the sum to the same place in shared memory.
            tl.store(dk + at_kv, tl.sum(tl.fma(ds[:, :, None], queries, 0.0), 0).to(dk.dtype.element_ty), mask=in_kv)
            tl.store(dv + at_kv, tl.sum(tl.fma(p[:, :, None], grads, 0.0), 0).to(dv.dtype.element_ty), mask=in_kv)
            dk += gradient_stride
            dv += gradient_stride
        keys += slot_stride
        values += slot_stride
    acc += tl.load(dq + at_q, mask=in_q, other=0.0).to(tl.float32)
    tl.store(dq + at_q, acc.to(dq.dtype.element_ty), mask=in_q)


@triton.jit(do_not_specialize=["slots"])
def backward_tensor(
    do,
    q,
    o,
    keys,
    values,
    lse,
    delta,
    dq,
    dk,
    dv,
    address,
    reader_lse,
    rows,
    slots,
    slot_stride,
    gradient_stride,
    time,
    kv_heads,
    lse_batch_stride,
    lse_time_stride,
    lse_head_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DELTA_FROM_O: tl.constexpr,
    LEAVE: tl.constexpr,
    SLOT_GRADIENTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * ROWS
    query, key, d = tl.arange(0, ROWS * GP), tl.arange(0, ROWS * BLOCK), tl.arange(0, DP)
    i, g = query // GP, query % GP
    # The rows of a slot are neighbours in memory, and so they are among the keys.
    j, at_row = key // ROWS, key % ROWS
    own = i[:, None] == at_row[None, :]
    in_rows = (pid * ROWS + at_row < rows)[:, None]
    in_lse = (pid * ROWS + i < rows) & (g < G)
    in_q = in_lse[:, None] & (d < D)[None, :]
    at_rows = start * G + i * G + g
    at_q = at_rows[:, None] * D + d[None, :]
    at_lse = lse_offsets(pid * ROWS + i, g, time, kv_heads, lse_batch_stride, lse_time_stride, lse_head_stride, G)
    at_kv = j[:, None].to(tl.int64) * slot_stride + at_row[:, None] * D + d[None, :]
    step = tl.cast(slot_stride, tl.int64) * BLOCK
    keys += start * D
    values += start * D

    queries = tl.load(q + at_q, mask=in_q, other=0.0)
    grads = tl.load(do + at_q, mask=in_q, other=0.0)
    lse_rows = tl.load(lse + at_lse, mask=in_lse, other=0.0)
    if DELTA_FROM_O:
        out = tl.load(o + at_q, mask=in_q, other=0.0)
        delta_rows = tl.sum(out.to(tl.float32) * grads.to(tl.float32), 1)
        tl.store(delta + at_rows, delta_rows, mask=in_lse)
    else:
        delta_rows = tl.load(delta + at_rows, mask=in_lse, other=0.0)
    if LEAVE:
        if pid == 0:
            leave(address, q, do)
        tl.store(reader_lse + at_rows, lse_rows, mask=in_lse)
    lse_rows *= LOG2E
    acc = tl.zeros([ROWS * GP, DP], tl.float32)
    if SLOT_GRADIENTS:
        at_gradient = j[:, None].to(tl.int64) * gradient_stride + at_row[:, None] * D + d[None, :]
        gradient_step = tl.cast(gradient_stride, tl.int64) * BLOCK
        dk += start * D
        dv += start * D
    for first in tl.range(0, slots, BLOCK, num_stages=STAGES):
        written = j < slots - first
        in_kv = written[:, None] & (d < D)[None, :]
        counted = written[None, :]
        if ROWS > 1:
            in_kv &= in_rows
            counted &= own
        k = tl.load(keys + at_kv, mask=in_kv, other=0.0)
        v = tl.load(values + at_kv, mask=in_kv, other=0.0)
        if FULL:
            s = slot_exponents_dot(queries, tl.trans(k), scale)
        else:
            s = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        # Slots past the end have score 0 and, where lse is very negative, an infinite p.
        p = tl.where(counted, exp2(s - lse_rows[:, None]), 0.0)
        dp = tl.dot(grads, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta_rows[:, None]) * scale).to(k.dtype)
        acc = add_product(ds, k, acc, FULL)
        if SLOT_GRADIENTS:
            dk_slots = tl.dot(tl.trans(ds), queries, input_precision="ieee")
            dv_slots = tl.dot(tl.trans(p.to(v.dtype)), grads, input_precision="ieee")
            tl.store(dk + at_gradient, dk_slots.to(dk.dtype.element_ty), mask=in_kv)
            tl.store(dv + at_gradient, dv_slots.to(dv.dtype.element_ty), mask=in_kv)
            dk += gradient_step
            dv += gradient_step
        keys += step
        values += step
    acc += tl.load(dq + at_q, mask=in_q, other=0.0).to(tl.float32)
    tl.store(dq + at_q, acc.to(dq.dtype.element_ty), mask=in_q)
