"""The menu of sequence kernels: which kernel a call takes, and the adapters to optional packages against the reference.

The packages themselves need a GPU. Here stand-ins with their signatures and layouts are found, imported and called.
"""

import itertools
import json
import sys
import warnings

import pytest
import torch

from moda import packages, reference, sequence, sequence_kernels, tuning
from moda.sequence import Line, first_usable, order, read_table
from moda.sequence_kernels import MENU, Call, FlashAttention2, FlashAttention4, SequenceKernel

CALL = Call(90, torch.bfloat16, 64, 2, 4096, 4096, False, False)


def line(forward, backward=None, **shape):
    shape = {
        "architecture": 90,
        "dtype": "bfloat16",
        "documents": False,
        "head_dim": 64,
        "group": 2,
        "time": 4096,
    } | shape
    return Line(**shape, forward=forward, backward=forward if backward is None else backward)


def first(call, lines, kind="forward"):
    return order(call, kind, lines)[0]


@pytest.fixture
def forget_choices():
    """Choices and found packages are kept for the life of the process: not beyond these tests."""

    def forget():
        sequence._choice.cache_clear()
        packages._loaded.cache_clear()
        packages._function.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]

    forget()
    yield
    forget()


# --- the table


def test_an_architecture_without_lines_takes_the_order_of_the_menu():
    lines = [line({"flash_attn_4": 1.0, "cudnn": 2.0}, architecture=100)]
    assert order(CALL, "forward", lines) == list(MENU)
    assert order(CALL, "backward", []) == list(MENU)


def test_kernels_come_in_the_order_of_their_times_and_unmeasured_ones_after_them():
    lines = [line({"cudnn": 3.0, "flash_attn_4": 1.0})]
    assert order(CALL, "forward", lines) == ["flash_attn_4", "cudnn", "flash", "flash_attn_2"]


def test_forward_and_backward_are_ordered_apart():
    lines = [line({"cudnn": 1.0, "flash_attn_4": 2.0}, {"cudnn": 2.0, "flash_attn_4": 1.0})]
    assert first(CALL, lines) == "cudnn"
    assert first(CALL, lines, "backward") == "flash_attn_4"


@pytest.mark.parametrize(
    ("time", "expected"),
    [(1, "cudnn"), (512, "cudnn"), (513, "flash"), (4096, "flash"), (4097, "flash_attn_4"), (10**6, "flash_attn_4")],
)
def test_a_time_takes_the_next_larger_line_or_the_largest(time, expected):
    fastest = {512: "cudnn", 4096: "flash", 32768: "flash_attn_4"}
    lines = [line({name: 1.0}, time=t) for t, name in fastest.items()]
    assert first(CALL._replace(time=time), lines) == expected


def test_head_dims_and_groups_take_the_next_larger_line_or_the_largest():
    fastest = {(64, 1): "cudnn", (64, 8): "flash", (128, 1): "flash_attn_2", (128, 8): "flash_attn_4"}
    lines = [line({name: 1.0}, head_dim=d, group=g) for (d, g), name in fastest.items()]
    for head_dim, group, expected in [
        (48, 1, "cudnn"),
        (64, 3, "flash"),
        (80, 1, "flash_attn_2"),
        (96, 64, "flash_attn_4"),
    ]:
        assert first(CALL._replace(head_dim=head_dim, group=group), lines) == expected


def test_fp16_takes_the_lines_of_bf16_unless_it_has_its_own():
    half = CALL._replace(dtype=torch.float16)
    lines = [line({"flash": 1.0})]
    assert first(half, lines) == "flash"
    assert first(half, [*lines, line({"flash_attn_4": 1.0}, dtype="float16")]) == "flash_attn_4"


def test_documents_have_lines_of_their_own():
    lines = [line({"cudnn": 1.0}), line({"flash_attn_4": 1.0, "flash": 2.0}, documents=True)]
    assert first(CALL, lines) == "cudnn"
    assert first(CALL._replace(documents=True), lines) == "flash_attn_4"


def test_the_committed_table_is_whole():
    lines = read_table(sequence.TABLE)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in tuning.DTYPES]
    grid = itertools.product([90], dtypes, [False, True], tuning.HEAD_DIMS, tuning.GROUPS, tuning.TIMES)
    assert [entry[:6] for entry in lines] == list(grid)
    for entry in lines:
        assert entry.forward.keys() == entry.backward.keys()
        assert entry.forward
        assert all(ms > 0 for ms in [*entry.forward.values(), *entry.backward.values()])
        assert f"sm{entry.architecture}" in json.loads(sequence.TABLE.read_text())["about"]


@pytest.mark.parametrize("broken", [{"forward": {"unheard_of": 1.0}}, {"surprise": 1}])
def test_a_table_with_unknown_names_is_refused(tmp_path, broken):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"about": {}, "lines": [line({})._asdict() | broken]}))
    with pytest.raises(ValueError, match="--tune"):
        read_table(path)


def test_a_written_table_reads_back_and_keeps_other_architectures(tmp_path):
    path = tmp_path / "table.json"
    old, other, new = line({"flash": 9.0}), line({"flash": 1.0}, architecture=80), line({"cudnn": 0.5}, time=512)
    tuning.write_table({"about": {"sm80": 1, "sm90": 1}, "lines": [old._asdict(), other._asdict()]}, path)
    tuning.write_table({"about": {"sm90": 2}, "lines": [new._asdict()]}, path)
    assert read_table(path) == [other, new]
    assert json.loads(path.read_text())["about"] == {"sm80": 1, "sm90": 2}


# --- which kernel can take a call


@pytest.mark.parametrize(
    ("changes", "cudnn", "flash"),
    [
        ({}, None, None),
        ({"dtype": torch.float16, "head_dim": 128, "group": 1, "time": 128, "key_time": 128}, None, None),
        ({"time": 4095, "key_time": 4095}, "multiple of 128, not 4095", None),
        ({"documents": True}, "document", None),
        ({"time": 1}, "multiple of 128", None),
        ({"time": 128}, "as many queries as keys, not 128 and 4096", None),
        ({"deterministic": True}, "deterministic", None),
        ({"dtype": torch.float32}, "bf16 or fp16, not torch.float32", "bf16 or fp16, not torch.float32"),
        ({"head_dim": 136}, "up to 128, not 136", "up to 128, not 136"),
        ({"head_dim": 60}, "multiple of 8", "multiple of 8"),
        ({"architecture": 75}, "8.0 or later", "8.0 or later"),
        ({"architecture": 0}, "NVIDIA GPU", "NVIDIA GPU"),
    ],
    ids=str,
)
def test_kernels_of_pytorch_say_which_calls_they_cannot_take(monkeypatch, changes, cudnn, flash):
    monkeypatch.setattr(sequence_kernels, "_without_cudnn", lambda: None)
    for name, words in (("cudnn", cudnn), ("flash", flash)):
        reason = MENU[name].unusable(CALL._replace(**changes))
        assert reason is None if words is None else words in reason


def test_an_old_or_absent_cudnn_is_a_reason(monkeypatch):
    for version in (None, 90400):
        sequence_kernels._without_cudnn.cache_clear()
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda version=version: version is not None)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        assert "9.5.1" in MENU["cudnn"].unusable(CALL)
    sequence_kernels._without_cudnn.cache_clear()


def test_packages_that_are_not_there_are_passed_over(monkeypatch, forget_choices):
    monkeypatch.setattr(sequence_kernels, "_without_cudnn", lambda: None)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    kernel, reason = first_usable(CALL, ["flash_attn_4", "flash_attn_2", "cudnn", "flash"], MENU)
    assert kernel is MENU["cudnn"]
    assert reason is None
    kernel, _ = first_usable(
        CALL._replace(deterministic=True), ["flash_attn_4", "flash_attn_2", "cudnn", "flash"], MENU
    )
    assert kernel is MENU["flash"]


def test_where_no_kernel_is_left_every_reason_is_given():
    kernel, reason = first_usable(CALL._replace(architecture=70), ["cudnn", "flash"], MENU)
    assert kernel is None
    assert reason.startswith("cudnn: it needs")
    assert "; flash: it needs" in reason
    q = torch.zeros(1, 4, 2, 64)
    assert "NVIDIA GPU" in sequence.unusable(q, q, None)
    with pytest.raises(ValueError, match=r"No sequence kernel .* NVIDIA GPU"):
        sequence.forward(q, q, q, 1.0, None)


# --- packages


# The signatures of flash-attn-4 4.0.0b14 and flash-attn 2.8, as far as they matter, over the reference.
STAND_INS = '''
import torch
from moda import reference

def attend(q, k, v, ends, scale):
    """Rows [batch, time, ...] with lse [batch, heads, time], or tokens [tokens, ...] with lse [heads, tokens]."""
    assert ends is None or ends.dtype == torch.int32 and ends.is_contiguous() and q.dim() == 3
    rows = [x if ends is None else x[None] for x in (q, k, v)]
    o, lse = reference.sequence_forward(*rows, scale, ends)
    lse = lse.transpose(1, 2).contiguous()
    return (o.contiguous(), lse) if ends is None else (o[0].contiguous(), lse[0])

def differentiate(do, q, k, v, o, lse, ends, scale):
    assert o.is_contiguous() and do.is_contiguous() and lse.is_contiguous()
    assert lse.shape == ((q.shape[0], q.shape[2], q.shape[1]) if ends is None else (q.shape[1], q.shape[0]))
    do, q, k, v, o, lse = (x if ends is None else x[None] for x in (do, q, k, v, o, lse))
    gradients = reference.sequence_backward(do, q, k, v, lse.transpose(1, 2), (do * o).sum(-1), scale, ends)
    return gradients if ends is None else [x[0] for x in gradients]
'''
FLASH_ATTN_4 = """
def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, max_seqlen_q=None,
                    max_seqlen_k=None, softmax_scale=None, causal=False, return_lse=False, out=None, lse=None):
    assert causal and return_lse and cu_seqlens_q is cu_seqlens_k
    return attend(q, k, v, cu_seqlens_q, softmax_scale)

def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None,
                    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None):
    assert causal and cu_seqlens_q is cu_seqlens_k
    return differentiate(dout, q, k, v, out, lse, cu_seqlens_q, softmax_scale)
"""
# Custom operators there: made of a function, and called by position.
FLASH_ATTN_2 = """
class custom_op:
    def __init__(self, function):
        self._init_fn = function

    def __call__(self, *arguments):
        return self._init_fn(*arguments)

@custom_op
def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                        alibi_slopes, return_softmax):
    assert causal and dropout_p == softcap == 0 and window_size_left == window_size_right == -1
    return *attend(q, k, v, None, softmax_scale), None, None

@custom_op
def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                               softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                               alibi_slopes=None, return_softmax=False, block_table=None):
    assert causal and cu_seqlens_q is cu_seqlens_k
    return *attend(q, k, v, cu_seqlens_q, softmax_scale), None, None

@custom_op
def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                         window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
    for given, gradient in zip((dq, dk, dv), differentiate(dout, q, k, v, out, softmax_lse, None, softmax_scale)):
        given.copy_(gradient)

@custom_op
def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                                window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
    gradients = differentiate(dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale)
    for given, gradient in zip((dq, dk, dv), gradients):
        given.copy_(gradient)
"""


def install(monkeypatch, folder, name, code):
    """Puts a module of the package flash_attn on the path of imports."""
    path = folder.joinpath("flash_attn", *name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(
    params=[
        (FlashAttention4(), "cute.interface", FLASH_ATTN_4),
        (FlashAttention2(), "flash_attn_interface", FLASH_ATTN_2),
    ],
    ids=["flash_attn_4", "flash_attn_2"],
)
def packaged(request, monkeypatch, tmp_path, forget_choices):
    """An adapter whose package has a stand-in."""
    kernel, name, code = request.param
    install(monkeypatch, tmp_path, name, STAND_INS + code)
    return kernel


def problem(batch=2, time=9, slots=3):
    """q, k, v, do and slots in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    token = (batch, time, 2, 8)
    return (
        random(batch, time, 4, 8),
        random(*token),
        random(*token),
        random(batch, time, 4, 8),
        (
            random(slots, *token),
            random(slots, *token),
        ),
    )


@pytest.mark.parametrize("cu_seqlens", [None, [0, 18], [0, 1, 1, 4, 15, 18]], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_an_adapter_gives_exact_gradients_of_a_joint_softmax(packaged, batch, cu_seqlens):
    q, k, v, do, slots = problem(batch, 18 // batch)
    documents = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    assert packaged.unusable(CALL) is None
    o, lse = packaged.forward(q, k, v, 0.3, documents)
    assert o.is_contiguous()
    assert lse.transpose(1, 2).is_contiguous()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference.definition(*inputs, *slots, scale=0.3, cu_seqlens=documents)
    want = torch.autograd.grad(expected, inputs, do)
    with torch.no_grad():
        joint, joint_lse = reference.depth_forward(q, *slots, o, lse, 0.3)
        torch.testing.assert_close((joint, joint_lse), (expected, expected_lse))
        joint_lse = joint_lse.transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv = packaged.backward(do, q, k, v, joint.contiguous(), joint_lse, 0.3, documents)
        delta = (do * joint).sum(-1)
        dq = dq + reference.depth_backward_query(do, q, *slots, joint_lse, delta, 0.3)
    torch.testing.assert_close((dq, dk, dv), want)


def test_a_package_of_another_interface_is_not_used_and_says_so_once(monkeypatch, tmp_path, forget_choices):
    install(monkeypatch, tmp_path, "cute.interface", "def _flash_attn_fwd(q, k, v, mask): ...\n_flash_attn_bwd = print")
    with pytest.warns(UserWarning, match=r"_flash_attn_fwd does not take the parameters \(q, k, v, cu_seqlens_q"):
        reason = MENU["flash_attn_4"].unusable(CALL)
    assert "does not take" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MENU["flash_attn_4"].unusable(CALL) == reason


def test_a_package_that_cannot_be_imported_is_not_used(monkeypatch, tmp_path, forget_choices):
    install(monkeypatch, tmp_path, "cute.interface", "raise OSError('libcutlass is missing')")
    with pytest.warns(UserWarning, match="installed and not used"):
        assert "libcutlass is missing" in MENU["flash_attn_4"].unusable(CALL)


def test_a_package_is_not_imported_for_a_call_that_it_cannot_take(monkeypatch, tmp_path, forget_choices):
    install(monkeypatch, tmp_path, "cute.interface", "raise OSError")
    assert "9.0 or later" in MENU["flash_attn_4"].unusable(CALL._replace(architecture=80))
    assert first_usable(CALL, ["flash", "flash_attn_4"], MENU)[0] is MENU["flash"]


# --- forward and backward by the chosen kernels


class OnAnyDevice(SequenceKernel):
    """The reference as a kernel of the menu."""

    oldest = 0

    def __init__(self, name, **rules):
        self.name, self.calls = name, []
        for rule, value in rules.items():
            setattr(self, rule, value)

    def forward(self, q, k, v, scale, cu_seqlens):
        self.calls.append(("forward", cu_seqlens))
        assert all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
        o, lse = reference.sequence_forward(q, k, v, scale, cu_seqlens)
        return o.contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2)

    def backward(self, do, q, k, v, o, lse, scale, cu_seqlens):
        self.calls.append(("backward", cu_seqlens))
        assert do.is_contiguous()
        return reference.sequence_backward(do, q, k, v, lse, (do.float() * o).sum(-1), scale, cu_seqlens)


@pytest.fixture
def menu(monkeypatch, forget_choices):
    kernels = {"cudnn": OnAnyDevice("cudnn"), "flash_attn_4": OnAnyDevice("flash_attn_4", deterministic=False)}
    monkeypatch.setattr(sequence, "MENU", kernels)
    times = line({"cudnn": 1.0, "flash_attn_4": 2.0}, {"cudnn": 2.0, "flash_attn_4": 1.0}, architecture=0)
    monkeypatch.setattr(sequence, "_lines", lambda: [times])
    return kernels


def half_problem(time):
    q, k, v, do, _ = problem(1, time)
    return [x.bfloat16() for x in (q, k, v, do)]


def run(q, k, v, do, cu_seqlens=None):
    o, lse = sequence.forward(q, k, v, 0.3, cu_seqlens)
    return o, lse, *sequence.backward(do, q, k, v, o, lse, 0.3, cu_seqlens)


def test_forward_and_backward_go_to_the_fastest_of_each(menu):
    q, k, v, do = half_problem(16)
    assert sequence.choose(q, k, None, "forward") is menu["cudnn"]
    o, _, dq, _, _ = run(q, k, v, do)
    assert [name for name, kernel in menu.items() for _ in kernel.calls] == ["cudnn", "flash_attn_4"]
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference.definition(*inputs, scale=0.3)
    torch.testing.assert_close(o.double(), expected, rtol=1e-2, atol=1e-2)
    want = torch.autograd.grad(expected, inputs, do.double())[0]
    torch.testing.assert_close(dq.double(), want, rtol=1e-2, atol=1e-2)
    assert dq.is_contiguous()


def test_deterministic_algorithms_change_the_choice(menu):
    q, k, v, do = half_problem(16)
    run(q, k, v, do)
    torch.use_deterministic_algorithms(True)
    try:
        run(q, k, v, do)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [kind for kind, _ in menu["cudnn"].calls] == ["forward", "forward", "backward"]


def test_a_row_of_one_token_needs_no_document_mask(menu):
    menu["cudnn"].documents = False
    run(*half_problem(1), torch.tensor([0, 1]))
    assert menu["cudnn"].calls == [("forward", None)]


@pytest.mark.parametrize("kind", ["transposed", "offset", "expanded", "cut"])
def test_inputs_that_kernels_cannot_read_are_copied_and_others_are_not(menu, kind):
    q, k, v, do = half_problem(16)
    inner = torch.randn(1, 16, 3, 12, dtype=torch.bfloat16)
    awkward = {
        "transposed": k.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": torch.cat((k.new_zeros(1), k.flatten()))[1:].view(k.shape),
        "expanded": k[:, :, :1].expand(k.shape),
        "cut": inner[:, :, :2, :8],
    }[kind]
    assert sequence._aligned(awkward).data_ptr() != awkward.data_ptr()
    got, want = run(q, awkward, v, do), run(q, awkward.clone(memory_format=torch.contiguous_format), v, do)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    fused = torch.randn(1, 16, 8, 8, dtype=torch.bfloat16)
    assert all(sequence._aligned(x) is x for x in fused.split((4, 2, 2), 2))


# --- the tuner


def test_tuning_needs_a_gpu():
    with pytest.raises(RuntimeError, match="CUDA device, and cpu is none"):
        tuning.tune("cpu")


def test_a_line_has_the_times_of_the_kernels_fastest_first_and_tells_what_fails(menu):
    measured = iter([3.0, 1.0, 2.0, 4.0])
    case = tuning.Problem("cpu", torch.float16, 8, 2, 32, documents=True, tokens=64)
    menu["flash"], menu["flash_attn_2"] = OnAnyDevice("flash", oldest=80), OnAnyDevice("flash_attn_2")
    menu["flash_attn_2"].forward = lambda *arguments: 1 / 0
    failures = []
    got = case.measure(menu, failures, lambda run: (run(), next(measured))[1])
    times = {"flash_attn_4": 2.0, "cudnn": 3.0}, {"cudnn": 1.0, "flash_attn_4": 4.0}
    assert got == Line(0, "float16", True, 8, 2, 32, *times)
    assert list(got.forward) == ["flash_attn_4", "cudnn"]
    assert set(menu) == {"cudnn", "flash_attn_4", "flash"}
    assert len(failures) == 1
    assert "flash_attn_2 is left out" in failures[0]
    assert "ZeroDivisionError" in failures[0]


def test_documents_of_a_problem_cover_its_tokens_at_uneven_places():
    ends = tuning.Problem("cpu", torch.bfloat16, 8, 2, 700, documents=True, tokens=7000).cu_seqlens
    assert ends[0] == 0
    assert ends[-1] == 7000
    assert len(ends) == 12
    assert len(ends.diff().unique()) > 5


def test_the_summary_names_the_fastest_of_every_shape():
    lines = [line({"cudnn": 1.0}, {"flash": 1.0}, time=512), line({"cudnn": 2.0, "flash": 1.0}, time=1024)]
    text = tuning.summary({"lines": [entry._asdict() for entry in lines]})
    assert "| bfloat16 | 64 | 2 | False | cudnn / flash | flash / flash |" in text
