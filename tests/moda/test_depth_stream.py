"""The depth stream against the plain definition in float64 (relative 1e-9): values, gradients, lifetimes, misuse."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moda
from moda.readers import BLOCK_LAYERS
from tests.moda.stack import Stack, assert_equal_gradients, kept_gradients, loss_of, random_input

SLOT = torch.zeros(1, 4, 2, 8)
BOUNDS = [{}, {"recent_layers": 2}, {"recent_layers": 1, "first_layers": 2}, {"recent_layers": 9, "first_layers": 1}]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("slots_per_layer", [1, 2])
def test_values_and_gradients_equal_the_definition(slots_per_layer, bounds):
    stack, x = Stack(slots_per_layer=slots_per_layer, **bounds), random_input().requires_grad_()
    out, expected = stack(x), stack.definition(x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    (dx,) = torch.autograd.grad(loss_of(out), x, retain_graph=True)
    (dx_expected,) = torch.autograd.grad(loss_of(expected), x, retain_graph=True)
    torch.testing.assert_close(dx, dx_expected, rtol=1e-9, atol=1e-11)
    assert_equal_gradients(stack.gradients(loss_of(out)), stack.gradients(loss_of(expected)))


@pytest.mark.parametrize("bounds", [*BOUNDS, {"recent_layers": 5, "first_layers": 3}], ids=str)
@pytest.mark.parametrize("slots_per_layer", [1, 2])
def test_gradients_pulled_in_blocks_of_layers_equal_the_definition(slots_per_layer, bounds):
    stack, x = Stack(num_layers=11, slots_per_layer=slots_per_layer, **bounds), random_input()
    assert len(stack.layers) > 2 * BLOCK_LAYERS
    assert_equal_gradients(stack.gradients(loss_of(stack(x))), stack.gradients(loss_of(stack.definition(x))))


@pytest.mark.parametrize("num_layers", [8, 13])
@pytest.mark.parametrize("slots_per_layer", [1, 2, 3])
@pytest.mark.parametrize("how", ["leaves", "hooks"])
def test_gradients_that_are_kept_are_not_overwritten_by_later_blocks(how, slots_per_layer, num_layers):
    assert num_layers >= 2 * BLOCK_LAYERS
    for got, want in kept_gradients(how, num_layers=num_layers, slots_per_layer=slots_per_layer):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_layers_that_read_in_different_ways_are_pulled_apart():
    stack, x = Stack(num_layers=11), random_input()
    scales = [0.3, 0.3, 0.5, 0.3, 0.3, 0.7, 0.7, 0.3, 0.3, 0.9, 0.3]

    def call(block, x, handle, stream, layer):
        return block(x, handle, stream, layer, scale=scales[layer])

    got = stack.gradients(loss_of(stack(x, call=call)))
    want = stack.gradients(loss_of(stack.definition(x, scales=scales)))
    assert_equal_gradients(got, want)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_changes_no_bit(backward_inside):
    def results(autocast):
        k, v, q = torch.randn(3, 1, 33, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        stream = moda.DepthStream(2, 1, 33, 2, 16, slots_per_layer=1, dtype=q.dtype, device="cpu")
        with autocast:
            k0, v0, handle = stream.write(stream.start(), 0, 0, k, v)
            out, handle = stream.attend(handle, 1, q, k0, v0)
            loss = stream.finish(handle, out).square().sum()
        with autocast if backward_inside else nullcontext():
            return [out, *torch.autograd.grad(loss, (q, k, v))]

    expected = results(nullcontext())
    got = results(torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tokens_decoded_one_by_one_equal_the_whole_sequence():
    """The slots of a token are read at that token alone: decoding caches the sequence's keys and values, no slots."""
    stack, x = Stack(), random_input(time=7)
    caches = [[] for _ in stack.layers]
    with torch.no_grad():
        whole = stack(x)
        parts = [stack.decode(part, caches) for part in (x[:, :4], x[:, 4:5], x[:, 5:7])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_no_gradient(every):
    stack, x = Stack(), random_input()

    def call(block, *args):
        return checkpoint(block, *args, use_reentrant=False) if args[-1] % every == 0 else block(*args)

    assert_equal_gradients(stack.gradients(loss_of(stack(x, call=call))), stack.gradients(loss_of(stack.definition(x))))


def test_reentrant_checkpointing_is_refused():
    stack = Stack(num_layers=2)

    def call(block, *args):
        return checkpoint(block, *args, use_reentrant=True)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        stack(random_input(), call=call)


def test_gradients_accumulate_over_micro_batches():
    stack, xs = Stack(), [random_input(seed=i) for i in range(3)]
    for x in xs:
        loss_of(stack(x)).backward()
    expected = stack.gradients(sum(loss_of(stack.definition(x)) for x in xs))
    assert_equal_gradients([p.grad for p in stack.parameters()], expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_live_forwards_of_one_stream_do_not_mix(order):
    stack, xs = Stack(), [random_input(seed=1), random_input(seed=2)]
    stream = stack.stream(xs[0])
    losses = [loss_of(stack(x, stream)) for x in xs]
    for i in order:
        assert_equal_gradients(stack.gradients(losses[i]), stack.gradients(loss_of(stack.definition(xs[i]))))


def test_interleaved_backwards_of_two_retained_graphs_do_not_mix():
    stack, xs = Stack(), [random_input(seed=1), random_input(seed=2)]
    losses = [loss_of(stack(x)) for x in xs]
    for i in (0, 1, 0, 1):
        got = stack.gradients(losses[i], retain_graph=True)
        assert_equal_gradients(got, stack.gradients(loss_of(stack.definition(xs[i]))))


def test_evaluation_between_forward_and_backward_changes_nothing():
    stack, x, other = Stack(), random_input(), random_input(seed=5)
    stream = stack.stream(x)
    loss = loss_of(stack(x, stream))
    with torch.no_grad():
        torch.testing.assert_close(stack(other, stream), stack.definition(other))
    assert_equal_gradients(stack.gradients(loss), stack.gradients(loss_of(stack.definition(x))))


def test_backward_twice_through_a_retained_graph_gives_the_same_bits():
    stack, x = Stack(), random_input()
    loss = loss_of(stack(x))
    first = stack.gradients(loss, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, stack.gradients(loss), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_loss_at_an_early_layer_ignores_what_a_full_backward_left(stop, how):
    stack, x = Stack(), random_input()
    early = []

    def call(block, *args):
        x, handle = block(*args)
        if args[-1] + 1 == stop:
            early.append(x)
        return x, handle

    full = loss_of(stack(x, call=call))
    if how == "grad":
        stack.gradients(full, retain_graph=True)
    else:
        full.backward(retain_graph=True)
    got = stack.gradients(loss_of(early[0]))
    assert_equal_gradients(got, stack.gradients(loss_of(stack.definition(x, stop=stop))))


def test_a_pass_left_before_finish_has_the_gradients_of_what_it_used():
    stack, x = Stack(), random_input()
    got = stack.gradients(loss_of(stack(x, stop=4)))
    assert_equal_gradients(got, stack.gradients(loss_of(stack.definition(x, stop=4))))


def test_gradients_of_a_part_of_the_parameters_are_exact():
    stack, x = Stack(), random_input()
    for index in (0, 3, 5):
        weight = stack.layers[index].slot.weight
        (got,) = torch.autograd.grad(loss_of(stack(x)), weight)
        (want,) = torch.autograd.grad(loss_of(stack.definition(x)), weight, allow_unused=True)
        torch.testing.assert_close(got, torch.zeros_like(weight) if want is None else want, rtol=1e-9, atol=1e-11)


def test_a_slot_that_nobody_reads_gives_zeros_so_that_its_weight_has_optimizer_state():
    stack = Stack()
    loss_of(stack(random_input())).backward()
    last = stack.layers[-1].slot.weight
    assert last.grad is not None
    assert torch.count_nonzero(last.grad) == 0


def test_only_a_pass_without_finish_leaves_the_last_slot_without_gradient():
    stack = Stack()
    loss_of(stack(random_input(), stop=6)).backward()
    assert stack.layers[-1].slot.weight.grad is None


def test_frozen_layers_below_trained_ones_work():
    stack, x = Stack(), random_input()
    for parameter in stack.layers[:3].parameters():
        parameter.requires_grad_(False)
    trained = [p for p in stack.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss_of(stack(x)), trained)
    want = torch.autograd.grad(loss_of(stack.definition(x)), trained, allow_unused=True)
    assert_equal_gradients(got, [torch.zeros_like(p) if g is None else g for p, g in zip(trained, want, strict=True)])


def test_no_operator_returns_a_gradient_for_another_layers_slot():
    stack = Stack()
    out = stack(random_input())
    nodes, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [following for following, _ in node.next_functions]
    reads = [n for n in nodes if type(n).__name__ == "_AttendBackward"]
    assert len(reads) == 6
    for node in reads:  # handle, q, k, v: k and v come from the layer's own write
        own = {type(n).__name__ for n, _ in node.next_functions if n is not None}
        writes = {n for n, _ in node.next_functions if type(n).__name__ == "_WriteBackward"}
        assert own <= {"_WriteBackward", "UnsafeViewBackward0", "ViewBackward0"}
        assert len(writes) == 1
        assert len([n for n, _ in node.next_functions if n is not None]) == 4


def test_without_gradients_only_slots_are_kept_and_finish_frees_them():
    stack, x = Stack(), random_input()
    stream, seen = stack.stream(x), []
    with torch.no_grad():
        handle = stream.start()
        for layer, block in enumerate(stack.layers):
            x, handle = block(x, handle, stream, layer)
            seen.append(stream.nbytes)
        assert not stream.finish(handle, x).requires_grad
    batch, time, kv_heads, head_dim = stream.slot_shape
    assert set(seen) == {2 * 12 * batch * time * kv_heads * head_dim * 8}
    assert stream.nbytes == 0


def test_a_pass_that_an_exception_has_ended_goes_with_the_next_start():
    stack, x = Stack(), random_input()
    stream = stack.stream(x)

    def fail(block, x, handle, stream, layer):
        if layer == 2:
            raise InterruptedError
        return block(x, handle, stream, layer)

    held = []
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(InterruptedError):
                stack(x, stream, call=fail)
            gc.collect()  # the exception had the handle
            held.append(stream.nbytes)
        assert len(set(held)) == 1
        stack(x, stream)
    assert stream.nbytes == 0


def test_a_start_ends_no_pass_whose_handle_is_in_use():
    stack, x = Stack(), random_input()
    stream = stack.stream(x)

    def call(block, x, handle, stream, layer):
        stream.start()
        return block(x, handle.detach(), stream, layer)

    with torch.no_grad():
        torch.testing.assert_close(stack(x, stream, call=call), stack.definition(x))


def test_scale_and_documents_reach_forward_and_both_backwards():
    stack, x = Stack(), random_input(batch=2, time=7)
    options = {"scale": 0.7, "cu_seqlens": torch.tensor([0, 3, 7, 8, 14])}
    out, expected = stack(x, **options), stack.definition(x, **options)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert_equal_gradients(stack.gradients(loss_of(out)), stack.gradients(loss_of(expected)))


def test_bf16_slots_lose_no_more_than_their_rounding():
    """Every tensor is rounded to bf16 (relative 2^-9); sums run in fp32, or six layers would lose far more."""
    wide, narrow, x = Stack(), Stack().bfloat16(), random_input(time=64)
    wide.load_state_dict(narrow.state_dict())
    got = narrow.gradients(loss_of(narrow(x.bfloat16()).double()))
    want = wide.gradients(loss_of(wide.definition(x.bfloat16().double())))
    norm = torch.stack([w.norm() for w in want]).norm()
    error = torch.stack([(g.double() - w).norm() for g, w in zip(got, want, strict=True)]).norm() / norm
    assert error < 8e-3


@pytest.mark.parametrize("how", ["grad", "early", "retained"])
def test_nothing_stays_when_the_graph_of_partial_gradients_dies(how):
    stack, x = Stack(), random_input()
    stream, early = stack.stream(x), []

    def call(block, *args):
        x, handle = block(*args)
        early.append(x)
        return x, handle

    loss = loss_of(stack(x, stream, call=call))
    slots = stream.nbytes
    stack.gradients(loss_of(early[2]) if how == "early" else loss, retain_graph=how == "retained")
    assert stream.nbytes == slots, "what readers leave ends with the backward pass"
    del loss
    early.clear()
    gc.collect()
    assert stream.nbytes == 0


def test_a_handle_that_is_not_the_newest_of_its_pass_is_refused():
    stack, x = Stack(num_layers=3), random_input()
    stream = stack.stream(x)
    handle = stream.start()
    out, _ = stack.layers[0](x, handle, stream, 0)
    with pytest.raises(RuntimeError, match="operation 0 of its pass, which has come to 3"):
        stack.layers[1](out, handle, stream, 1)


def test_a_handle_of_another_stream_is_refused():
    stack, x = Stack(num_layers=2), random_input()
    stream, other = stack.stream(x), stack.stream(x)
    stream.start()
    with pytest.raises(RuntimeError, match="another stream"):
        stack.layers[0](x, other.start(), stream, 0)


@pytest.mark.parametrize("failing", [1, 4])
def test_a_backward_pass_that_an_exception_ends_leaves_nothing(failing):
    stack, x, inputs = Stack(num_layers=6), random_input(), []
    stream = stack.stream(x)

    def call(block, x, *arguments):
        inputs.append(x)
        return block(x, *arguments)

    loss = loss_of(stack(x, stream, call=call))
    inputs[failing].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert stream.nbytes > 0
    del loss
    inputs.clear()
    torch.zeros((), requires_grad=True).backward()  # autograd lets go of what it has not come to with its next pass
    gc.collect()
    assert stream.nbytes == 0


def test_a_second_write_or_read_at_one_place_is_refused():
    stream = moda.DepthStream(3, 1, 4, 2, 8, slots_per_layer=2, dtype=torch.float32, device="cpu")
    k, v, handle = stream.write(stream.start(), 0, 0, SLOT, SLOT)
    with pytest.raises(RuntimeError, match="Slot 0 of layer 0 is written already"):
        stream.write(handle, 0, 0, SLOT, SLOT)
    _, handle = stream.attend(handle, 0, SLOT, k, v)
    with pytest.raises(RuntimeError, match="Layer 0 has read already"):
        stream.attend(handle, 0, SLOT, k, v)
    with pytest.raises(ValueError, match="layer=-1"):
        stream.attend(handle, -1, SLOT, k, v)


def test_a_stale_handle_is_refused():
    stack, x = Stack(num_layers=2), random_input()
    stream = stack.stream(x)
    with torch.no_grad():
        handle = stream.start()
        out, handle = stack.layers[0](x, handle, stream, 0)
        stream.finish(handle, out)
        with pytest.raises(RuntimeError, match="has ended"):
            stack.layers[1](out, handle, stream, 1)


def test_a_pass_keeps_the_gradient_mode_it_was_started_in():
    stack, x = Stack(num_layers=2), random_input()
    stream = stack.stream(x)
    with torch.no_grad():
        handle = stream.start()
    with pytest.raises(RuntimeError, match="gradients off and continued with them on"):
        stack.layers[0](x, handle, stream, 0)


def test_reading_a_slot_that_nothing_has_written_is_refused():
    stack, x = Stack(num_layers=3), random_input()
    stream = stack.stream(x)
    handle = stream.start()
    _, handle = stack.layers[0](x, handle, stream, 0)
    with pytest.raises(RuntimeError, match="Layer 2 reads slot 0 of layer 1"):
        stack.layers[2](x, handle, stream, 2)


@pytest.mark.parametrize(
    ("layer", "slot", "k", "v", "words"),
    [
        (3, 0, SLOT, SLOT, "layer=3"),
        (0, 2, SLOT, SLOT, "slot=2"),
        (0, 0, SLOT[:, :3], SLOT[:, :3], r"\(1, 3, 2, 8\) must have .*: reshape them, or make a stream of their batch"),
        (0, 0, SLOT.double(), SLOT, r"float64.* must be torch\.float32 on cpu: convert them with to\(\), or make"),
    ],
)
def test_writes_that_do_not_fit_get_one_sentence(layer, slot, k, v, words):
    stream = moda.DepthStream(3, 1, 4, 2, 8, slots_per_layer=2, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=words):
        stream.write(stream.start(), layer, slot, k, v)


def test_a_read_from_another_device_is_refused():
    stream = moda.DepthStream(3, 1, 4, 2, 8, slots_per_layer=2, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="device, of the stream's slots"):
        stream.attend(stream.start(), 0, *[SLOT.to("meta")] * 3)


def test_what_names_no_slot_is_refused():
    stream = moda.DepthStream(3, 1, 4, 2, 8, slots_per_layer=2, dtype=torch.float32, device="cpu")
    handle = stream.start()  # which keeps the pass
    place = stream.place(handle, 0, 1)
    for wrong in (3, torch.zeros(3), place.float()):
        with pytest.raises(TypeError, match="must be what DepthStream"):
            moda.slot_memory(wrong)
    with pytest.raises(ValueError, match="names none of the 6 slots"):
        moda.slot_memory(place + torch.tensor((0, 98)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda stream, handle: stream.write(handle, 0, 0, None, SLOT), TypeError, "^k must be a tensor, got NoneType"),
        (lambda stream, handle: stream.write(handle, 0.5, 0, SLOT, SLOT), TypeError, r"^layer=0\.5 and slot=0 must be"),
        (lambda stream, handle: stream.place(handle, 0, "a"), TypeError, "^layer=0 and slot='a' must be integers"),
        (lambda stream, handle: stream.attend(handle, None, *[SLOT] * 3), TypeError, "^layer=None and slot=0"),
        (lambda stream, handle: stream.read_ranges(9), ValueError, "^layer=9 is outside the stream: it has 3 layers"),
        (lambda stream, handle: stream.finish(handle, None), TypeError, "^x must be a tensor, got NoneType"),
        (lambda stream, handle: stream.finish(None, SLOT), TypeError, "^handle must be what start.* got NoneType"),
        (lambda stream, handle: stream.finish(torch.tensor(3), SLOT), RuntimeError, "^This handle belongs to another"),
    ],
)
def test_arguments_that_name_nothing_get_one_sentence(call, error, words):
    stream = moda.DepthStream(3, 1, 4, 2, 8, slots_per_layer=2, dtype=torch.float32, device="cpu")
    with pytest.raises(error, match=words):
        call(stream, stream.start())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": 2.5}, r"num_layers=2\.5"),
        ({"time": "4"}, "time=4"),
        ({"batch": True}, "batch=True"),
        ({"recent_layers": 1.5}, r"recent_layers=1\.5"),
        ({"first_layers": None}, "first_layers=None"),
        ({"first_layers": 1}, "first_layers=1 has no effect without recent_layers"),
        ({"slots_per_layer": 0}, "slots_per_layer=0"),
        ({"recent_layers": 0}, "recent_layers=0"),
        ({"first_layers": -1}, "first_layers=-1"),
        ({"dtype": torch.int32}, r"dtype=torch\.int32"),
        ({"dtype": torch.float8_e4m3fn}, r"dtype=torch\.float8_e4m3fn .*: use torch\.bfloat16, .* torch\.float64\.$"),
        ({"dtype": None}, "dtype=None"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": None}, "device=None"),
    ],
)
def test_a_stream_that_cannot_be_made_names_the_argument(change, words):
    arguments = {"num_layers": 3, "batch": 1, "time": 4, "num_kv_heads": 2, "head_dim": 8, "slots_per_layer": 1}
    with pytest.raises(ValueError, match=words):
        moda.DepthStream(**{**arguments, "dtype": torch.float32, "device": "cpu", **change})


def test_layers_of_a_pass_have_one_number_of_query_heads():
    stream = moda.DepthStream(3, 1, 4, 2, 8, slots_per_layer=1, dtype=SLOT.dtype, device="cpu")
    handle = stream.start()
    for layer, heads in enumerate((6, 4, 2)):  # the first reads no slots
        k, v, handle = stream.write(handle, layer, 0, SLOT, SLOT)
        q = torch.zeros(1, 4, heads, 8)
        if layer == 2:
            with pytest.raises(ValueError, match=r"q \(1, 4, 2, 8\) of layer 2 must have the 4 query heads"):
                stream.attend(handle, layer, q, k, v)
        else:
            _, handle = stream.attend(handle, layer, q, k, v)
