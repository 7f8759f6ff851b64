"""The depth kernels on a GPU against `moda.reference` in float64, in every dtype; run again, the same bits."""

import pytest
import torch

pytest.importorskip("triton")

from moda import kernels
from moda.kernels import depth
from moda.kernels.depth import Configuration
from tests.moda.kernel_cases import Case, backward_query, backward_slots, forward

# Relative norms: the rounding of the outputs and, in products of low precision, of p and ds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}

# batch, time, kv_heads, group, head_dim, slots
SHAPES = [
    (1, 1, 1, 1, 64, 1),
    (2, 65, 3, 2, 64, 72),
    (1, 1000, 2, 3, 96, 7),
    (4, 127, 2, 8, 128, 33),
    (1, 63, 2, 4, 32, 256),
    (1, 130, 1, 16, 48, 36),
    (2, 64, 2, 32, 64, 65),
]
CONFIGS = {"vector": Configuration(0, 8, 2, 3), "tensor": Configuration(1, 32, 2, 2)}
ROWS = {rows: Configuration(1, 16, rows, 2, rows=rows) for rows in (2, 4, 8)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_equals_the_reference(shape, dtype):
    case = Case(shape, dtype, "cuda", readers=5)
    case.check("o lse", *forward(case), TOLERANCE[dtype])
    case.check("dq", *backward_query(case), TOLERANCE[dtype])
    case.check("dq delta dk dv", *backward_query(case, everything=True), TOLERANCE[dtype])
    case.check("dk dv", *backward_slots(case, 1, 5), TOLERANCE[dtype])
    case.check("dk dv", *backward_slots(case, 0, 5, blocked=True), TOLERANCE[dtype])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_both_ways_of_a_kernel_serve_every_shape(shape, config):
    case = Case(shape, torch.bfloat16, "cuda", readers=3)
    case.check("o lse", *forward(case, CONFIGS[config]), 5e-3)
    case.check("dq delta dk dv", *backward_query(case, CONFIGS[config], everything=True), 5e-3)
    case.check("dk dv", *backward_slots(case, 0, 3, CONFIGS[config], blocked=True), 5e-3)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_several_rows_a_program_serve_every_shape(shape, rows):
    case = Case(shape, torch.bfloat16, "cuda")
    case.check("dq", *backward_query(case, ROWS[rows]), 5e-3)
    case.check("dq delta dk dv", *backward_query(case, ROWS[rows], everything=True), 5e-3)


@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("extreme", [{"spread": 30.0}, {"dominant": 50.0}, {"spread": 0.0}], ids=str)
def test_extreme_logits(extreme, group):
    case = Case((1, 66, 2, group, 64, 17), torch.bfloat16, "cuda", readers=2, **extreme)
    case.check("o lse", *forward(case), 5e-3)
    case.check("dq delta dk dv", *backward_query(case, everything=True), 5e-3)
    case.check("dk dv", *backward_slots(case, 0, 2), 5e-3)


@pytest.mark.parametrize("group", [2, 8])
def test_same_bits_from_the_same_inputs(group):
    def run():
        case = Case((2, 333, 2, group, 64, 72), torch.bfloat16, "cuda", readers=7)
        results = [forward(case), backward_query(case, everything=True), backward_slots(case, 0, 7, blocked=True)]
        return [t for got, _ in results for t in got]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_buffers_of_more_than_two_to_the_31_elements():
    """Depth attention is of one token alone: the last tokens of a huge problem are a small problem of their own."""
    if torch.cuda.mem_get_info()[0] < 45 << 30:
        pytest.skip("needs 45 GiB of free GPU memory")
    time, tail, layers, kv_heads, group, head_dim = 65536 + 3, 40, 66, 8, 2, 64
    torch.manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    keys, values = (random(layers, 1, time, kv_heads, head_dim) for _ in range(2))
    assert keys.numel() > 2**31
    q, do, o, dq = (random(1, time, kv_heads * group, head_dim) for _ in range(4))
    lse, delta = (torch.randn(2, 1, time, kv_heads * group, device="cuda") + 5 for _ in range(2))
    dk, dv = torch.empty_like(keys), torch.empty_like(values)

    def last(tensor, axis):
        return tensor.narrow(axis, time - tail, tail).clone(memory_format=torch.contiguous_format)

    def addresses(*readers):
        return torch.tensor([[q.data_ptr(), do.data_ptr()] for q, do in readers], device="cuda")

    small_keys, small_values, small_lse, small_delta, small_dk, small_dv = (
        last(t, 2) for t in (keys, values, lse, delta, dk, dv)
    )
    small_q, small_do, small_o, small_dq = (last(t, 1) for t in (q, do, o, dq))
    depth.depth_forward(q, keys, values, o, lse[0], 0.125)
    depth.depth_forward(small_q, small_keys, small_values, small_o, small_lse[0], 0.125)
    assert torch.equal(last(o, 1), small_o)
    depth.depth_backward_query(do, q, keys, values, lse[0], delta[0], dq, 0.125, dk=dk, dv=dv)
    depth.depth_backward_query(
        small_do,
        small_q,
        small_keys,
        small_values,
        small_lse[0],
        small_delta[0],
        small_dq,
        0.125,
        dk=small_dk,
        dv=small_dv,
    )
    assert torch.equal(last(dq, 1), small_dq)
    assert torch.equal(last(dk, 2), small_dk)
    # Two readers, the second with the roles of q and do exchanged; two slots, at the end of the storage.
    readers, small_readers = addresses((q, do), (do, q)), addresses((small_q, small_do), (small_do, small_q))
    depth.depth_backward_slots(readers, lse, delta, 0, 2, keys[-2:], values[-2:], dk[-2:], dv[-2:], 0.125)
    some = [t[-2:] for t in (small_keys, small_values, small_dk, small_dv)]
    depth.depth_backward_slots(small_readers, small_lse, small_delta, 0, 2, *some, 0.125)
    assert torch.equal(last(dk[-2:], 2), some[2])
    assert torch.equal(last(dv[-2:], 2), some[3])


def test_available_on_a_gpu():
    assert kernels.available("cuda")
