"""`moda.attention` against the definition in float64: outputs, log-sum-exp and all five gradients, to 1e-12."""

import contextlib
import itertools
import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch

import moda
from moda import backends, joined, reference

ROOT = Path(__file__).resolve().parents[2]


def random_case(batch, time, kv_heads, group, head_dim, slots, dtype=torch.float64, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    token_shapes = [(batch, time, kv_heads * group, head_dim)] + [(batch, time, kv_heads, head_dim)] * 2
    shapes = token_shapes + [(slots, batch, time, kv_heads, head_dim)] * 2
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64).mul(spread).to(dtype) for s in shapes]
    return [t.requires_grad_() for t in tensors]


def gradients(out, inputs, do):
    return torch.autograd.grad(out, inputs, do, allow_unused=True)


# batch, time, kv_heads, group, head_dim, slots
SHAPES = [
    *itertools.product([1, 2], [1, 2, 65], [1, 3], [1, 4], [16], [0, 1, 7]),
    (1, 127, 2, 32, 32, 3),
    (4, 63, 1, 2, 64, 72),
    (1, reference.QUERY_CHUNK + 3, 1, 2, 16, 2),
    (2, 5, 2, 1, 128, 256),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_definition(shape):
    inputs = random_case(*shape)
    expected, expected_lse = reference.definition(*inputs)
    out, lse = moda.attention(*inputs, return_lse=True)
    do = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)
    for got, want in zip(gradients(out, inputs, do), gradients(expected, inputs, do), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("slots", [0, 5])
def test_documents_do_not_see_each_other(slots):
    inputs = random_case(2, 12, 2, 2, 16, slots)
    cu_seqlens = torch.tensor([0, 1, 2, 9, 20, 24], dtype=torch.int32)  # documents of one token; one across the row end
    expected, _ = reference.definition(*inputs, cu_seqlens=cu_seqlens)
    out = moda.attention(*inputs, cu_seqlens=cu_seqlens)
    do = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(out, inputs, do), gradients(expected, inputs, do), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    changed = [t.detach().clone() for t in inputs]
    changed[1][0, :2] += 1.0  # keys of the first two documents
    unchanged = moda.attention(*changed, cu_seqlens=cu_seqlens)
    assert torch.equal(unchanged[0, 2:], out[0, 2:])
    assert torch.equal(unchanged[1], out[1])


def test_large_logits_and_a_dominating_slot_stay_finite():
    inputs = random_case(1, 9, 1, 2, 16, 3, dtype=torch.float32, spread=30.0)
    with torch.no_grad():
        inputs[3][1] *= 100
    out = moda.attention(*inputs)
    grads = gradients(out.sum(), inputs, None)  # a gradient of stride 0
    assert all(torch.isfinite(t).all() for t in (out, *grads))


def test_joint_probabilities_sum_to_one():
    q, k, v, depth_k, depth_v = (t.detach() for t in random_case(2, 33, 2, 3, 16, 5))
    out = moda.attention(q, k, torch.ones_like(v), depth_k, torch.ones_like(depth_v))
    torch.testing.assert_close(out, torch.ones_like(out))


def test_the_scale_is_used_and_defaults_to_the_root_of_the_head_dim():
    inputs = random_case(1, 6, 1, 1, 16, 2)
    assert torch.equal(moda.attention(*inputs), moda.attention(*inputs, scale=0.25))
    expected, _ = reference.definition(*inputs, scale=0.7)
    torch.testing.assert_close(moda.attention(*inputs, scale=0.7), expected)


def test_low_precision_inputs_are_computed_in_fp32():
    inputs = random_case(1, 40, 2, 2, 32, 4, dtype=torch.bfloat16)
    wide = [t.detach().double() for t in inputs]
    out = moda.attention(*inputs)
    expected, _ = reference.definition(*wide)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 3e-3  # the rounding of the output


def test_lse_is_not_differentiable():
    out, lse = moda.attention(*random_case(1, 4, 1, 1, 16, 1), return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad
    assert lse.dtype == torch.float32


def test_second_derivatives_are_refused_instead_of_wrong():
    inputs = random_case(1, 4, 1, 1, 16, 1)
    out = moda.attention(*inputs)
    for loss in (out.square().sum(), out.sum()):  # the gradient of the second does not depend on anything
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(loss, inputs[:1], create_graph=True, retain_graph=True)


def dual(function, primals, tangents):
    with torch.autograd.forward_ad.dual_level():
        return function(*(torch.autograd.forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)))


def batched(function, primals, tangents):
    return torch.func.jvp(torch.func.vmap(function), *(tuple(x[None] for x in xs) for xs in (primals, tangents)))


@pytest.mark.parametrize("function", [moda.attention, moda.explain])
@pytest.mark.parametrize("way", [torch.func.jvp, dual, batched])
@pytest.mark.parametrize("argument", range(5))
def test_forward_mode_derivatives_are_refused_instead_of_zero(argument, way, function):
    inputs = [x.detach() for x in random_case(1, 4, 1, 1, 16, 1)]
    x = inputs[argument]

    def call(x):
        return function(*inputs[:argument], x, *inputs[argument + 1 :])

    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        way(call, (x,), (torch.ones_like(x),))


def test_forward_mode_past_attention_and_jacfwd():
    q, k, v, *_ = (x.detach() for x in random_case(1, 4, 1, 1, 16, 0))
    out = moda.attention(q, k, v)
    _, tangent = torch.func.jvp(lambda x: x * moda.attention(q, k, v), (q,), (torch.ones_like(q),))
    assert torch.equal(tangent, out)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jacfwd(lambda x: moda.attention(x, k, v))(q)


def test_compiled_attention_refuses_forward_mode_only():
    q, k, v, *_ = (x.detach() for x in random_case(1, 4, 1, 1, 16, 0))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: moda.attention(x, k, v), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), moda.attention(q, k, v))
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.compile(lambda x: torch.func.jvp(lambda y: moda.attention(y, k, v), (x,), (x,)), backend="aot_eager")(q)


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((tensor(1, 4, 2), tensor(1, 4, 2), tensor(1, 4, 2)), {}, "axes"),
        ((tensor(1, 4, 3, 8), tensor(1, 4, 2, 8), tensor(1, 4, 2, 8)), {}, "multiple of the kv heads"),
        ((tensor(1, 4, 2, 8), tensor(1, 3, 2, 8), tensor(1, 3, 2, 8)), {}, r"q \(1, 4, 2, 8\), k \(1, 3, 2, 8\)"),
        (
            (tensor(1, 4, 2, 8), *[tensor(1, 5, 2, 8)] * 2),
            {"cu_seqlens": torch.tensor([0, 5])},
            "as many queries as keys",
        ),
        ((tensor(1, 4, 2, 8), tensor(1, 4, 2, 8), tensor(1, 4, 1, 8)), {}, "one shape"),
        (
            (tensor(1, 4, 2, 8), *[tensor(1, 4, 2, 8, dtype=torch.float64)] * 2),
            {},
            r"one dtype, .*float32, torch.float64, torch.float64; q \(1, 4, 2, 8\).*: convert them with to\(\)",
        ),
        *(
            ([torch.zeros(1, 4, 2, 8, dtype=dtype)] * 3, {}, rf"one dtype, torch.bfloat16, .*got {dtype}, .*: convert")
            for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int32)
        ),
        ((tensor(1, 4, 2, 8), *[tensor(1, 4, 2, 8).to("meta")] * 2), {}, r"one device.*q \(1, 4, 2, 8\)"),
        ((*[tensor(1, 4, 2, 8)] * 3, tensor(2, 1, 4, 2, 8)), {}, "together"),
        ((*[tensor(1, 4, 2, 8)] * 3, *[tensor(2, 1, 5, 2, 8)] * 2), {}, r"depth_k \(2, 1, 5, 2, 8\)"),
        ((*[tensor(1, 4, 2, 8)] * 3, *[tensor(2, 1, 4, 2, 8, dtype=torch.float16)] * 2), {}, "dtype and device of k"),
        ([tensor(1, 4, 2, 8)] * 3, {"backend": "fast"}, "backend='fast'"),
        ([tensor(1, 4, 2, 8)] * 3, {"backend": "joined"}, "needs a CUDA device"),
        ([tensor(1, 4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 3])}, r"batch \* time = 4"),
        ([tensor(1, 4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 9, 4])}, r"batch \* time = 4, got \[0, 9, 4\]"),
        ([tensor(1, 4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0.0, 4.0])}, "integers"),
        ([tensor(1, 4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0j, 4j])}, "integers"),
        ([tensor(1, 0, 2, 8)] * 3, {}, "no axis empty"),
        ([tensor(1, 4, 2, 8)] * 3, {"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")}, "device of q"),
    ],
)
def test_arguments_that_do_not_fit_get_one_sentence(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        moda.attention(*arguments, **options)
    if "backend" not in options:
        with pytest.raises(ValueError, match=words):
            moda.explain(*arguments, **options)


@pytest.mark.parametrize("ends", [[0, 5, 15], [0, 99, 16]])
def test_compiled_attention_refuses_documents_that_do_not_fit(ends):
    torch._dynamo.reset()
    compiled = torch.compile(moda.attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"^cu_seqlens must rise from 0 to batch \* time = 16, got"):
        compiled(*[tensor(2, 8, 2, 8)] * 3, cu_seqlens=torch.tensor(ends))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": torch.tensor(0.5, requires_grad=True)}, "^scale must be a number, .* got Tensor: .* multiply q"),
        ({"scale": "a"}, "^scale must be a number, .* got str"),
        ({"scale": 1j}, "^scale must be a number, .* got complex"),
        ({"backend": None}, "^backend must be a name such as 'auto', got NoneType"),
        ({"backend": ["auto"]}, "^backend must be a name such as 'auto', got list"),
    ],
)
def test_options_of_another_type_get_one_sentence(options, words):
    q = tensor(1, 4, 2, 8)
    stream = moda.DepthStream(1, 1, 4, 2, 8, slots_per_layer=1, dtype=q.dtype, device="cpu")
    calls = [lambda: moda.attention(q, q, q, **options), lambda: stream.attend(stream.start(), 0, q, q, q, **options)]
    for call in calls:
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize(
    "scale", [1, numpy.float32(0.5), numpy.float64(0.5), numpy.int64(1), Fraction(1, 2), 10**30], ids=repr
)
def test_a_scale_is_any_real_number(scale):
    q, k, v, *slots = (x.detach() for x in random_case(1, 6, 1, 1, 16, 2))
    assert torch.equal(
        moda.attention(q, k, v, *slots, scale=scale), moda.attention(q, k, v, *slots, scale=float(scale))
    )
    stream = moda.DepthStream(2, 1, 6, 1, 16, slots_per_layer=1, dtype=q.dtype, device="cpu")
    outs = []
    for given in (scale, float(scale)):
        _, _, handle = stream.write(stream.start(), 0, 0, k, v)
        outs.append(stream.attend(handle, 1, q, k, v, scale=given)[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_changes_no_bit(dtype, backward_inside):
    def results(autocast):
        inputs = random_case(2, 65, 2, 2, 64, 7, dtype=dtype)
        with autocast:
            out, lse = moda.attention(*inputs, return_lse=True)
        with autocast if backward_inside else contextlib.nullcontext():
            return [out, lse, *torch.autograd.grad(out.square().sum(), inputs)]

    expected = results(contextlib.nullcontext())
    got = results(torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["q", "depth_k"])
def test_a_tensor_that_is_not_dense_gets_one_sentence(name):
    arguments = dict(zip(("q", "k", "v", "depth_k", "depth_v"), random_case(1, 4, 1, 1, 8, 2), strict=True))
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)
    for tensor, layout in ((arguments[name].detach().to_sparse(), "sparse_coo"), (nested, "jagged")):
        with pytest.raises(ValueError, match=rf"^{name} must be a dense tensor, got layout torch.{layout}: convert"):
            moda.attention(**arguments | {name: tensor})


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e39, -2.4e38, numpy.float32("nan")], ids=repr)
def test_a_scale_that_is_not_finite_gets_one_sentence(scale):
    q = tensor(1, 4, 2, 8)
    stream = moda.DepthStream(1, 1, 4, 2, 8, slots_per_layer=1, dtype=q.dtype, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(moda.attention, backend="aot_eager", fullgraph=True)
    calls = [
        lambda: moda.attention(q, q, q, scale=scale),
        lambda: moda.explain(q, q, q, scale=scale),
        lambda: stream.attend(stream.start(), 0, q, q, q, scale=scale),
        lambda: compiled(q, q, q, scale=float(scale)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"^scale={re.escape(str(scale))} is no finite number in fp32: use one"):
            call()


@pytest.mark.parametrize("scale", [10**400, -(10**400), Fraction(10**400)], ids=["int", "negative", "fraction"])
def test_a_scale_that_no_float_holds_gets_one_sentence(scale):
    q = torch.randn(1, 4, 1, 16)
    for function in (moda.attention, moda.explain):
        with pytest.raises(ValueError, match=r"^scale is a number that no float can hold: use one of the size"):
            function(q, q, q, scale=scale)


def test_code_compiled_for_any_scale_refuses_one_that_is_not_finite():
    torch._dynamo.reset()
    q = tensor(1, 4, 2, 8)
    compiled = torch.compile(moda.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for scale in (0.25, 0.5):
        assert torch.equal(compiled(q, q, q, scale=scale), moda.attention(q, q, q, scale=scale))
    with pytest.raises(ValueError, match=r"^scale=nan is no finite number"):
        compiled(q, q, q, scale=math.nan)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_none_for_a_sequence_gets_one_sentence(name):
    arguments = dict.fromkeys("qkv", tensor(1, 4, 2, 8)) | {name: None}
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got NoneType"):
        moda.attention(**arguments)


@pytest.mark.parametrize("name", ["q", "depth_v", "cu_seqlens"])
def test_what_is_no_tensor_gets_one_sentence(name):
    arguments = {"q": tensor(1, 4, 2, 8), "k": tensor(1, 4, 2, 8), "v": tensor(1, 4, 2, 8)}
    arguments |= {"depth_k": tensor(1, 1, 4, 2, 8), "depth_v": tensor(1, 1, 4, 2, 8), name: [0, 4]}
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got list"):
        moda.attention(**arguments)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("queries", [1, 4, 11])
def test_fewer_queries_than_keys_are_those_of_the_last_tokens(queries, slots):
    q, k, v, depth_k, depth_v = random_case(2, 11, 2, 2, 16, slots)
    expected, _ = reference.definition(q, k, v, depth_k, depth_v)
    last = [q[:, -queries:], k, v, depth_k[:, :, -queries:], depth_v[:, :, -queries:]]
    out = moda.attention(*last)
    torch.testing.assert_close(out, expected[:, -queries:], rtol=1e-12, atol=1e-12)
    do = torch.randn_like(out)
    inputs = (q, k, v, depth_k, depth_v)
    want = gradients(expected[:, -queries:], inputs, do)
    for g, w in zip(gradients(out, inputs, do), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(reference.definition(*last)[0], out, rtol=1e-12, atol=1e-12)


OPTIONS = {"slots": {}, "no slots": {}, "none": {}, "documents": {"cu_seqlens": torch.tensor([0, 3, 3, 14])}}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_operator_is_registered_as_pytorch_wants_it(case):
    q, k, v, depth_k, depth_v = random_case(2, 7, 2, 2, 16, 0 if case == "no slots" else 3, dtype=torch.float32)
    slots = (None, None) if case == "none" else (depth_k, depth_v)
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # strides that no output has
    options = 0.25, OPTIONS[case].get("cu_seqlens"), "auto"
    torch.library.opcheck(torch.ops.moda.attention, (q, k, v, *slots, *options))
    inputs = [x if x is None else x.detach() for x in (q, k, v, *slots)]
    out, lse = torch.ops.moda.attention(*inputs, *options)
    torch.library.opcheck(torch.ops.moda.attention_backward, (torch.ones_like(out), *inputs, out, lse, *options))


def test_backward_kernels_get_lse_in_their_layout_whatever_compiled_code_has_made_of_it(monkeypatch):
    q, k, v, depth_k, depth_v = (x.detach() for x in random_case(2, 7, 2, 2, 16, 3))
    options = 0.25, None, "reference"
    out, lse = torch.ops.moda.attention(q, k, v, depth_k, depth_v, *options)
    strides = []

    def joint_backward(do, q, k, v, out, lse, *rest):
        strides.append(lse.transpose(1, 2).is_contiguous())
        return original(do, q, k, v, out, lse, *rest)

    original = reference.joint_backward
    monkeypatch.setattr(reference, "joint_backward", joint_backward)
    torch.ops.moda.attention_backward(out, q, k, v, depth_k, depth_v, out, lse.contiguous(), *options)
    assert not lse.is_contiguous()
    assert strides == [True]


@pytest.mark.parametrize("case", OPTIONS)
def test_compiled_attention_has_the_values_and_gradients_of_plain_attention(case):
    inputs = random_case(2, 7, 2, 2, 16, 0 if case == "no slots" else 3)

    def layer(*inputs):
        q, *rest = inputs
        rest = rest[:2] if case == "none" else rest
        return moda.attention(2 * q.transpose(1, 2).contiguous().transpose(1, 2), *rest, **OPTIONS[case]).exp()

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out, expected = compiled(*inputs), layer(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    do = torch.randn_like(out)
    for got, want in zip(gradients(out, inputs, do), gradients(expected, inputs, do), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_explain_names_the_backend_and_why_not_another():
    q, k, v, depth_k, depth_v = random_case(1, 4, 2, 2, 16, 1)
    text = moda.explain(q, k, v, depth_k, depth_v)
    assert text.startswith("reference")
    assert "not joined: it needs a CUDA device" in text
    assert moda.explain(q, k, v, backend="reference").startswith("reference")
    with pytest.raises(ValueError, match="backend='joined' cannot take this call"):
        moda.explain(q, k, v, backend="joined")


def test_a_gpu_without_a_fast_backend_is_told_so_once(monkeypatch, recwarn):
    q, k = random_case(1, 4, 2, 2, 16, 0)[:2]
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))  # of which no backend can make use
    backends._warn_of_reference.cache_clear()
    chosen = [backends.choose_backend("auto", q, k, None) for _ in range(3)]
    assert chosen == [moda.reference] * 3
    (said,) = (str(warning.message) for warning in recwarn if "slow reference" in str(warning.message))
    assert "not joined: " in said
    assert "not fused: " in said


@pytest.mark.parametrize(
    ("heads", "head_dim", "words"),
    [(129, 16, "128 query heads a kv head, not 129"), (2, 24, "head_dim that is a multiple of 16 up to 128, not 24")],
)
def test_joined_refuses_heads_that_the_kernels_over_slots_cannot_take(monkeypatch, heads, head_dim, words):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    q = tensor(1, 4, heads, head_dim, dtype=torch.bfloat16)
    assert words in str(joined.unusable(q, q[:, :, :1], None))


def test_nothing_but_torch_is_needed():
    """Triton and every vendor's package out of reach: the package is imported, attends and streams."""
    program = """
import sys
for name in ("triton", "flash_attn", "transformers", "datasets", "wandb"):
    sys.modules[name] = None
import torch, moda
q = torch.randn(1, 5, 2, 8, requires_grad=True)
moda.attention(q, q, q, q[None], q[None]).sum().backward()
stream = moda.DepthStream(2, 1, 5, 2, 8, slots_per_layer=1, dtype=q.dtype, device="cpu")
handle, x = stream.start(), q
for layer in range(2):
    k, v, handle = stream.write(handle, layer, 0, x, x)
    x, handle = stream.attend(handle, layer, x, k, v)
stream.finish(handle, x).sum().backward()
print(moda.explain(q, q, q))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference")
