"""QK-norm and rotary embedding in one kernel on a GPU: the layers' results in every dtype, the same bits again."""

import pytest
import torch

from models import norm_rotary
from models.kernels import available
from models.parallelize import prepare_blocks
from tests.models.plain import build, small, tokens
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


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_a_model_writes_to_its_slots_at_once(backend, checkpointing, monkeypatch):
    copies = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *rest: copies.append(self.shape) or copy(self, *rest))
    config = small(depth_kv=True, ffn_kv_proj=True, num_layers=7, hidden_size=64, head_dim=16)
    # Compiled once: compiled anew, a sum over a row may come in another order.
    model = build(config, dtype=torch.bfloat16).cuda()
    prepare_blocks(model, checkpointing, backend, "fused")

    def run():
        copies.clear()
        loss = sum(model(*(ids.cuda() for ids in tokens(time=130))))
        copied = sum(len(shape) == 4 for shape in copies)
        return copied, [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    copied, got = run()
    assert copied == 0
    monkeypatch.setattr("moda.slot_memory", lambda place: None)
    copied, want = run()
    assert copied == 2 * 2 * 7 - 2
    for a, b in zip(got, want, strict=True):  # no kernel is another; what PyTorch's add up may come in another order
        assert (a.float() - b.float()).norm() <= 1e-3 * b.float().norm()
