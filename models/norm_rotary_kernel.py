"""Triton kernels of `models.norm_rotary`: RMSNorm over the full width and rotate-half, read once and written once.

A program takes ROWS tokens at a time. A row of queries or keys is held as its two halves, the first and the second
element of every pair that is rotated (x1, x2: elements i and i + head_dim / 2 of each head), [ROWS, P] with P half the
width, padded to a power of two. Backward, a program goes through many blocks of tokens and sums the gradients of the
norms' weights in registers; the programs' sums are added up afterwards, in a fixed order.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fastest of 1, 2 and 4 rows and warps, of 528 to 4224 programs and of 1 to 3 stages, on an H100 and an H200; two
# rows of more than NARROW, or of less in more warps, take half as long again.
ROWS, NARROW, WARPS = 2, 512, 1
BACKWARD_PROGRAMS, WITHOUT_QUERIES = 1056, 2112  # eight for each multiprocessor of a Hopper GPU, or 16


@triton.jit
def _load_pair(rows, inside, W: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """The two halves of rows of width W, fp32, and where they are."""
    c = tl.arange(0, P)
    first = (c // (D // 2)) * D + c % (D // 2)
    mask = inside[:, None] & (c < W // 2)[None, :]
    at = rows[:, None] + first[None, :]
    x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(at + D // 2, mask=mask, other=0.0).to(tl.float32)
    return x1, x2, first, mask


@triton.jit
def _load_weight(weight, first, W: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    in_row = tl.arange(0, P) < W // 2
    w1 = tl.load(weight + first, mask=in_row, other=0.0).to(tl.float32)
    w2 = tl.load(weight + first + D // 2, mask=in_row, other=0.0).to(tl.float32)
    return w1[None, :], w2[None, :]


@triton.jit
def _load_angles(cos, sin, at_angle, mask, D: tl.constexpr, P: tl.constexpr):
    at = at_angle[:, None] + (tl.arange(0, P) % (D // 2))[None, :]
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)


@triton.jit
def _rms(x1, x2, eps, W: tl.constexpr):
    """1 / rms of every row, [ROWS, 1]."""
    return tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / W + eps)[:, None]


@triton.jit
def _rotate(rows, weight, out, cos, sin, at_angle, inside, eps, W: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    x1, x2, first, mask = _load_pair(rows, inside, W, D, P)
    w1, w2 = _load_weight(weight, first, W, D, P)
    c, s = _load_angles(cos, sin, at_angle, mask, D, P)
    rms = _rms(x1, x2, eps, W)
    y1, y2 = x1 * rms * w1, x2 * rms * w2
    at = out[:, None] + first[None, :]
    tl.store(at, (y1 * c - y2 * s).to(out.dtype.element_ty), mask=mask)
    tl.store(at + D // 2, (y2 * c + y1 * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _copy(source, target, inside, W: tl.constexpr, P: tl.constexpr):
    """Rows of width W; P as above."""
    c = tl.arange(0, 2 * P)
    mask = inside[:, None] & (c < W)[None, :]
    tl.store(target[:, None] + c[None, :], tl.load(source[:, None] + c[None, :], mask=mask), mask=mask)


@triton.jit(do_not_specialize=["tokens", "time"])
def norm_rotary_forward(
    product,  # [tokens, QW + 2 KW]
    q_weight,  # [QW]
    k_weight,  # [KW]
    cos,  # [batch or 1, time, D / 2], fp32
    sin,
    q,  # [tokens, QW], out
    k,  # [tokens, KW], out
    v,
    tokens,
    time,
    angle_stride,  # of cos and sin between sequences, 0 for one table
    eps,
    QW: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    QP: tl.constexpr,
    KP: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    at_angle = token // time * angle_stride + token % time * (D // 2)
    rows = product + token * (QW + 2 * KW)
    if QW > 0:
        _rotate(rows, q_weight, q + token * QW, cos, sin, at_angle, inside, eps, QW, D, QP)
    _rotate(rows + QW, k_weight, k + token * KW, cos, sin, at_angle, inside, eps, KW, D, KP)
    _copy(rows + QW + KW, v + token * KW, inside, KW, KP)


@triton.jit
def _rotate_back(
    rows, weight, grads, out, cos, sin, at_angle, inside, eps, dw1, dw2,
    W: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the rows; return the sums of the weight's with theirs added."""
    x1, x2, first, mask = _load_pair(rows, inside, W, D, P)
    g1, g2, _, _ = _load_pair(grads, inside, W, D, P)
    w1, w2 = _load_weight(weight, first, W, D, P)
    c, s = _load_angles(cos, sin, at_angle, mask, D, P)
    rms = _rms(x1, x2, eps, W)
    x1, x2 = x1 * rms, x2 * rms
    dy1, dy2 = g1 * c + g2 * s, g2 * c - g1 * s
    dw1 += tl.sum(dy1 * x1, 0)
    dw2 += tl.sum(dy2 * x2, 0)
    dy1, dy2 = dy1 * w1, dy2 * w2
    along = ((tl.sum(dy1 * x1, 1) + tl.sum(dy2 * x2, 1)) / W)[:, None]
    at = out[:, None] + first[None, :]
    tl.store(at, ((dy1 - x1 * along) * rms).to(out.dtype.element_ty), mask=mask)
    tl.store(at + D // 2, ((dy2 - x2 * along) * rms).to(out.dtype.element_ty), mask=mask)
    return dw1, dw2


@triton.jit
def _store_sums(sums, dw1, dw2, W: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    c = tl.arange(0, P)
    at = sums + (c // (D // 2)) * D + c % (D // 2)
    tl.store(at, dw1, mask=c < W // 2)
    tl.store(at + D // 2, dw2, mask=c < W // 2)


@triton.jit(do_not_specialize=["tokens", "time"])
def norm_rotary_backward(
    dq,  # [tokens, QW]
    dk,  # [tokens, KW]
    dv,
    product,
    q_weight,
    k_weight,
    cos,
    sin,
    dproduct,  # [tokens, QW + 2 KW], out
    sums,  # [programs, QW + KW], fp32, out: of the weights' gradients
    tokens,
    time,
    angle_stride,
    eps,
    QW: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    QP: tl.constexpr,
    KP: tl.constexpr,
    ROWS: tl.constexpr,
):
    q1, q2 = tl.zeros([QP], tl.float32), tl.zeros([QP], tl.float32)
    k1, k2 = tl.zeros([KP], tl.float32), tl.zeros([KP], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        token = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = token < tokens
        at_angle = token // time * angle_stride + token % time * (D // 2)
        rows, out = product + token * (QW + 2 * KW), dproduct + token * (QW + 2 * KW)
        if QW > 0:
            q1, q2 = _rotate_back(
                rows, q_weight, dq + token * QW, out, cos, sin, at_angle, inside, eps, q1, q2, QW, D, QP
            )
        k1, k2 = _rotate_back(
            rows + QW, k_weight, dk + token * KW, out + QW, cos, sin, at_angle, inside, eps, k1, k2, KW, D, KP
        )
        _copy(dv + token * KW, out + QW + KW, inside, KW, KP)
    sums += tl.program_id(0) * (QW + KW)
    if QW > 0:
        _store_sums(sums, q1, q2, QW, D, QP)
    _store_sums(sums + QW, k1, k2, KW, D, KP)


def forward(
    product: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
    memory: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `models.norm_rotary.norm_rotary`, on contiguous tensors; `q_weight` of no elements for no queries.

    `memory`: contiguous tensors that k and v are written to and returned as.
    """
    batch, time, _ = product.shape
    sizes = _sizes(product.shape, q_weight.shape, k_weight.shape, cos.shape, head_dim)
    rows = _rows(sizes)
    q = product.new_empty(batch, time, sizes["QW"] // head_dim, head_dim)
    shape = (batch, time, sizes["KW"] // head_dim, head_dim)
    k, v = memory or (product.new_empty(shape), product.new_empty(shape))
    assert k.shape == v.shape == shape
    assert k.dtype == v.dtype == product.dtype
    with torch.cuda.device_of(product):
        norm_rotary_forward[(-(-batch * time // rows),)](
            product, q_weight, k_weight, cos, sin, q, k, v, eps=eps, ROWS=rows, num_warps=WARPS, **sizes
        )
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    product: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of product and of both weights, in their shapes and dtypes; all arguments contiguous."""
    sizes = _sizes(product.shape, q_weight.shape, k_weight.shape, cos.shape, head_dim)
    widths = sizes["QW"], sizes["KW"]
    rows = _rows(sizes)
    programs = min(BACKWARD_PROGRAMS if sizes["QW"] else WITHOUT_QUERIES, -(-sizes["tokens"] // rows))
    dproduct = torch.empty_like(product)
    sums = product.new_empty(programs, sum(widths), dtype=torch.float32)
    with torch.cuda.device_of(product):
        norm_rotary_backward[(programs,)](
            dq,
            dk,
            dv,
            product,
            q_weight,
            k_weight,
            cos,
            sin,
            dproduct,
            sums,
            eps=eps,
            ROWS=rows,
            num_warps=WARPS,
            **sizes,
        )
    dq_weight, dk_weight = sums.sum(0).split_with_sizes(widths)
    return dproduct, dq_weight.to(q_weight.dtype, copy=True), dk_weight.to(k_weight.dtype, copy=True)


def _rows(sizes: dict[str, int]) -> int:
    """Tokens that a program takes at a time."""
    return ROWS if max(sizes["QP"], sizes["KP"]) <= NARROW else 1


@cache  # computed anew it would take the host half as long as the launch
def _sizes(
    product: torch.Size, q_weight: torch.Size, k_weight: torch.Size, cos: torch.Size, head_dim: int
) -> dict[str, int]:
    """What both kernels are told of the shapes."""
    batch, time, width = product
    assert width == q_weight[0] + 2 * k_weight[0]
    assert cos[1:] == (time, 1, head_dim // 2)
    assert cos[0] in (1, batch)
    return {
        "tokens": batch * time,
        "time": time,
        "angle_stride": time * head_dim // 2 if cos[0] > 1 else 0,
        "QW": q_weight[0],
        "KW": k_weight[0],
        "D": head_dim,
        "QP": triton.next_power_of_2(max(2, q_weight[0]) // 2),
        "KP": triton.next_power_of_2(k_weight[0] // 2),
    }
