"""SwiGLU of a fused projection in one kernel each way on a GPU: the definition's results in every dtype."""

import pytest
import torch

from tests.models.test_swiglu import SHAPES, check

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1000, 2 * 5000), (4099, 2 * 4096)], ids=str)
def test_output_and_gradient_are_those_of_the_definition(shape, dtype):
    check(shape, dtype, "cuda", TOLERANCE[dtype])
