"""QK-norm and rotary embedding in one kernel on a GPU: the layers' results in every dtype, the same bits again."""

import pytest
import torch

from models import norm_rotary
from models.kernels import available
from tests.models.test_norm_rotary import SHAPES, case, check, results

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
LARGE = [(2, 1000, 16, 8, 64, False), (1, 515, 24, 12, 64, True), (1, 333, 0, 8, 128, False), (2, 65, 5, 3, 96, True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_outputs_and_gradients_are_those_of_the_layers(shape, dtype):
    assert available(torch.device("cuda"), dtype)
    check(shape, dtype, "cuda", TOLERANCE[dtype])


def test_same_bits_from_the_same_inputs():
    first, second = (results(norm_rotary._norm_rotary, *case(LARGE[0], torch.bfloat16, "cuda")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
