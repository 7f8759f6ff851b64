"""The fused backend on a GPU against the definition in float64, in every dtype; run again, the same bits."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton")

from moda import fused, kernels
from tests.moda.fused_cases import DOCUMENTS, EXTREMES, SHAPES, Call

# Relative norms: rounding of outputs and, in low precision, of p and ds as operands of products. dq is rounded twice
# where there are slots: after the sequence and after them.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 7e-3}
LARGE = [(1, 1000, 2, 2, 64, 72), (2, 777, 1, 8, 128, 33), (1, 515, 2, 3, 64, 256), (4, 127, 2, 32, 32, 7)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_outputs_and_gradients_equal_the_definition(shape, dtype):
    call = Call(shape, dtype, "cuda")
    call.check(call.run(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS, ids=lambda d: f"{len(d) - 1} documents")
@pytest.mark.parametrize("group", [2, 3])
def test_documents_do_not_see_each_other(documents, group, dtype):
    call = Call((2, 36, 2, group, 64, 3), dtype, "cuda", documents=documents)
    call.check(call.run(), TOLERANCE[dtype])


@pytest.mark.parametrize("group", [2, 8])
def test_documents_over_many_tiles(group):
    ends = [0, 1, 2, 130, 131, 500, 500, 900, 1500, 1501, 2100]
    call = Call((3, 700, 2, group, 64, 3), torch.bfloat16, "cuda", documents=ends)
    call.check(call.run(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("time", "key_time"), [(1, 37), (1, 1024), (70, 300), (256, 513)])
def test_queries_may_be_the_last_of_the_keys(time, key_time, dtype):
    call = Call((2, time, 2, 4, 64, 3), dtype, "cuda", key_time=key_time)
    call.check(call.run(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_extreme_scores(extreme, group, dtype):
    call = Call((1, 150, 2, group, 64, 7), dtype, "cuda", **extreme)
    call.check(call.run(), TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["projection", "heads", "gaps"])
def test_inputs_are_read_where_they_lie(layout):
    call = Call((2, 190, 2, 2, 48, 2), torch.bfloat16, "cuda", layout=layout)
    call.check(call.run(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize("group", [2, 8])
def test_layers_of_a_stream_leave_what_their_slots_pull(group, split):
    call = Call((2, 190, 2, group, 64, 9), torch.bfloat16, "cuda")
    call.check(call.run(split), TOLERANCE[torch.bfloat16])
    call.check(call.run_as_layers(split), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 512, 2, 4, 64, 0), (1, 1000, 2, 2, 128, 0)], ids=str)
def test_the_sequence_alone_is_as_exact_as_pytorchs_attention(shape, dtype):
    call = Call(shape, dtype, "cuda")
    ours = call.errors(call.run())
    inputs = [t.detach().clone().requires_grad_() for t in (call.q, call.k, call.v)]
    q, k, v = (t.transpose(1, 2) for t in inputs)
    way = SDPBackend.MATH if dtype == torch.float32 else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(way):
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=True).transpose(1, 2)
    gradients = torch.autograd.grad(o, inputs, call.do)
    for name, tensor in zip(["o", "dq", "dk", "dv"], [o, *gradients], strict=True):
        theirs = ((tensor.double() - call.want[name]).norm() / call.want[name].norm()).item()
        assert ours[name] <= 1.2 * theirs + 1e-6, f"{name}: {ours[name]:.2e}, PyTorch's {theirs:.2e}"


@pytest.mark.parametrize("group", [2, 8])
def test_same_bits_from_the_same_inputs(group):
    def run():
        return Call((2, 1333, 2, group, 64, 9), torch.bfloat16, "cuda").run()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_buffers_of_more_than_two_to_the_31_elements():
    """Documents do not see each other: the last one of a huge row is a small problem of its own."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    time, tail, slots, kv_heads, group, head_dim = (1 << 20) + 2048, 1024, 9, 4, 8, 64
    torch.manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    q, do = (random(1, time, kv_heads * group, head_dim) for _ in range(2))
    k, v = (random(1, time, kv_heads, head_dim) for _ in range(2))
    keys, values = (random(slots, 1, time, kv_heads, head_dim) for _ in range(2))
    assert q.numel() > 2**31
    assert keys.numel() > 2**31

    def run(q, do, k, v, keys, values):
        cu_seqlens = torch.arange(0, q.shape[1] + 1, tail, device="cuda")
        inputs = (q, k, v, [(keys, values)], head_dim**-0.5, cu_seqlens)
        o, lse = fused.joint_forward(*inputs)
        dq, dk, dv, [(d_keys, d_values)] = fused.joint_backward(do, *inputs[:3], o, lse, *inputs[3:])
        return [o, lse, dq, dk, dv, *d_keys, *d_values]

    def last(tensor):
        return tensor[:, -tail:].contiguous()

    huge = [last(t) for t in run(q, do, k, v, keys, values)]
    small = [last(t) for t in (q, do, k, v)] + [torch.stack([last(s) for s in t]) for t in (keys, values)]
    assert all(torch.equal(a, b) for a, b in zip(huge, run(*small), strict=True))


def test_it_takes_what_it_says_on_this_machine():
    q = torch.zeros(1, 4, 2, 64, device="cuda", dtype=torch.bfloat16)
    assert kernels.available(q.device)
    assert fused.unusable(q, q, torch.tensor([0, 4], device="cuda")) is None
    assert fused.unusable(q.float(), q.float(), None) is None
    assert fused.unusable(q[:, 1:], q, None) is None
    assert "CUDA" in str(fused.unusable(q.cpu(), q.cpu(), None))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 96, 128])
def test_every_head_dim_with_documents_and_slots_fits_the_device(head_dim, dtype):
    call = Call((1, 140, 1, 2, head_dim, 2), dtype, "cuda", documents=[0, 7, 140])
    call.check(call.run(), TOLERANCE[dtype])
