"""One forward pass of the depth stream, and its backward passes: storage, bookkeeping, and the handles that name it.

A pass is a *lease* of storage, slot-major: keys and values, each [slots, batch, time, kv_heads, head_dim]. What readers
leave during a backward pass is kept here too, by the number of autograd's graph task. `moda.depth_stream` says when.
"""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moda.readers import Gradients, Readers


@dataclass(eq=False)
class Lease:
    """The storage and the bookkeeping of one forward pass and its backward passes."""

    number: int
    records_grad: bool
    keys: Tensor | None  # [slots, batch, time, kv_heads, head_dim]
    values: Tensor | None
    operations: int = 0  # writes and reads of the forward pass so far
    newest: StorageWeakRef | None = None  # what that handle and its aliases share
    written: set[int] = field(default_factory=set)  # slots
    read: set[int] = field(default_factory=set)  # layers
    query_heads: int | None = None  # of the layers that read slots
    lse_dtype: torch.dtype | None = None  # that holds the lse of all of them: of fp32, backends differ
    aliases: dict[int, list[Tensor]] = field(default_factory=dict)  # slot: K and V as returned, without their graphs
    versions: dict[int, list[int]] = field(default_factory=dict)  # slot: those of its aliases, as they were returned
    layer: int = 0  # the last that has written or read
    spent: float = math.inf  # slots from this one on hold sums of gradients
    readers: dict[int, Readers] = field(default_factory=dict)  # graph task: what its backward has left so far

    def storage(self, slots: int = 0) -> tuple[Tensor, Tensor]:
        """All keys and values, of which the first `slots` slots must hold what was written."""
        if self.keys is None or self.values is None or slots > self.spent:
            raise RuntimeError(
                "The depth stream's storage was freed by an earlier backward pass through this graph: "
                "call backward(retain_graph=True) there to go through it again."
            )
        return self.keys, self.values

    def readers_of_backward(self, num_layers: int, lse: Tensor, sums: torch.dtype) -> Readers:
        """Those of the present backward pass, for readers with an lse of such a shape; made at the first read."""
        task = torch._C._current_graph_task_id()
        if task not in self.readers:
            self.readers[task] = Readers(num_layers, lse, sums, self.lse_dtype)

            def forget() -> None:
                self.readers.pop(task, None)

            torch.autograd.Variable._execution_engine.queue_callback(forget)  # when this backward pass ends
        return self.readers[task]

    def finished_readers(self) -> Readers | None:
        """Those of the present backward pass, None before its first read."""
        return self.readers.get(torch._C._current_graph_task_id())

    def spare(self, first: int, stop: int, dtype: torch.dtype) -> Gradients:
        """Room for two sums in `dtype` where the slots first..stop-1 were, for which nobody has use any more.

        What has saved those slots for a backward of its own will raise there.
        """
        self.spent = min(self.spent, first)
        for slot in range(first, stop):
            torch.autograd.graph.increment_version(self.aliases.get(slot, []))
        keys, values = (x[first:stop].view(-1).view(dtype).view(-1, *x.shape[1:]) for x in self.storage())
        return keys, values

    def apart(self, x: Tensor) -> Tensor:
        """x, or a copy where it lies in the slots, which may be spent while a reader still needs it."""
        slots = (tensor.untyped_storage().data_ptr() for tensor in self.storage())
        return x.clone() if x.untyped_storage().data_ptr() in slots else x

    def changed(self) -> int | None:
        """A slot whose K or V somebody has changed in place since they were returned; None: no slot's."""
        for slot, versions in self.versions.items():
            if [alias._version for alias in self.aliases[slot][:2]] != versions:
                return slot
        return None

    def memory_of_another(self, slot: int, k: Tensor, v: Tensor) -> int | None:
        """An unwritten slot in whose keys' or values' memory k or v lies, unless it is theirs in `slot`; None: none."""
        storages = self.storage()
        for x, own in zip((k, v), storages, strict=True):
            for storage in storages:
                if x.untyped_storage()._cdata == storage.untyped_storage()._cdata:
                    lies_in = x.storage_offset() // storage.stride(0)
                    if lies_in not in self.written and (lies_in != slot or storage is not own):
                        return lies_in
        return None

    def end_backward(self) -> None:
        """The whole graph has been gone through: free the slots unless the graph is kept."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.keys = self.values = None
            self.aliases.clear()
            self.versions.clear()


lease_numbers = itertools.count()  # of leases: one sequence for all streams, so that a handle never fits another's
leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()  # by number, of all streams


def in_backward() -> bool:
    """Whether autograd runs on this thread: a forward operation is then the recomputation of a checkpointed block."""
    return torch._C._current_graph_task_id() != -1


def next_handle(handle: Tensor, lease: Lease) -> Tensor:
    """The handle of the operation after that of `handle`, [number of the lease, operations so far, 0]."""
    operations = handle.shape[1] + 1
    lease.operations = max(lease.operations, operations)  # a recomputation goes through the numbers again
    return newest_handle(handle.new_empty(lease.number, operations, 0), lease)


def newest_handle(handle: Tensor, lease: Lease) -> Tensor:
    """The handle, noted as the newest of a pass that nothing else keeps alive."""
    if not lease.records_grad:
        lease.newest = StorageWeakRef(handle.untyped_storage())
    return handle


def without_view(storage: Tensor, index: int) -> Tensor:
    """Slot `index` of the storage as a tensor with a version counter of its own.

    Views share one counter, so that writing a slot would invalidate what autograd saved of all the others.
    """
    stride, *strides = storage.stride()
    return storage.new_empty(0).set_(storage.untyped_storage(), index * stride, storage.shape[1:], strides)


def slot_memory(place: Tensor) -> tuple[Tensor, Tensor] | None:
    """The slot that `DepthStream.place` has named, for its K and V to be written to; None where they need other memory.

    That is so in a backward pass: a recomputation comes when the slot may hold sums of gradients.
    """
    if not isinstance(place, Tensor) or place.shape != (2,) or place.dtype != torch.int64:
        raise TypeError(f"place={place!r} must be what DepthStream.place has returned.")
    number, slot = place.tolist()
    lease = leases.get(number)
    if lease is None or slot in lease.written or in_backward():
        return None
    keys, values = lease.storage()
    if not 0 <= slot < len(keys):
        raise ValueError(f"place={place!r} names none of the {len(keys)} slots of its pass.")
    return without_view(keys, slot), without_view(values, slot)
