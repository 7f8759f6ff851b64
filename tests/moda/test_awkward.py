"""Awkward calls in fp32, beside PyTorch's own attention: the reference backend, and in Triton's interpreter `fused`.

tests/gpu has the other backends and dtypes. The interpreter multiplies as PyTorch does on a CPU, so that it sees what
exponents, lse and sums over tiles add to an error, and not in which order a GPU adds up within a product.
"""

import importlib.util

import pytest
import torch

from moda import kernels
from tests.moda.awkward import CASES, Awkward, name
from tests.moda.interpreter import run_interpreted

if not kernels.INTERPRETED:
    FLOOR = 2e-6  # relative: some roundings of fp32, where PyTorch happens to make none (a single token)

    def test_the_table_is_as_long_as_it_says():
        assert len({name(case) for case in CASES}) >= 60

    @pytest.mark.parametrize("case", CASES, ids=name)
    def test_errors_are_those_of_the_dtype(case):
        awkward = Awkward(case, torch.float32)
        got = awkward.run("reference")
        theirs = awkward.pytorch()
        allowed = {} if "documents" in case else {n: 1.2 * awkward.error(theirs, awkward.alone, n) for n in theirs}
        score = max(1.0, awkward.want["lse"].abs().max().item())  # its rounding to fp32 is an error of p relative to 1
        for n in awkward.want:
            assert awkward.error(got, awkward.want, n) <= allowed.get(n, 0.0) + FLOOR * score**0.5, n

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
    def test_the_fused_kernels_in_the_interpreter():
        run_interpreted(__file__)

else:
    from tests.gpu.test_awkward import check

    SMALL = 12_000  # pairs of a query and a key or slot

    def pairs(case):
        batch, time, kv_heads, group, _, slots = case["shape"]
        return batch * time * kv_heads * group * (time / 2 + slots)

    @pytest.mark.parametrize("case", [case for case in CASES if pairs(case) < SMALL], ids=name)
    def test_errors_of_fused_are_those_of_fp32(case):
        check(case, "fused", torch.float32, "cpu")
