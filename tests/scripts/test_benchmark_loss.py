"""scripts/benchmark_loss.py: what it compares is one loss, and it says what it needs."""

import pytest
import torch

from scripts.benchmark_loss import _with_gradients, main, ours, plain


def test_what_is_compared_is_one_loss_with_one_pair_of_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator, dtype=torch.float64) for size in (40, 50))
    targets = torch.randint(50, (40,), generator=generator)
    for a, b in zip(*(_with_gradients(loss, hidden, weight, targets, 1e-2) for loss in (ours, plain)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "there is none here" in capsys.readouterr().err
