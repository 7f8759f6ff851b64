"""What is left out on one rank changes no bit: gradients reduced in place."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models.parallelize
from models.decoder import Decoder
from models.initialization import initialize
from models.one_rank import _InPlace
from models.parallelize import parallelize
from tests.models.plain import small, tokens
from training.distributed import distributed_world

MODA = {"depth_kv": True, "ffn_kv_proj": True}


@pytest.fixture
def mesh():
    with distributed_world("cpu") as world:
        yield world.mesh


def built(mesh, dtype=torch.float32, compute_dtype=torch.bfloat16, **options):
    with torch.device("meta"):
        model = Decoder(small(**MODA)).to(dtype)
    model = parallelize(model, mesh, compute_dtype=compute_dtype, reshard_after_forward=False, **options)
    initialize(model, seed=1)
    return model


class Reductions(TorchDispatchMode):
    """The flat tensors that gradients are written into to be reduced."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fsdp.chunk_cat.default:
            self.inputs.append(kwargs["out"])
        return function(*args, **(kwargs or {}))


def gradients(model, micro_batches, sync):
    """Of that many micro-batches; `sync`: after each, else after the last. With the pointers of what was reduced."""
    with Reductions() as reductions:
        for index in range(micro_batches):
            model.set_requires_gradient_sync(sync or index == micro_batches - 1)
            sum(model(*tokens(seed=index))).backward()
    found = {name: p.grad.to_local() for name, p in model.named_parameters() if p.grad is not None}
    assert len(reductions.inputs) == (len(model.blocks) + 1) * (micro_batches if sync else 1)
    return found, {tensor.untyped_storage().data_ptr() for tensor in reductions.inputs}


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize(("micro_batches", "sync"), [(1, True), (3, False), (3, True)])
def test_gradients_that_are_reduced_in_place_keep_every_bit(
    micro_batches, sync, dtype, compute_dtype, mesh, monkeypatch
):
    model = built(mesh, dtype, compute_dtype)
    monkeypatch.setattr(models.parallelize, "reduce_in_place", lambda model: None)
    plain = built(mesh, dtype, compute_dtype)
    for _ in range(2):  # the second step finds what the first one left
        got, reduced = gradients(model, micro_batches, sync)
        want, _ = gradients(plain, micro_batches, sync)
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            assert torch.equal(got[name], gradient), name
        if dtype == torch.float32:  # what the last reduction wrote, or the first, to which later ones were added
            assert {gradient.untyped_storage().data_ptr() for gradient in got.values()} <= reduced
        for each in (model, plain):
            each.zero_grad()


def test_memory_is_handed_out_twice_and_only_where_it_becomes_the_gradients():
    weight = torch.nn.Parameter(torch.zeros(2))
    memory = _InPlace(weight)

    def pair(dtype=torch.float32, size=(6,)):
        return [memory.allocate(size, dtype=dtype, device=weight.device) for _ in range(2)]

    first, again = pair()
    assert first is again
    second, again = pair()
    assert second is again
    assert second is not first
    one, other = pair(torch.bfloat16)
    assert one is not other
    weight.grad = torch.zeros(2)
    one, other = pair()
    assert one is not other


def test_an_input_that_no_output_followed_is_not_the_next_one():
    weight = torch.nn.Parameter(torch.zeros(2))
    memory = _InPlace(weight)
    memory.allocate((6,), dtype=torch.float32, device=weight.device)  # and an exception
    one = memory.allocate((6,), dtype=torch.float32, device=weight.device)
    assert memory.allocate((6,), dtype=torch.float32, device=weight.device) is one
    kept = memory.allocate((6,), dtype=torch.float32, device=weight.device)  # whose frames live
    assert memory.allocate((4,), dtype=torch.float32, device=weight.device).shape == (4,)
    assert kept.shape == (6,)
