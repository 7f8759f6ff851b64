"""The memory of the depth stream: how long slots and what readers leave live, and partial sums where slots were."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import moda
from moda.readers import BLOCK_LAYERS, Readers
from tests.moda.stack import Stack, assert_equal_gradients, loss_of, random_input


def kept_bytes(num_layers):
    """Bytes that a forward pass and its backward keep: distinct storages saved by autograd, and the stream's own."""
    stack, x = Stack(num_layers), random_input(time=32)
    stream, storages, peak = stack.stream(x), {}, [0]
    weights = {p.untyped_storage().data_ptr() for p in stack.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = stack(x, stream)
    slots = stream.nbytes
    out.register_hook(lambda g: peak.__setitem__(0, stream.nbytes))
    first = stack.layers[0].kv.weight  # its gradient is nearly the last: all readers have left what they leave
    first.register_hook(lambda g: peak.__setitem__(0, stream.nbytes))
    loss_of(out).backward()
    assert peak[0] > slots
    return sum(storages.values()) + peak[0]


def test_memory_kept_for_backward_grows_linearly_with_depth():
    at_6, at_12, at_24 = (kept_bytes(n) for n in (6, 12, 24))
    assert at_12 / at_6 <= 2.1
    assert at_24 / at_12 <= 2.1


def test_partial_sums_lie_where_slots_were_that_nobody_reads_again():
    held = {}
    for retained in (False, True):
        stack, x, most = Stack(num_layers=4 * BLOCK_LAYERS), random_input(), [0]
        stream = stack.stream(x)
        out = stack(x, stream)
        for layer in stack.layers:  # every layer's weights get their gradients when its readers' are summed up
            layer.kv.weight.register_hook(lambda g, s=stream, m=most: m.__setitem__(0, max(m[0], s.nbytes)))
        loss_of(out).backward(retain_graph=retained)
        held[retained] = most[0]
    batch, time, kv_heads, head_dim = stream.slot_shape
    sums = 2 * BLOCK_LAYERS * stream.slots_per_layer * batch * time * kv_heads * head_dim * 8
    assert held[True] - held[False] == sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_layers", "slots_per_layer"), [(36, 2), (38, 2), (24, 1), (6, 1), (3, 2)])
def test_blocks_are_as_large_as_their_sums_fit_above_them(num_layers, slots_per_layer, dtype):
    readers, keys = Readers(num_layers, torch.zeros(1, 1, 1)), torch.zeros(num_layers * slots_per_layer, dtype=dtype)
    layer, sizes = num_layers - 1, []
    while layer >= 0:
        first = readers._first_of_block(layer, slots_per_layer, keys)
        needed = (layer - first + 1) * slots_per_layer * 4 // dtype.itemsize
        assert first == layer or (layer + 1) * slots_per_layer + needed <= len(keys)
        sizes.append(layer - first + 1)
        layer = first - 1
    assert sum(sizes) == num_layers
    assert sizes.count(BLOCK_LAYERS) >= num_layers // BLOCK_LAYERS - 3  # small ones are few: near the last layer


def test_a_slot_saved_elsewhere_raises_once_sums_lie_where_it_was():
    stack, x, saved = Stack(num_layers=3 * BLOCK_LAYERS), random_input(), []
    stream = stack.stream(x)
    write = stream.write

    def keeping(*arguments):
        saved.append(write(*arguments))
        return saved[-1]

    stream.write = keeping
    loss = loss_of(stack(x, stream))
    key = saved[2 * BLOCK_LAYERS][0].detach().requires_grad_()
    norm = key.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="inplace"):
        norm.backward()


def test_gradients_of_later_layers_are_refused_once_their_slots_are_spent():
    stack, x, early = Stack(num_layers=4 * BLOCK_LAYERS - 1), random_input(), []  # the last slots are left alone

    def call(block, x, handle, stream, layer):
        x, handle = block(x, handle, stream, layer)
        if layer == 3 * BLOCK_LAYERS:
            early.append(x)
        return x, handle

    loss = loss_of(stack(x, call=call))
    torch.autograd.grad(loss_of(early[0]), stack.layers[0].q.weight)  # does not come to the start of the pass
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        torch.autograd.grad(loss, stack.layers[-1].q.weight)


def test_storage_is_freed_by_backward_even_while_the_loss_is_held():
    stack, x = Stack(), random_input()
    stream = stack.stream(x)
    loss = loss_of(stack(x, stream))
    assert stream.nbytes > 0
    loss.backward()
    assert stream.nbytes == 0
    assert loss.grad_fn is not None


def test_storage_is_freed_with_a_graph_that_is_never_gone_through():
    stack, x = Stack(), random_input()
    stream = stack.stream(x)
    out = stack(x, stream)
    assert stream.nbytes > 0
    del out
    gc.collect()
    assert stream.nbytes == 0


class Sharing(torch.nn.Module):
    """A layer whose queries are its keys as the slot has them."""

    def __init__(self, layer):
        super().__init__()
        self.kv, self.slot, self.out, self.ffn = layer.kv, layer.slot, layer.out, layer.ffn
        self.split, self.kv_heads, self.head_dim = layer.split, layer.kv_heads, layer.head_dim

    def forward(self, x, handle, stream, layer):
        k, v, handle = stream.write(handle, layer, 0, *self.split(self.kv(x)))
        out, handle = stream.attend(handle, layer, k, k, v)
        x = x + self.out(out.flatten(2))
        _, _, handle = stream.write(handle, layer, 1, *self.split(self.slot(x)))
        return x + torch.tanh(self.ffn(x)), handle


def test_queries_that_lie_in_a_slot_outlive_it():
    stack, x = Stack(num_layers=3 * BLOCK_LAYERS + 1, heads=2), random_input()
    stack.layers = torch.nn.ModuleList(Sharing(layer) for layer in stack.layers)
    retained = stack.gradients(loss_of(stack(x)), retain_graph=True)  # no slot is spent
    assert_equal_gradients(stack.gradients(loss_of(stack(x))), retained)


def test_a_slot_saved_elsewhere_raises_after_a_recomputation_too():
    stack, x, saved = Stack(num_layers=3 * BLOCK_LAYERS), random_input(), []
    stream = stack.stream(x)
    write = stream.write
    stream.write = lambda *arguments: saved.append(write(*arguments)) or saved[-1]
    loss = loss_of(stack(x, stream, call=lambda block, *args: checkpoint(block, *args, use_reentrant=False)))
    key = saved[2 * BLOCK_LAYERS][0].detach().requires_grad_()
    norm = key.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="inplace"):
        norm.backward()


def test_a_backward_pass_gives_the_memory_of_the_slots_back():
    stack, x = Stack(), random_input()
    stream, seen = stack.stream(x), []
    write = stream.write

    def watched(*arguments):
        k, v, handle = write(*arguments)
        seen.extend(StorageWeakRef(t.untyped_storage()) for t in (k, v))
        return k, v, handle

    stream.write = watched
    loss = loss_of(stack(x, stream))
    assert not any(reference.expired() for reference in seen)
    loss.backward()
    assert loss.grad_fn is not None
    assert all(reference.expired() for reference in seen)


def test_slots_of_an_odd_number_of_elements_leave_their_sums_apart():
    stream = moda.DepthStream(9, 1, 1, 1, 3, slots_per_layer=1, dtype=torch.bfloat16, device="cpu")
    x = torch.ones(1, 1, 1, 3, dtype=torch.bfloat16, requires_grad=True)
    handle, total = stream.start(), torch.zeros(())
    for layer in range(9):
        k, v, handle = stream.write(handle, layer, 0, x, x)
        out, handle = stream.attend(handle, layer, x, k, v)
        total = total + out.float().sum()
    stream.finish(handle, total).backward()
    assert x.grad.isfinite().all()
