"""Uses of the depth stream that are refused, most would give wrong gradients without a word; copies of a stream."""

import copy
import gc
import pickle

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint

import moda
from tests.moda.stack import Stack, assert_equal_gradients, random_input


def stream_and_kv(num_layers=3, slots_per_layer=1):
    stream = moda.DepthStream(
        num_layers, 1, 4, 2, 8, slots_per_layer=slots_per_layer, dtype=torch.float32, device="cpu"
    )
    return stream, torch.randn(1, 4, 2, 8, requires_grad=True)


def test_a_detached_handle_is_refused():
    stack, x = Stack(num_layers=2), random_input()
    stream = stack.stream(x)
    out, handle = stack.layers[0](x, stream.start(), stream, 0)
    with pytest.raises(RuntimeError, match="of operation 3 of its pass, was detached"):
        stack.layers[1](out, handle.detach(), stream, 1)


@pytest.mark.parametrize("part", [lambda x: x, lambda x: x[..., ::2]], ids=["all", "some"])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
def test_what_write_has_returned_is_not_to_be_changed(which, part):
    stream, x = stream_and_kv()
    k, v, handle = stream.write(stream.start(), 0, 0, x, x)
    out, handle = stream.attend(handle, 0, x, k, v)
    part((k, v)[which]).mul_(2.0)
    *_, handle = stream.write(handle, 1, 0, out, out)
    with pytest.raises(RuntimeError, match="slot 0 of layer 0 were changed in place since write"):
        stream.attend(handle, 1, x, x, x)


def test_what_write_has_returned_can_be_kept_and_read():
    stream, x = stream_and_kv()
    with torch.inference_mode():
        k, v, handle = stream.write(stream.start(), 0, 0, x, x)
        _, handle = stream.attend(handle, 0, x, k.clone().mul_(2.0), v)
        *_, handle = stream.write(handle, 1, 0, k, v)  # another slot's, which is written: copied
        stream.attend(handle, 1, x, k, v)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_a_device_that_is_not_there_gets_one_sentence():
    stream = moda.DepthStream(1, 1, 4, 2, 8, slots_per_layer=1, dtype=torch.float32, device="cuda")
    with pytest.raises(ValueError, match=r"^device=cuda cannot be used: no CUDA device is visible, so use cpu\.$"):
        stream.start()


def test_layers_go_in_rising_order():
    stream, x = stream_and_kv(slots_per_layer=2)
    handle = stream.start()
    with pytest.raises(ValueError, match="must have the slot's shape"):
        stream.write(handle, 2, 0, x[:, :3], x[:, :3])  # which changes nothing
    *_, handle = stream.write(handle, 1, 0, x, x)
    with pytest.raises(RuntimeError, match="Layer 0 comes after layer 1 in this pass"):
        stream.write(handle, 0, 0, x, x)
    *_, handle = stream.write(handle, 1, 1, x, x)
    with pytest.raises(RuntimeError, match="Layer 0 comes after layer 1 in this pass"):
        stream.attend(handle, 0, x, x, x)


def test_the_memory_of_a_slot_is_for_that_slot():
    stream, _ = stream_and_kv(slots_per_layer=2)
    handle = stream.start()
    (k, v), (k1, v1) = (moda.slot_memory(stream.place(handle, 0, slot)) for slot in (0, 1))
    for swapped in ((v, k), (k, v1), (k1, v1)):
        with pytest.raises(ValueError, match=r"lies in the memory of slot [01] of all"):
            stream.write(handle, 0, 0, *swapped)
    *_, handle = stream.write(handle, 0, 0, k, v)
    stream.write(handle, 0, 1, k1, v1)


def test_a_pass_opened_in_a_checkpoint_of_checkpointed_blocks_is_not_recomputed():
    stack, x = Stack(num_layers=3), random_input()
    stream = stack.stream(x)

    def call(block, *arguments):
        return checkpoint(block, *arguments, use_reentrant=False)

    out = checkpoint(lambda x: stack(x, stream, call=call), x, use_reentrant=False)
    with pytest.raises(CheckpointError, match=r"Recomputed values .* have different metadata"):
        out.sum().backward()


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda stream: pickle.loads(pickle.dumps(stream))}


@pytest.mark.parametrize("records_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_stream_has_its_arguments_and_none_of_its_passes(how, records_grad):
    stack, x = Stack(recent_layers=2, first_layers=1), random_input()
    stream = stack.stream(x)
    with torch.set_grad_enabled(records_grad):
        held = []

        def call(block, x, handle, stream, layer):
            if layer == 3:
                held.append(COPIES[how](stream))
                assert held[0].nbytes == 0
                with pytest.raises(RuntimeError, match="belongs to another stream"):
                    held[0].finish(handle, x)
            return block(x, handle, stream, layer)

        out = stack(x, stream, call=call)
        expected = stack.definition(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(stack(x, held[0]), expected)
    public = [{name: value for name, value in vars(s).items() if name[0] != "_"} for s in (stream, held[0])]
    assert public[0] == public[1]
    held.clear()
    gc.collect()  # a copy of a weak reference to storage would be freed twice
    if records_grad:
        got, want = (stack.gradients(result.square().sum()) for result in (out, expected))
        assert_equal_gradients(got, want)
