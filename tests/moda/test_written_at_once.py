"""Keys and values that what makes them writes to their slots (`DepthStream.place`, `moda.slot_memory`): no copies."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moda
from tests.moda.stack import Stack, assert_equal_gradients, loss_of, random_input


class PutInSlot(torch.autograd.Function):
    """A producer that writes to a slot's memory itself."""

    @staticmethod
    def forward(ctx, k, v, memory):
        return memory[0].copy_(k), memory[1].copy_(v)

    @staticmethod
    def backward(ctx, dk, dv):
        return dk, dv, None


@pytest.mark.parametrize("every", [None, 1, 2])
def test_keys_and_values_that_are_in_their_slot_already_are_not_copied(every, monkeypatch):
    placed, copied = [], []

    class Direct(moda.DepthStream):
        def write(self, handle, layer, slot, k, v):
            if (memory := moda.slot_memory(self.place(handle, layer, slot))) is not None:
                placed.append((layer, slot))
                k, v = PutInSlot.apply(k, v, memory)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "copy_", lambda *_: copied.append((layer, slot)) or copy(*_))
                return super().write(handle, layer, slot, k, v)

    copy = torch.Tensor.copy_
    stack, x = Stack(), random_input()

    def call(block, *arguments):
        again = every is not None and arguments[3] % every == 0
        return checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)

    want = stack.gradients(loss_of(stack(x, call=call)))
    monkeypatch.setattr(moda, "DepthStream", Direct)
    loss = loss_of(stack(x, call=call))
    assert len(placed) == 12
    assert not copied
    got = stack.gradients(loss)
    assert len(placed) == 12, "a recomputation takes memory of its own"
    assert len(copied) == {None: 0, 1: 24, 2: 12}[every]
    assert_equal_gradients(got, want)


def test_a_slot_has_no_memory_for_who_comes_too_late_or_from_elsewhere():
    stream = Stack().stream(torch.zeros(1, 4, 16, dtype=torch.float64))
    handle = stream.start()
    place = stream.place(handle, 2, 1)
    k, v = moda.slot_memory(place)
    assert k.shape == v.shape == (1, 4, 2, 8)
    with torch.no_grad():
        k.fill_(3.0)
    _, _, after = stream.write(handle, 2, 1, k, torch.ones_like(v))
    assert moda.slot_memory(place) is None, "written already"
    assert torch.equal(k, torch.full_like(k, 3.0))
    assert v.eq(1).all()
    with pytest.raises(RuntimeError, match="returned by operation 0"):
        stream.place(handle, 2, 0)
    with pytest.raises(ValueError, match="slot=2 is outside the stream"):
        stream.place(after, 0, 2)
    del stream, handle, after, k, v
    gc.collect()
    assert moda.slot_memory(place) is None, "the pass is gone"
