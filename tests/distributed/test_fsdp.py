"""FSDP2 on two and four ranks against the plain definition on one, in float64 (to 1e-6: fp32 reduces gradients)."""

import itertools
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moda
from models import parallelize
from models.decoder import Decoder
from models.initialization import initialize
from models.one_rank import keep_gathered, reduce_in_place
from tests.distributed.ranks import run_ranks
from tests.models.plain import PlainStream, small, tokens
from training.config import OptimizerConfig
from training.optimizer import build_optimizer, clip, gradient_norm

MODA = {"depth_kv": True, "ffn_kv_proj": True, "attn_kv_proj": True}


def sharded(config, mesh=None, dtype=torch.float64, compute_dtype=torch.float64, **options):
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = parallelize.parallelize(model, mesh, compute_dtype=compute_dtype, **options)
    initialize(model, seed=1)
    return model


def expected_gradients(config, batches):
    """Of the mean loss over all batches, by the definition, unsharded."""
    model = Decoder(config).double()
    initialize(model, seed=1)
    original, moda.DepthStream = moda.DepthStream, PlainStream
    try:
        (sum(sum(model(*batch)) for batch in batches) / len(batches)).backward()
    finally:
        moda.DepthStream = original
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def check_gradients():
    kinds = itertools.product(("none", "full"), (True, False))
    alone = [{"activation_checkpointing": kind, "reshard_after_forward": reshard} for kind, reshard in kinds]
    compiled = [{"activation_checkpointing": kind, "compile_backend": "aot_eager"} for kind in ("none", "selective")]
    replicated = [{"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))}]
    for fields, options in (
        *itertools.product(({}, MODA), alone),
        *((MODA, options) for options in compiled + replicated),
    ):
        check_gradients_of(small(**fields), options)
    parallelize.UNIT_BLOCKS = 2
    check_gradients_of(small(**MODA, num_layers=6), {"reshard_after_forward": False})


def check_gradients_of(config, options):
    rank = torch.distributed.get_rank()
    batches = [tokens(batch=1, seed=seed) for seed in range(2 * torch.distributed.get_world_size())]
    model = sharded(config, **options)
    torch._dynamo.utils.counters.clear()
    for index, batch in enumerate(batches[2 * rank : 2 * rank + 2]):  # two micro-batches a rank
        model.set_requires_gradient_sync(index == 1)
        model.set_reshard_after_backward(index == 1 or options.get("reshard_after_forward", True))
        loss = sum(model(*batch)) / 2
        with torch.no_grad():  # an evaluation between forward and backward, and between micro-batches
            model(tokens(seed=9)[0])
        loss.backward()
    if "compile_backend" in options:  # two regions of two kinds of layers, with and without gradients
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 8
    for name, want in expected_gradients(config, batches).items():
        parameter = model.get_parameter(name)
        assert isinstance(parameter, DTensor)
        got = parameter.grad.full_tensor()
        error = (got - want).norm() / want.norm().clamp_min(1e-6)
        assert error < 1e-6, f"{config} {options} {name}: {error:.1e}"


def test_gradients_equal_the_definition_with_checkpointing_compilation_replication_and_accumulation():
    run_ranks(check_gradients, 2)


def check_gradients_of_replicated_shards():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for reshard in (True, False):
        check_gradients_of(small(**MODA), {"mesh": mesh, "reshard_after_forward": reshard})


def test_gradients_of_two_copies_in_two_shards_each_equal_the_definition():
    run_ranks(check_gradients_of_replicated_shards, 4)


def check_norms_of_replicas():
    """Groups that add up in another order get other last bits: these are made to differ here."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(small(**MODA), mesh, torch.float32, torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig())
    sum(model(*tokens(batch=1))).backward()
    whole = gradient_norm(optimizer)
    rank = torch.distributed.get_rank()
    for weight in optimizer.param_groups[0]["params"]:
        if weight.grad is not None:
            weight.grad.to_local().mul_(1.0 + 1e-3 * (rank // 2))
    norms = [torch.empty_like(whole) for _ in range(4)]
    torch.distributed.all_gather(norms, gradient_norm(optimizer))
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    assert norms[0] > whole * 1.0001


def test_all_ranks_decide_by_the_same_norm():
    run_ranks(check_norms_of_replicas, 4)


def steps(mesh, reduces_in_place, keeps):
    """Three steps as in training: fp32 weights, bf16 compute, two micro-batches a rank. Losses, gradients, weights."""
    parallelize.reduce_in_place = reduce_in_place if reduces_in_place else lambda model: None
    model = sharded(small(**MODA), mesh, torch.float32, torch.bfloat16, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    if keeps:
        keep_gathered(model, optimizer)
    found = []
    for step in range(3):
        for index in range(2):
            model.set_requires_gradient_sync(index == 1)
            loss = sum(model(*tokens(batch=1, seed=4 * step + 2 * torch.distributed.get_rank() + index)))
            loss.backward()
            found.append(loss.detach())
        gathered = not any(isinstance(weight, DTensor) for weight in model.parameters())
        assert gathered == (keeps and mesh.shape[-1] == 1)
        found += [p.grad.to_local().clone() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return found + [weight.to_local() for weight in model.state_dict().values()]


def check_bits(shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    expected = steps(mesh, False, False)
    for reduces_in_place, keeps in ((True, False), (False, True), (True, True)):
        for got, want in zip(steps(mesh, reduces_in_place, keeps), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(2, 1), (2,), (1, 2)])
def test_what_is_left_out_for_whole_copies_changes_no_bit_and_for_parts_of_the_model_nothing_is(shape):
    run_ranks(check_bits, 2, shape)


def check_clipping():
    stepped = []
    for limit in (0.01, 0.0):
        for own in (True, False):
            model = sharded(small(**MODA), dtype=torch.float32, compute_dtype=torch.float32)
            optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, eps=1e-3))
            sum(model(*tokens(batch=1, seed=torch.distributed.get_rank()))).backward()
            norm = gradient_norm(optimizer)
            if own:
                clip(optimizer, norm, limit)
            else:
                total = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
                torch.testing.assert_close(total.full_tensor(), norm)
            assert norm > 1
            optimizer.found_inf = torch.tensor(0.0)  # as in training: the kernel is given both
            optimizer.step()
            stepped.append([weight.to_local().detach() for weight in model.parameters()])
    clipped, expected, free, expected_free = stepped
    torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(free, expected_free, rtol=0, atol=0)
    assert not any(map(torch.equal, clipped, free))


def test_clipping_on_two_ranks_is_that_of_clip_grad_norm():
    run_ranks(check_clipping, 2)


def check_weights():
    config = small(**MODA)
    plain, model = Decoder(config).double(), sharded(config)
    initialize(plain, seed=1)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).full_tensor()), name


def test_initial_weights_do_not_depend_on_the_number_of_ranks():
    run_ranks(check_weights, 2)
