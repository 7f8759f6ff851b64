"""scripts/run_kernels.py: it says what it needs; tests/gpu runs the kernels themselves."""

import pytest
import torch

from scripts.run_kernels import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "there is none here" in capsys.readouterr().err
