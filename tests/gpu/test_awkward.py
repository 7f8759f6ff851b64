"""Every backend and dtype on awkward calls, beside PyTorch's own attention in that dtype on the sequence alone."""

import pytest
import torch

from moda.backends import BACKENDS
from tests.moda.awkward import CASES, LARGE_SCORES, Awkward, name

# joined rounds o and dq twice, after the sequence and after the slots: two errors of one size, as independent ones add.
FACTOR = {"joined": 1.2 * 2**0.5, "fused": 1.2}
TWICE_ROUNDED = {"fused": ("dq",)}  # of the backends whose other results are rounded once
SPARE = 0.25  # of the dtype's precision: where PyTorch happens to make no error at all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", FACTOR)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_errors_are_those_of_the_dtype(case, backend, dtype):
    check(case, backend, dtype, "cuda")


def check(case, backend, dtype, device):
    """Hold a backend to PyTorch's error on the sequence, or, of LARGE_SCORES in fp32, on sequence and slots."""
    awkward = Awkward(case, dtype, device)
    if reason := BACKENDS[backend].unusable(*awkward.inputs[:2], awkward.cu_seqlens):
        assert dtype == torch.float32, reason
        pytest.skip(f"{backend}: {reason}")
    got, theirs = awkward.run(backend), awkward.pytorch()
    jointly = awkward.pytorch_jointly() if case in LARGE_SCORES and dtype == torch.float32 else None
    few = case["shape"][1] < 3  # PyTorch has next to nothing to add up there, the slots have
    precision = torch.finfo(dtype).eps
    score = max(1.0, awkward.want["lse"].abs().max().item())
    for n in ("o", "dq", "dk", "dv", "d_keys", "d_values"):
        like = {"d_keys": "dk", "d_values": "dv"}.get(
            n, n
        )  # PyTorch has no slots: their gradients are of the same kind
        factor = FACTOR["joined"] if n in TWICE_ROUNDED.get(backend, ()) else FACTOR[backend]
        theirs_alone = awkward.error(theirs, awkward.alone, like)
        theirs_jointly = awkward.error(jointly, awkward.want, n) if jointly else 0.0
        allowed = factor * max(theirs_alone, theirs_jointly) + SPARE * precision * score**0.5
        assert awkward.error(got, awkward.want, n) <= allowed + 2 * precision * few, n
    assert awkward.error(got, awkward.want, "lse") <= 1e-5 + 1e-6 * score, "lse"
