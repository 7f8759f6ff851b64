"""The reference backend on awkward calls in fp32, beside PyTorch's own attention. tests/gpu has the other backends."""

import pytest
import torch

from tests.moda.awkward import CASES, Awkward, name

FLOOR = 2e-6  # relative: some roundings of fp32, where PyTorch happens to make none (a single token)


def test_the_table_is_as_long_as_it_says():
    assert len({name(case) for case in CASES}) >= 60


@pytest.mark.parametrize("case", CASES, ids=name)
def test_errors_are_those_of_the_dtype(case):
    awkward = Awkward(case, torch.float32)
    got = awkward.run("reference")
    theirs = awkward.pytorch()
    allowed = {} if "documents" in case else {n: 1.2 * awkward.error(theirs, awkward.alone, n) for n in theirs}
    score = max(1.0, awkward.want["lse"].abs().max().item())  # whose rounding to fp32 is an error of p relative to 1
    for n in awkward.want:
        assert awkward.error(got, awkward.want, n) <= allowed.get(n, 0.0) + FLOOR * score**0.5, n
