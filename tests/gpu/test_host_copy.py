"""Copies of tensors in page-locked host memory, made beside what the device goes on to do."""

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from training.distributed import distributed_world
from training.host_copy import HostCopy, _leaves

pytestmark = pytest.mark.gpu
SIZES = [(1,), (), (3, 5), (1000, 1000), (5000, 5000), (0, 4), (7,)]


@pytest.fixture
def tensors():
    with distributed_world("cuda") as world:
        yield {
            "plain": {str(n): torch.randn(size, device=world.device) for n, size in enumerate(SIZES)},
            "sharded": {
                "weight": distribute_tensor(torch.randn(300, 7, device=world.device), world.mesh, [Shard(0)]),
                "step": torch.ones((), device=world.device),
            },
        }


def test_copies_hold_what_was_there_though_the_tensors_change_at_once(tensors):
    copying = HostCopy(tensors, torch.device("cuda"))
    copying.prepare()
    memory = [leaf.data_ptr() for leaf in _leaves(copying.tensors)]
    assert all(leaf.is_pinned() for leaf in _leaves(copying.tensors) if leaf.numel())
    for _ in range(3):
        with torch.no_grad():
            want = [leaf.clone() for leaf in _leaves(tensors)]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                torch.cuda._sleep(10**8)  # the copy must wait for this
                for leaf in _leaves(tensors):
                    leaf += 1
                copying.begin(tensors)
                copying.hold()
                for leaf in _leaves(tensors):
                    leaf.mul_(3)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            copying.finish()
            assert copying.waited() >= 0
            for got, before in zip(_leaves(copying.tensors), want, strict=True):
                assert got.device.type == "cpu"
                assert torch.equal(got, before.cpu() + 1)
        assert [leaf.data_ptr() for leaf in _leaves(copying.tensors)] == memory
    assert copying.tensors["sharded"]["weight"].placements == (Shard(0),)
    copying.close()
    assert not next(_leaves(copying.tensors)).is_pinned()
