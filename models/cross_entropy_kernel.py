"""Triton kernel of `models.cross_entropy`: log-sum-exp of rows of logits, and their gradient in the same place.

In: logits [rows, vocabulary] of any floating dtype, contiguous; arithmetic is fp32. A row belongs to one program and is
read twice, the second time backwards, when its end is still in the cache. Loads are some iterations ahead: without, the
time is that of the memory and of the arithmetic one after the other.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, STAGES = 8192, 16, 3


@triton.jit
def _rows(
    logits,  # [rows, columns]; with GRADIENT overwritten by its gradient
    targets,  # [rows], negative: ignored
    factors,  # [2]: gradient = factors[0] (p - [target]) + factors[1] lse p
    lse_out,  # [rows]
    chosen_out,  # [rows]: logit of the target, 0 where ignored
    columns,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    counted = target >= 0
    chosen = tl.load(logits + target, mask=counted, other=0.0).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -1e38, tl.float32)  # finite: a lane without a column stays out of the sum
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(columns, BLOCK)
    for block in tl.range(0, blocks, num_stages=STAGES):
        column = block * BLOCK + lane
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        # One exponential, not two: of exp(top - higher) and exp(x - higher) the one is 1.
        less = tl.exp(-tl.abs(x - top))
        total = tl.where(x > top, total * less + 1.0, total + less)
        top = tl.maximum(top, x)
    peak = tl.max(top, 0)
    lse = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
    tl.store(lse_out + row, lse)
    tl.store(chosen_out + row, chosen)
    if GRADIENT:
        of_target = tl.where(counted, tl.load(factors), 0.0)
        of_all = tl.where(counted, tl.load(factors) + tl.load(factors + 1) * lse, 0.0)
        for block in tl.range(0, blocks, num_stages=STAGES):
            column = (blocks - 1 - block) * BLOCK + lane
            inside = column < columns
            x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = of_all * tl.exp(x - lse) - tl.where(column == target, of_target, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)


def softmax_rows(
    logits: Tensor, targets: Tensor, factors: Tensor, lse: Tensor, chosen: Tensor, with_gradient: bool
) -> None:
    """As `models.cross_entropy._softmax_rows`; factors, lse and chosen in fp32."""
    assert logits.is_contiguous()
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    _rows[(len(logits),)](
        logits,
        targets.contiguous(),
        factors,
        lse,
        chosen,
        logits.shape[1],
        GRADIENT=with_gradient,
        BLOCK=block,
        STAGES=STAGES,
        num_warps=max(1, WARPS * block // BLOCK),
    )
