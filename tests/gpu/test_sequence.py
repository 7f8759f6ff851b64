"""Every sequence kernel of this machine against `moda.reference` in float64, given the o and lse of a joint softmax.

Optional packages are tested where they are installed; a kernel that is not there is skipped with its reason.
"""

import itertools

import pytest
import torch

import moda
from moda import reference, sequence, tuning
from moda.sequence import order
from moda.sequence_kernels import MENU, Call

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative norms; twice that for gradients
SLOTS = 5
KV_HEADS = 2


class Case:
    """Inputs in the kernel's dtype, and what the reference makes of the same values in float64.

    Of `key_time` tokens the queries are the last `time` ones.
    """

    def __init__(self, batch, time, group, head_dim, dtype=torch.bfloat16, cu_seqlens=None, key_time=None):
        generator = torch.Generator("cuda").manual_seed(0)
        key_time = key_time or time
        queries, token = (batch, time, KV_HEADS * group, head_dim), (batch, key_time, KV_HEADS, head_dim)
        slots = (SLOTS, batch, time, KV_HEADS, head_dim)

        def random(*shape):
            return torch.randn(shape, device="cuda", dtype=dtype, generator=generator)

        self.q, self.do, self.k, self.v = random(*queries), random(*queries), random(*token), random(*token)
        self.slots = random(*slots).double(), random(*slots).double()
        self.scale, self.dtype = head_dim**-0.5, dtype
        self.cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, device="cuda")
        self.wide = self.q.double(), self.k.double(), self.v.double()
        self.o, self.lse = reference.sequence_forward(*self.wide, self.scale, self.cu_seqlens)

    def joint(self, o, lse):
        """(o, lse) carried on over the slots, rounded and laid out as a forward leaves them."""
        o, lse = reference.depth_forward(self.q.double(), *self.slots, o.double(), lse.double(), self.scale)
        return o.to(self.dtype).contiguous(), lse.float().transpose(1, 2).contiguous().transpose(1, 2)

    def unusable(self, kernel):
        return kernel.unusable(Call.of(self.q, self.k, self.cu_seqlens))

    def check_forward(self, kernel):
        o, lse = kernel.forward(self.q, self.k, self.v, self.scale, self.cu_seqlens)
        assert o.is_contiguous()
        assert o.dtype == self.dtype
        assert lse.dtype == torch.float32
        assert lse.transpose(1, 2).is_contiguous()
        assert relative_error(o, self.o) < TOLERANCE[self.dtype]
        torch.testing.assert_close(lse.double(), self.lse, rtol=1e-3, atol=1e-3)
        return o, lse

    def check_backward(self, kernel, o, lse):
        """Gradients from the joint (o, lse), which may come from another kernel's forward."""
        o, lse = self.joint(o, lse)
        got = kernel.backward(self.do, self.q, self.k, self.v, o, lse, self.scale, self.cu_seqlens)
        do = self.do.double()
        delta = (do * o.double()).sum(-1)
        want = reference.sequence_backward(do, *self.wide, lse.double(), delta, self.scale, self.cu_seqlens)
        for name, g, w in zip(("dq", "dk", "dv"), got, want, strict=True):
            assert g.dtype == self.dtype
            assert g.shape == w.shape
            assert relative_error(g, w) < 2 * TOLERANCE[self.dtype], name


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def check(name, case):
    kernel = MENU[name]
    if reason := case.unusable(kernel):
        pytest.skip(f"{name}: {reason}")
    case.check_backward(kernel, *case.check_forward(kernel))


@pytest.mark.parametrize("time", [1, 63, 128, 1000, 4096])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 64), (8, 64), (2, 96), (2, 128)])
@pytest.mark.parametrize("name", MENU)
def test_every_kernel_equals_the_reference(name, group, head_dim, time):
    check(name, Case(1 if time > 1000 else 3, time, group, head_dim))


@pytest.mark.parametrize("name", MENU)
def test_every_kernel_takes_fp16_small_heads_and_odd_groups(name):
    check(name, Case(2, 256, 2, 64, torch.float16))
    check(name, Case(2, 256, 2, 32))
    check(name, Case(2, 256, 3, 64))


DOCUMENTS = {
    "one": (1, 300, [0, 300]),
    "of every length": (1, 1000, [0, 1, 2, 2, 66, 194, 195, 1000]),
    "over row ends": (3, 200, [0, 0, 1, 150, 390, 390, 600, 600]),
    "of a token each": (2, 17, list(range(35))),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (8, 64), (2, 128)])
@pytest.mark.parametrize("name", MENU)
def test_documents_see_themselves_only(name, group, head_dim, documents):
    batch, time, cu_seqlens = DOCUMENTS[documents]
    check(name, Case(batch, time, group, head_dim, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize(("time", "key_time"), [(1, 77), (5, 128), (130, 1000)])
@pytest.mark.parametrize("name", MENU)
def test_fewer_queries_than_keys_are_the_last_ones(name, time, key_time):
    check(name, Case(2, time, 2, 64, key_time=key_time))


@pytest.mark.parametrize("name", MENU)
def test_a_gradient_may_begin_anywhere(name):
    case = Case(2, 256, 2, 64)
    if reason := case.unusable(MENU[name]):
        pytest.skip(f"{name}: {reason}")
    o, lse = case.joint(*case.check_forward(MENU[name]))
    elsewhere = torch.cat((case.do.flatten()[:3], case.do.flatten()))[3:].view_as(case.do)
    assert elsewhere.data_ptr() % 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "choose", lambda *_: MENU[name])
        got, want = (
            sequence.backward(do, case.q, case.k, case.v, o, lse, case.scale, None) for do in (elsewhere, case.do)
        )
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w.double()) < TOLERANCE[case.dtype]


def test_any_backward_follows_any_forward():
    case = Case(2, 256, 2, 64)
    kernels = [kernel for kernel in MENU.values() if case.unusable(kernel) is None]
    assert len(kernels) >= 2
    for ahead, behind in itertools.permutations(kernels, 2):
        case.check_backward(behind, *case.check_forward(ahead))


def test_inputs_may_be_parts_of_one_projection():
    torch.manual_seed(0)
    for kernel in MENU.values():
        case = Case(2, 256, 2, 64)
        if case.unusable(kernel):
            continue
        case.q, case.k, case.v = torch.cat((case.q, case.k, case.v), 2).split((2 * KV_HEADS, KV_HEADS, KV_HEADS), 2)
        case.check_backward(kernel, *case.check_forward(kernel))


def test_deterministic_algorithms_give_the_same_bits_with_documents_and_without():
    torch.use_deterministic_algorithms(True)
    try:
        for cu_seqlens in (None, [0, 300, 1024]):
            case = Case(1, 1024, 2, 64, cu_seqlens=cu_seqlens)
            o, lse = sequence.forward(case.q, case.k, case.v, case.scale, case.cu_seqlens)
            arguments = (case.do, case.q, case.k, case.v, o, lse, case.scale, case.cu_seqlens)
            first, again = sequence.backward(*arguments), sequence.backward(*arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batch", [1, 3])
def test_joined_attention_takes_documents(batch):
    cu_seqlens = torch.tensor([0, 0, 1, 150, 150 * batch + 50, 200 * batch], device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    token = (batch, 200, 2, 64)
    sizes = [(batch, 200, 4, 64), token, token, (7, *token), (7, *token)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_() for s in sizes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = reference.definition(*wide, cu_seqlens=cu_seqlens)
    out = moda.attention(*inputs, cu_seqlens=cu_seqlens, backend="joined")
    do = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, inputs, do)]
    want = [expected, *torch.autograd.grad(expected, wide, do.double())]
    assert max(relative_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-2


def test_a_call_without_a_synchronisation():
    """Choice, masks and kernels leave the host ahead of the device."""
    case = Case(2, 256, 2, 64, cu_seqlens=[0, 100, 512])
    for cu_seqlens in (None, case.cu_seqlens):
        for warm in (True, False):
            torch.cuda.set_sync_debug_mode("default" if warm else "error")
            try:
                o, lse = sequence.forward(case.q, case.k, case.v, case.scale, cu_seqlens)
                sequence.backward(case.do, case.q, case.k, case.v, o, lse, case.scale, cu_seqlens)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_tuning_gives_a_table_that_choices_are_made_by(tmp_path):
    table = tuning.tune("cuda", head_dims=(64,), groups=(2,), times=(512,))
    tuning.write_table(table, tmp_path / "table.json")
    lines = sequence.read_table(tmp_path / "table.json")
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    assert [(entry.dtype, entry.documents) for entry in lines] == list(itertools.product(dtypes, [False, True]))
    for entry in lines[::2]:
        case = Case(1, 512, 2, 64, dtypes[entry.dtype])
        usable = {name for name, kernel in MENU.items() if case.unusable(kernel) is None}
        assert set(entry.forward) == set(entry.backward) == usable
        for kind in ("forward", "backward"):
            times = getattr(entry, kind)
            assert order(Call.of(case.q, case.k, None), kind, lines)[0] == min(times, key=times.get)
