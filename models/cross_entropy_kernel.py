"""Triton kernel of `models.cross_entropy`: log-sum-exp of rows of logits, and their gradient in the same place.

In: logits [rows, vocabulary] of any floating dtype, contiguous; arithmetic is fp32, exponentials are powers of two. A
row belongs to one program and is read twice, the second time backwards, when its end is still in the cache. A thread
holds PER neighbouring columns: one maximum and one correction of its sum for all of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from moda.kernels.precision import LN2, LOG2E

# The fastest of 40 on an H200. Loads that run ahead take longer: programs of other rows hide the memory's time as well.
LANES, PER, WARPS = 1024, 16, 32


@triton.jit
def _add(x, top, total):
    """Columns x [lanes, PER] into the running maximum, in powers of two, and sum of every lane."""
    higher = tl.maximum(top, tl.max(x, 1) * LOG2E)
    return higher, total * tl.exp2(top - higher) + tl.sum(tl.exp2(x * LOG2E - higher[:, None]), 1)


@triton.jit
def _rows(
    logits,  # [rows, columns]; with GRADIENT overwritten by its gradient
    targets,  # [rows], negative: ignored
    factors,  # [2]: gradient = factors[0] (p - [target]) + factors[1] lse p
    lse_out,  # [rows]
    chosen_out,  # [rows]: logit of the target, 0 where ignored
    columns,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * PER
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    counted = target >= 0
    chosen = tl.load(logits + target, mask=counted, other=0.0).to(tl.float32)
    lane = tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]
    whole = columns // BLOCK * BLOCK  # what is left is the last, partial block
    inside = lane < columns - whole
    top = tl.full([LANES], -1e38, tl.float32)  # finite: a lane without a column stays out of the sum
    total = tl.zeros([LANES], tl.float32)
    for first in tl.range(0, whole, BLOCK, num_stages=1):
        top, total = _add(tl.load(logits + first + lane).to(tl.float32), top, total)
    last = tl.load(logits + whole + lane, mask=inside, other=float("-inf")).to(tl.float32)
    top, total = _add(last, top, total)
    peak = tl.max(top, 0)
    exponent = peak + tl.log2(tl.sum(total * tl.exp2(top - peak), 0))
    lse = exponent * LN2
    tl.store(lse_out + row, lse)
    tl.store(chosen_out + row, chosen)
    if GRADIENT:
        of_target = tl.where(counted, tl.load(factors), 0.0)
        of_all = tl.where(counted, tl.load(factors) + tl.load(factors + 1) * lse, 0.0)
        gradient = of_all * tl.exp2(last * LOG2E - exponent)
        tl.store(logits + whole + lane, gradient.to(logits.dtype.element_ty), mask=inside)
        for first in tl.range(0, whole, BLOCK, num_stages=1):
            at = logits + (whole - BLOCK - first) + lane
            gradient = of_all * tl.exp2(tl.load(at).to(tl.float32) * LOG2E - exponent)
            # Streaming, so that it does not push the logits of other programs out of the cache.
            tl.store(at, gradient.to(logits.dtype.element_ty), cache_modifier=".cs")
        tl.debug_barrier()  # the target's is written again, by another thread than before
        of_chosen = of_all * tl.exp2(chosen * LOG2E - exponent) - of_target
        tl.store(logits + target, of_chosen.to(logits.dtype.element_ty), mask=counted)


def softmax_rows(
    logits: Tensor, targets: Tensor, factors: Tensor, lse: Tensor, chosen: Tensor, with_gradient: bool
) -> None:
    """As `models.cross_entropy._softmax_rows`; factors, lse and chosen in fp32."""
    assert logits.is_contiguous()
    lanes = max(1, min(LANES, triton.next_power_of_2(logits.shape[1]) // PER))
    _rows[(len(logits),)](
        logits,
        targets.contiguous(),
        factors,
        lse,
        chosen,
        logits.shape[1],
        GRADIENT=with_gradient,
        LANES=lanes,
        PER=PER,
        num_warps=max(1, WARPS * lanes // LANES),
    )
