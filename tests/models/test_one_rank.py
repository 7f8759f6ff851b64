"""What is left out on one rank changes no bit: gradients are reduced in place, weights stay gathered."""

import collections

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import models.parallelize
from models.decoder import Decoder
from models.initialization import initialize
from models.one_rank import _InPlace, keep_gathered
from models.parallelize import parallelize, units
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
    assert len(reductions.inputs) == (len(units(model, False)) + 1) * (micro_batches if sync else 1)
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


class Operations(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))


def optimized(mesh, keep, compute_dtype=torch.bfloat16):
    model = built(mesh, compute_dtype=compute_dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    if keep:
        keep_gathered(model, optimizer)
    return model, optimizer


def evaluated(model):
    with torch.no_grad():
        return sum(model(*tokens(seed=9)))


def step(model, optimizer, index, *, skip=False, before=lambda: None):
    """Two micro-batches, an evaluation between them. Returns the losses."""
    losses = []
    for micro_batch in range(2):
        model.set_requires_gradient_sync(micro_batch == 1)
        losses.append(sum(model(*tokens(seed=2 * index + micro_batch))))
        losses[-1].backward()
        if micro_batch == 0:  # after the last, FSDP2 by itself would leave weights from before the step
            losses.append(evaluated(model))
    before()
    optimizer.found_inf = torch.tensor(float(skip))
    optimizer.step()
    optimizer.zero_grad()
    return [loss.detach() for loss in losses]


def gathered(model):
    return [not isinstance(weight, DTensor) for weight in model.parameters()]


def run(model, optimizer):
    """Losses and weights of steps between which all happens that a run does to weights."""
    losses = [evaluated(model)]
    saved = {}
    for index in range(8):
        begins_a_checkpoint = model.state_dict if index == 2 else lambda: None
        losses += step(model, optimizer, index, skip=index == 4, before=begins_a_checkpoint)
        if index in (0, 3, 6):
            losses.append(evaluated(model))
        if index == 3:
            saved = {name: weight.to_local().clone() for name, weight in model.state_dict().items()}
        if index == 5:
            losses.append(evaluated(model))
            with torch.no_grad():
                for name, weight in model.state_dict().items():  # as a checkpoint is loaded: in place
                    weight.to_local().copy_(saved[name])
            losses.append(evaluated(model))
    return losses, {name: weight.to_local() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
def test_steps_on_weights_that_stay_gathered_have_every_bit_of_those_that_gather_each_time(compute_dtype, mesh):
    losses, weights = run(*optimized(mesh, True, compute_dtype))
    expected, expected_weights = run(*optimized(mesh, False, compute_dtype))
    assert [float(loss) for loss in losses] == [float(loss) for loss in expected]
    assert len({float(loss) for loss in losses}) > 20, "a stale weight must show"
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name


def test_weights_stay_gathered_from_step_to_step_but_for_a_checkpoint(mesh):
    model, optimizer = optimized(mesh, True)
    for index in range(3):
        step(model, optimizer, index)
        assert all(gathered(model))
    model.state_dict()
    assert not any(gathered(model))
    step(model, optimizer, 3, before=model.state_dict)
    assert not any(gathered(model))
    step(model, optimizer, 4)
    assert all(gathered(model))


def test_a_step_writes_all_gathered_weights_in_one_operation_and_casts_none_apart(mesh):
    calls = {}
    for keep in (True, False):
        model, optimizer = optimized(mesh, keep)
        step(model, optimizer, 0)
        with Operations() as operations:
            step(model, optimizer, 1)
        calls[keep] = operations.calls
    aten, weights = torch.ops.aten, sum(1 for _ in model.parameters())
    assert calls[True][aten._foreach_copy_.default] == 1
    assert calls[False][aten._foreach_copy_.default] == 0
    for operator in (aten._to_copy.default, aten.copy_.default):  # gathered for each of two micro-batches
        assert calls[False][operator] - calls[True][operator] == 2 * weights
