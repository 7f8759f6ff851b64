"""fp32 arithmetic of the kernels for fp32 inputs, where nothing but its own roundings stands between them and exact.

What bf16 and fp16 hide: an exponent of size x, as lse is, loses x / 2**24 of p when it is rounded, the same for all of
a row; and a product that adds to an accumulator is one chain of additions over the whole sequence. So here exponents
are sums of two fp32, lse is stored in fp64, slots have their scores in fp64 (forward and backward add them up in
different orders, and what differs is an error of p too), and sums over the sequence are sums of tiles' sums.

FULL, of a kernel, is that lse is fp64; all else is as it was.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PAST_END = tl.constexpr(1e30)  # an lse with p = 0; finite, so that its parts are numbers


@triton.jit
def parts(x):
    """Two fp32 whose sum is x, but for 2**-48 of it; of an fp32 x itself and nothing."""
    if x.dtype == tl.float64:
        high = x.to(tl.float32)
        low = (x - high.to(tl.float64)).to(tl.float32)
    else:
        high, low = x, 0.0
    return high, low


@triton.jit
def in_powers_of_two(x, FULL: tl.constexpr):
    """x (a scale, an lse) times log2(e), for exp2, and what its rounding to fp32 has lost, if FULL."""
    if FULL:
        high, low = parts(tl.cast(x, tl.float64) * LOG2E)
    else:
        high, low = x * LOG2E, 0.0
    return high, low


@triton.jit
def exp2_sum(high, low):
    """exp2(high + low) for a low that is next to nothing."""
    p = tl.exp2(high)
    return tl.fma(p, low * LN2, p)


@triton.jit
def exp2(x):
    """exp2 of x, fp32 or fp64, in fp32."""
    if x.dtype == tl.float64:
        high, low = parts(x)
        p = exp2_sum(high, low)
    else:
        p = tl.exp2(x)
    return p


@triton.jit
def exp2_scaled(s, scale, scale_low, lse, lse_low, FULL: tl.constexpr):
    """exp2(s * (scale + scale_low) - (lse + lse_low))."""
    if FULL:
        # What `high` has lost, s * scale - (lse + high): the sum of two numbers, rounded, and its error (Knuth).
        # Products are fma's throughout: a compiler that contracted one into a sum would change it.
        high = tl.fma(s, scale, -lse)
        both = lse + high
        back = both - lse
        error = (lse - (both - back)) + (high - back)
        p = exp2_sum(high, (tl.fma(s, scale, -both) - error) + tl.fma(s, scale_low, -lse_low))
    else:
        p = tl.exp2(s * scale - lse)
    return p


@triton.jit
def halves(x):
    """Every other column of x, and the rest: what a thread holds of them it keeps."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def two_sums(a, b):
    """a b^T as the sum of two."""
    a_even, a_odd = halves(a)
    b_even, b_odd = halves(b)
    s = tl.dot(a_even, tl.trans(b_even), input_precision="ieee")
    return add_product(a_odd, tl.trans(b_odd), s, True)


@triton.jit
def inner_products(a, b, FULL: tl.constexpr):
    """a b^T, rows of queries by rows of keys or the other way round, which gives the same bits.

    If FULL, as the sum of up to four sums: an error of a score is one of its size, which may be hundreds, and an error
    of a gradient times a value is most of what there is where few tokens are added up.
    """
    if FULL and a.shape[1] >= 64:
        a_even, a_odd = halves(a)
        b_even, b_odd = halves(b)
        s = two_sums(a_even, b_even) + two_sums(a_odd, b_odd)
    elif FULL and a.shape[1] == 32:
        s = two_sums(a, b)
    else:
        s = tl.dot(a, tl.trans(b), input_precision="ieee")
    return s


@triton.jit
def slot_products(a, b):
    """Inner products of what broadcasts to [., ., head_dim], in fp64."""
    return tl.sum(a.to(tl.float64) * b.to(tl.float64), 2)


@triton.jit
def slot_exponents(a, b, scale):
    """Scores, in powers of two, of queries and keys that broadcast to [., ., head_dim], in fp64."""
    return slot_products(a, b) * (tl.cast(tl.cast(scale, tl.float32), tl.float64) * LOG2E)


@triton.jit
def slot_exponents_dot(a, b, scale):
    """The same of queries and keys as the operands of a product."""
    s = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    return s * (tl.cast(tl.cast(scale, tl.float32), tl.float64) * LOG2E)


@triton.jit
def add_product(a, b, total, FULL: tl.constexpr):
    """total + a b, in fp32."""
    if FULL:
        # Of total + product Triton would make a product with an accumulator again; an fma it leaves alone.
        total = tl.fma(total, 1.0, tl.dot(a, b, input_precision="ieee"))
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total
