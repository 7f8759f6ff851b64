"""Triton kernels of the depth part that own slots and go through the readers: the pulled gradients of keys and values.

Rows, padding and the two ways are those of `moda.kernels.depth_query`. A program holds some slots of a row, or of a
block of rows, and the fp32 sums of their gradients; what it streams is the queries and gradients that readers have
left. So the bytes do not depend on the number of slots: the slots of several layers can share one pass.

Readers' q and do are found by address, in a table that the readers themselves have written on the device: they stay
where the autograd graph has them, and nothing is copied or allocated for the pull.
"""

import triton
import triton.language as tl

from moda.kernels.precision import LOG2E, add_product, exp2, slot_exponents, slot_exponents_dot, slot_products


@triton.jit
def tensor_at(address, like):
    """Pointers, to what `like` points to, from their addresses; tensors start at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def begin_sum(zeros, partial, at_partial, in_slots, PARTIAL: tl.constexpr):
    """What a sum over readers begins with: a partial sum of every slot, if there is one.

    Loaded before the readers, not after: the latencies of both overlap.
    """
    if PARTIAL:
        zeros += tl.load(partial + at_partial, mask=in_slots, other=0.0)
    return zeros


@triton.jit(do_not_specialize=["first", "last", "slots"])
def slots_vector(
    addresses,  # [readers, 2], of q and do [rows, G, D] in the dtype of k
    lse,  # [readers, rows, G], one reader `statistic_stride` apart
    delta,
    k,  # [slots, rows, D]
    v,
    dk,  # [slots, rows, D], out
    dv,
    partial_dk,  # [slots, rows, D] in fp32, if PARTIAL
    partial_dv,
    first,
    last,
    rows,
    slots,
    statistic_stride,
    slot_stride,
    gradient_stride,
    partial_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * BLOCK
    i, d = tl.arange(0, BLOCK), tl.arange(0, DP)
    j = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    in_lse = pid * BLOCK + i < rows
    in_q = in_lse[:, None] & (d < D)[None, :]
    in_slots = (j < slots)[:, None, None] & in_q[None, :, :]
    slot = j.to(tl.int64)[:, None, None]
    at_slot = start * D + (i[:, None] * D + d[None, :])[None, :, :]
    at_gradient = slot * gradient_stride + at_slot
    at_partial = slot * partial_stride + at_slot
    at_q = start * G * D + i[:, None] * (G * D) + d[None, :]
    at_lse = i * G
    keys = tl.load(k + slot * slot_stride + at_slot, mask=in_slots, other=0.0).to(tl.float32)
    values = tl.load(v + slot * slot_stride + at_slot, mask=in_slots, other=0.0).to(tl.float32)
    dk_sum = tl.zeros([SLOTS, BLOCK, DP], tl.float32)
    dk_sum = begin_sum(dk_sum, partial_dk, at_partial, in_slots, PARTIAL)
    dv_sum = tl.zeros([SLOTS, BLOCK, DP], tl.float32)
    dv_sum = begin_sum(dv_sum, partial_dv, at_partial, in_slots, PARTIAL)

    reader = first.to(tl.int64)
    addresses += reader * 2
    lse += reader * statistic_stride + start * G
    delta += reader * statistic_stride + start * G
    for _ in tl.range(first, last, num_stages=STAGES):
        q = tensor_at(addresses, k)
        do = tensor_at(addresses + 1, k)
        for g in tl.static_range(G):
            queries = tl.load(q + at_q + g * D, mask=in_q, other=0.0).to(tl.float32)[None, :, :]
            grads = tl.load(do + at_q + g * D, mask=in_q, other=0.0).to(tl.float32)[None, :, :]
            lse_rows = tl.load(lse + at_lse + g, mask=in_lse, other=0.0) * LOG2E
            delta_rows = tl.load(delta + at_lse + g, mask=in_lse, other=0.0)
            s = slot_exponents(keys, queries, scale) if FULL else tl.sum(keys * queries, 2) * (scale * LOG2E)
            p = exp2(s - lse_rows[None, :])
            dp = slot_products(values, grads) if FULL else tl.sum(values * grads, 2)
            ds = p * (dp - delta_rows[None, :]).to(tl.float32) * scale
            dk_sum += ds[:, :, None] * queries
            dv_sum += p[:, :, None] * grads
        addresses += 2
        lse += statistic_stride
        delta += statistic_stride
    tl.store(dk + at_gradient, dk_sum.to(dk.dtype.element_ty), mask=in_slots)
    tl.store(dv + at_gradient, dv_sum.to(dv.dtype.element_ty), mask=in_slots)


@triton.jit(do_not_specialize=["first", "last", "slots"])
def slots_tensor(
    addresses,
    lse,
    delta,
    k,
    v,
    dk,
    dv,
    partial_dk,
    partial_dv,
    first,
    last,
    rows,
    slots,
    statistic_stride,
    slot_stride,
    gradient_stride,
    partial_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    FULL: tl.constexpr = lse.dtype.element_ty == tl.float64
    row = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, BLOCK), tl.arange(0, DP)
    j = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    in_slots = (j < slots)[:, None] & (d < D)[None, :]
    slot = j.to(tl.int64)[:, None]
    at_slot = row * D + d[None, :]
    at_gradient = slot * gradient_stride + at_slot
    at_partial = slot * partial_stride + at_slot
    keys = tl.load(k + slot * slot_stride + at_slot, mask=in_slots, other=0.0)
    values = tl.load(v + slot * slot_stride + at_slot, mask=in_slots, other=0.0)
    dk_sum = tl.zeros([SLOTS, DP], tl.float32)
    dk_sum = begin_sum(dk_sum, partial_dk, at_partial, in_slots, PARTIAL)
    dv_sum = tl.zeros([SLOTS, DP], tl.float32)
    dv_sum = begin_sum(dv_sum, partial_dv, at_partial, in_slots, PARTIAL)

    lse += row * G
    delta += row * G
    # A product takes BLOCK queries, those of BLOCK / G readers; counted from the first query of the first reader.
    for at in tl.range(first * G, last * G, BLOCK, num_stages=STAGES):
        index = at + i
        left = index < last * G
        in_q = left[:, None] & (d < D)[None, :]
        reader, g = (index // G).to(tl.int64), index % G
        at_q = ((row * G + g) * D)[:, None] + d[None, :]
        # A reader that is not there stands for the last one, so that every address is one.
        address = addresses + 2 * tl.minimum(reader, last - 1)
        queries = tl.load(tensor_at(address, k)[:, None] + at_q, mask=in_q, other=0.0)
        grads = tl.load(tensor_at(address + 1, k)[:, None] + at_q, mask=in_q, other=0.0)
        lse_rows = tl.load(lse + reader * statistic_stride + g, mask=left, other=0.0) * LOG2E
        delta_rows = tl.load(delta + reader * statistic_stride + g, mask=left, other=0.0)
        if FULL:
            s = slot_exponents_dot(keys, tl.trans(queries), scale)
        else:
            s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * (scale * LOG2E)
        p = exp2(s - lse_rows[None, :])
        ds = p * (tl.dot(values, tl.trans(grads), input_precision="ieee") - delta_rows[None, :]) * scale
        dk_sum = add_product(ds.to(queries.dtype), queries, dk_sum, FULL)
        dv_sum = add_product(p.to(grads.dtype), grads, dv_sum, FULL)
    tl.store(dk + at_gradient, dk_sum.to(dk.dtype.element_ty), mask=in_slots)
    tl.store(dv + at_gradient, dv_sum.to(dv.dtype.element_ty), mask=in_slots)
