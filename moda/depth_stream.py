"""The depth stream: keys and values that layers leave at every token for all later layers to read.

In: each layer's K and V. Out: attention over the sequence and over the slots of earlier layers, in one softmax.

Storage is O(layers): one slot-major buffer a forward pass, written once and read in place. A pass is a *lease* of
that storage, opened by `start` and named by a handle, a tensor of zero bytes that blocks take and return. Every write
and read returns the next handle, so autograd runs their backwards in exactly the reverse order: the backward of a write
comes after the backward of every later read. A handle's shape is [number of the lease, operations so far, 0]: known on
the host without a synchronisation, and left alone by whatever a wrapper (FSDP2, checkpointing, casts) does to a tensor.

Gradients are pulled. The backward of a read computes the gradients of its own q, k, v only and leaves (q, do, lse,
delta) behind; the backward of a write sums over the readers that came after it. Nothing is accumulated in memory, and
no operator returns a gradient for another layer's slot. What readers leave belongs to one backward pass: it is kept
under the number of autograd's graph task, unseen by any other (nested, interrupted, of another thread), to its end;
where an exception ends it, to the graph's.

The lease belongs to the graph: to autograd's node of `start`, which every handle reaches. A backward pass that goes all
the way to it and does not retain the graph empties it; else it is freed with the graph. The caching allocator is the
pool that the next pass takes it from. Without gradients, nothing but slots is kept, until `finish`, or until the
next `start` finds that nobody has the pass's newest handle any more: an exception has ended it.
"""

from __future__ import annotations

import weakref
from numbers import Integral

import torch
from torch import Tensor

from moda import reference
from moda.attention import DTYPE_NAMES, DTYPES, check_backend, check_sequence, check_tensors, scale_of
from moda.backends import choose_backend
from moda.first_order import first_order
from moda.lease import Lease, in_backward, lease_numbers, leases, newest_handle, next_handle, without_view
from moda.operators import check_documents
from moda.readers import Gradients, Way


class DepthStream:
    """Depth slots of a stack of layers (paper, section 3; bounded form: section 6.2).

    Args:
        num_layers: layers of the stack.
        batch, time: shape of the tokens of a pass.
        num_kv_heads, head_dim: shape of a key or value of one token.
        slots_per_layer: slots each layer may write, any number; the paper's are 1 (attention) or 2 (attention and FFN).
        dtype, device: of the slots, bf16, fp16, fp32 or fp64; what is written must have them.
        recent_layers: read only the slots of this many layers back (None: all earlier layers).
        first_layers: with `recent_layers`, the slots of this many first layers are read too.

    A stream serves any number of passes, one after the other or at the same time; each holds
    2 * num_layers * slots_per_layer * batch * time * num_kv_heads * head_dim elements. A copy of a stream, or what is
    unpickled, has its arguments and none of its passes. A pass goes through the layers,
    counted from 0, in rising order, and every operation takes the handle that the one before it has returned:

        handle = stream.start()
        for layer in range(num_layers):
            ...                                                   # q, k, v of the layer
            k, v, handle = stream.write(handle, layer, 0, k, v)
            out, handle = stream.attend(handle, layer, q, k, v)
            ...                                                   # its FFN; a second slot: write(handle, layer, 1, ...)
        x = stream.finish(handle, x)

    All slots that a layer reads must be written before it attends; its own it may write before or after. All layers
    that read have as many query heads. Under autocast `dtype` is autocast's. Compile what lies between these calls, not
    around them.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        time: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        slots_per_layer: int,
        dtype: torch.dtype,
        device: torch.device | str,
        recent_layers: int | None = None,
        first_layers: int = 0,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "batch": batch,
            "time": time,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "slots_per_layer": slots_per_layer,
        }
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} cannot hold keys and values: use {DTYPE_NAMES}.")
        for name, size in sizes.items():
            if not _is_integer(size) or size < 1:
                raise ValueError(f"{name}={size} cannot make a depth stream: use a positive integer.")
        if recent_layers is not None and (not _is_integer(recent_layers) or recent_layers < 1):
            raise ValueError(f"recent_layers={recent_layers} reads nothing: use None (all layers) or at least 1.")
        if not _is_integer(first_layers) or first_layers < 0:
            raise ValueError(f"first_layers={first_layers} is no number of layers: use 0 or more.")
        if first_layers and recent_layers is None:
            raise ValueError(f"first_layers={first_layers} has no effect without recent_layers: give both, or neither.")
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device={device!r} names no device: use one such as 'cuda' or 'cpu'.") from None
        self.num_layers, self.slots_per_layer = num_layers, slots_per_layer
        self.slot_shape = (batch, time, num_kv_heads, head_dim)
        self.dtype = dtype
        self.recent_layers, self.first_layers = recent_layers, first_layers
        self._begin()

    def _begin(self) -> None:
        self._leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()
        self._without_grad: dict[int, Lease] = {}  # passes that no graph keeps alive

    def __getstate__(self) -> dict[str, object]:
        """For copy, deepcopy and pickle: no passes, whose handles, storage and graph are those of this stream alone."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_leases", "_without_grad")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def nbytes(self) -> int:
        """Bytes that the live passes hold: slots, and what readers have left for pulled gradients."""
        leases = list(self._leases.values())
        held = [tensor for lease in leases for tensor in (lease.keys, lease.values) if tensor is not None]
        held += [tensor for lease in leases for readers in list(lease.readers.values()) for tensor in readers.held]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
        return sum(storage.nbytes() for storage in storages.values())

    def read_ranges(self, layer: int) -> list[tuple[int, int]]:
        """Slots that `layer` reads, as half-open ranges in rising order."""
        if not _is_integer(layer) or not 0 <= layer < self.num_layers:
            raise ValueError(f"layer={layer!r} is outside the stream: it has {self.num_layers} layers.")
        nearest = 0 if self.recent_layers is None else max(0, layer - self.recent_layers)
        first = min(self.first_layers, nearest)
        ranges = [(0, first), (nearest, layer)] if first < nearest else [(0, layer)]
        return [(a * self.slots_per_layer, b * self.slots_per_layer) for a, b in ranges if a < b]

    def reads(self, reader: int, layer: int) -> bool:
        """Whether the layer `reader` reads the slots of `layer`."""
        near = self.recent_layers is None or layer >= reader - self.recent_layers
        return layer < reader and (near or layer < self.first_layers)

    @torch.compiler.disable
    def start(self) -> Tensor:
        """Open a pass: take storage, and return its first handle (zero elements; blocks take and return it).

        Open it outside of any checkpoint that has checkpointed blocks inside: recomputed, `start` opens a new pass of
        another number, which the handles of these blocks do not fit.

        Raises ValueError where no CUDA device is visible and the stream is to lie on one.
        """
        for lost in [n for n, lease in self._without_grad.copy().items() if lease.newest and lease.newest.expired()]:
            self._without_grad.pop(lost, None)
        number = next(lease_numbers)
        shape = (self.num_layers * self.slots_per_layer, *self.slot_shape)
        try:
            keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        except (AssertionError, RuntimeError) as error:  # the former where PyTorch was built without CUDA
            if self.device.type != "cuda" or torch.cuda.is_available():
                raise
            raise ValueError(f"device={self.device} cannot be used: no CUDA device is visible, so use cpu.") from error
        lease = Lease(number, torch.is_grad_enabled(), keys, torch.empty_like(keys))
        self._leases[number] = leases[number] = lease
        anchor = torch.empty(number, 0, 0, dtype=self.dtype, device=self.device, requires_grad=lease.records_grad)
        handle = _Start.apply(anchor, lease)
        if not lease.records_grad:
            self._without_grad[number] = lease
        return handle

    @torch.compiler.disable
    def place(self, handle: Tensor, layer: int, slot: int) -> Tensor:
        """Names a slot to what makes its keys and values: `moda.slot_memory` of it is where to put them.

        Given to `write` they are not copied then. Nothing else may have that memory in use until then: `write` alone
        gives autograd's names to it. Returns int64 [2] on the CPU, which compiled code takes as it takes any tensor.
        """
        lease = self._lease(handle)
        self._check_place(layer, slot)
        return torch.tensor((lease.number, layer * self.slots_per_layer + slot))

    @torch.compiler.disable
    def write(self, handle: Tensor, layer: int, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v [batch, time, kv_heads, head_dim] to a slot of `layer` (in the paper 0: attention, 1: FFN).

        Returns k and v as they stand in the slot, for sequence attention to read (never to be changed in place; their
        values last until a backward pass has gone by that does not retain the graph), and the next handle. Their
        backward returns the gradients that reach them by the sequence and by every layer that has read the slot.

        Raises ValueError for shapes, dtypes or numbers that do not fit the stream, TypeError for what is no tensor or
        no integer, RuntimeError for a handle that is not the newest of its pass or a slot that is written already.
        """
        check_tensors(k=k, v=v)
        lease = self._lease(handle)
        self._check_place(layer, slot)
        self._check_order(lease, layer)
        index = layer * self.slots_per_layer + slot
        if index in lease.written and not in_backward():
            raise RuntimeError(f"Slot {slot} of layer {layer} is written already in this pass: a slot is written once.")
        if k.shape != self.slot_shape or v.shape != self.slot_shape:
            raise ValueError(
                f"k {tuple(k.shape)} and v {tuple(v.shape)} must have the slot's shape {self.slot_shape}: reshape "
                "them, or make a stream of their batch, time, num_kv_heads and head_dim."
            )
        if not k.dtype == v.dtype == self.dtype or not k.device == v.device == lease.storage()[0].device:
            raise ValueError(
                f"k ({tuple(k.shape)}, {k.dtype}, {k.device}) and v ({tuple(v.shape)}, {v.dtype}, {v.device}) must be "
                f"{self.dtype} on {self.device}: convert them with to(), or make a stream of their dtype and device."
            )
        if not in_backward() and (taken := lease.memory_of_another(index, k, v)) is not None:
            raise ValueError(
                f"k or v lies in the memory of slot {taken} of all, for which place() has named it: give what "
                f"slot_memory() has for slot {slot} of layer {layer}, or tensors with memory of their own."
            )
        returned_k, returned_v, handle = _Write.apply(handle, k, v, self, lease, layer, index)
        if lease.records_grad and not in_backward():
            lease.versions[index] = [returned_k._version, returned_v._version]
        return returned_k, returned_v, handle

    @torch.compiler.disable
    def attend(
        self,
        handle: Tensor,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Attention of `layer` over its sequence and the slots of the layers before it; shapes as `moda.attention`.

        k, v may be longer than the slots, with the tokens before these at their front (a key-value cache): slots are of
        the queries' own tokens and need none. A cache that outlives a backward pass is to be of clones of what `write`
        returns, whose memory that pass uses.

        Returns the output [batch, time, query_heads, head_dim] and the next handle. Raises ValueError or TypeError for
        arguments that do not fit, RuntimeError for a handle that is not the newest of its pass, a second read by one
        layer, or a slot that was never written.
        """
        check_sequence(q, k, v, cu_seqlens)
        check_documents(q, cu_seqlens)
        check_backend(backend)
        scale = scale_of(q, scale)
        lease = self._lease(handle)
        self._check_place(layer, 0)
        self._check_order(lease, layer)
        if layer in lease.read and not in_backward():
            raise RuntimeError(f"Layer {layer} has read already in this pass: a layer reads once.")
        fits = (*q.shape[:2], *k.shape[2:]) == self.slot_shape and k.dtype == self.dtype
        if not fits or k.device != lease.storage()[0].device:
            raise ValueError(
                f"q {tuple(q.shape)} and k ({tuple(k.shape)}, {k.dtype}, {k.device}) must have batch and time, and "
                f"heads, head_dim, dtype and device, of the stream's slots, {self.slot_shape}, {self.dtype}, "
                f"{self.device}: convert them with reshape() and to(), or make a stream of theirs."
            )
        if lease.records_grad and not in_backward() and (slot := lease.changed()) is not None:
            at, slot = divmod(slot, self.slots_per_layer)
            raise RuntimeError(
                f"The keys or values of slot {slot} of layer {at} were changed in place since write() returned them: "
                "their gradients would be wrong. Change them before write(), or change a copy."
            )
        for start, stop in self.read_ranges(layer):
            if missing := [s for s in range(start, stop) if s not in lease.written]:
                at, slot = divmod(missing[0], self.slots_per_layer)
                raise RuntimeError(f"Layer {layer} reads slot {slot} of layer {at}, which nothing has written.")
        if self.read_ranges(layer):
            lease.query_heads = lease.query_heads or q.shape[2]
            if q.shape[2] != lease.query_heads:
                raise ValueError(
                    f"q {tuple(q.shape)} of layer {layer} must have the {lease.query_heads} query heads of the layers "
                    "that have read slots before it in this pass."
                )
        operations = choose_backend(backend, q, k, cu_seqlens)
        return _Attend.apply(handle, q, k, v, self, lease, layer, scale, cu_seqlens, operations)

    @torch.compiler.disable
    def finish(self, handle: Tensor, x: Tensor) -> Tensor:
        """End the forward pass: tie the handle to `x` (any shape), which is returned with its values.

        Every write's backward then runs, and a write that nobody reads gives its producers zeros, not no gradient.
        """
        check_tensors(x=x)
        lease = self._lease(handle)
        self._without_grad.pop(lease.number, None)
        return _Finish.apply(handle, x)

    def _check_place(self, layer: int, slot: int) -> None:
        if not (_is_integer(layer) and _is_integer(slot)):
            raise TypeError(f"layer={layer!r} and slot={slot!r} must be integers.")
        if not 0 <= layer < self.num_layers or not 0 <= slot < self.slots_per_layer:
            raise ValueError(
                f"layer={layer}, slot={slot} is outside the stream: it has {self.num_layers} layers "
                f"of {self.slots_per_layer} slots."
            )

    def _check_order(self, lease: Lease, layer: int) -> None:
        """Backwards come in reverse, and a block of layers is pulled when the first of its slots is asked for."""
        if layer < lease.layer and not in_backward():
            raise RuntimeError(
                f"Layer {layer} comes after layer {lease.layer} in this pass: layers write and read in rising order."
            )

    def _lease(self, handle: Tensor) -> Lease:
        if not isinstance(handle, Tensor):
            raise TypeError(
                f"handle must be what start() or the operation before has returned, got {type(handle).__name__}."
            )
        lease = self._leases.get(handle.shape[0]) if handle.dim() == 3 else None
        if lease is None:
            raise RuntimeError(
                "This handle belongs to another stream, or to a pass that has ended: call start() for a new one."
            )
        if handle.shape[1] != lease.operations and not in_backward():
            raise RuntimeError(
                f"This handle was returned by operation {handle.shape[1]} of its pass, which has come to "
                f"{lease.operations}: give every operation the handle that the one before it returned."
            )
        if lease.records_grad and not handle.requires_grad and not in_backward():
            raise RuntimeError(
                f"This handle, of operation {handle.shape[1]} of its pass, was detached: gradients would be lost. "
                "Give every operation the handle that the one before it returned."
            )
        if lease.records_grad != torch.is_grad_enabled():
            started, now = ("on", "off") if lease.records_grad else ("off", "on")
            raise RuntimeError(
                f"A pass of the depth stream was started with gradients {started} and continued with them {now}: "
                "start and use it in one mode, and give checkpoint() use_reentrant=False."
            )
        return lease


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool)


def _slots(stream: DepthStream, lease: Lease, layer: int) -> reference.Slots:
    """Keys and values that `layer` reads, a pair a range."""
    keys, values = lease.storage(layer * stream.slots_per_layer)
    return [(keys[start:stop], values[start:stop]) for start, stop in stream.read_ranges(layer)]


def _pull(stream: DepthStream, lease: Lease, layer: int, slot: int) -> Gradients | None:
    """What the readers of the present backward pass give to a slot."""
    readers = lease.finished_readers()
    if readers is None:
        return None
    retained = torch._C._autograd._get_current_graph_task_keep_graph()
    alone = len(lease.readers) == 1  # a backward pass within this one, or of another thread, may need all slots
    spare = lease.spare if alone and not retained else None
    storage = lease.storage(slot + 1)
    return readers.pull(layer, slot, lease.written, *storage, stream.slots_per_layer, stream.reads, spare)


class _Start(torch.autograd.Function):
    """Owns the lease; its backward is the last of the stream's to run."""

    @staticmethod
    def forward(ctx, anchor, lease):
        ctx.lease = lease
        return newest_handle(anchor.new_empty(anchor.shape), lease)

    @staticmethod
    @first_order
    def backward(ctx, _):
        ctx.lease.end_backward()
        return None, None


class _Write(torch.autograd.Function):
    """Copies K and V to their slot, unless they are there; the backward pulls the slot's gradient from the readers."""

    @staticmethod
    def forward(ctx, handle, k, v, stream, lease, layer, slot):
        ctx.set_materialize_grads(False)
        keys, values = lease.storage()
        slot_k, slot_v = without_view(keys, slot), without_view(values, slot)
        for target, source in ((slot_k, k), (slot_v, v)):
            if source.data_ptr() != target.data_ptr() or source.stride() != target.stride():
                target.copy_(source)
        lease.written.add(slot)
        lease.layer = max(lease.layer, layer)
        lease.aliases.setdefault(slot, []).extend((slot_k.detach(), slot_v.detach()))  # a recomputation makes new ones
        ctx.stream, ctx.lease, ctx.layer, ctx.slot, ctx.handle_shape = stream, lease, layer, slot, handle.shape
        return slot_k, slot_v, next_handle(handle, lease)

    @staticmethod
    @first_order
    def backward(ctx, dk, dv, dhandle):
        keys, _ = ctx.lease.storage()
        pulled = _pull(ctx.stream, ctx.lease, ctx.layer, ctx.slot)
        gradients = []
        for own, read in zip((dk, dv), pulled or (None, None), strict=True):
            if own is None and read is None:  # nobody has read: zeros, not no gradient
                own = keys.new_zeros(ctx.stream.slot_shape)
            gradients.append(own if read is None else read if own is None else read.add_(own))
        return keys.new_empty(ctx.handle_shape), *gradients, None, None, None, None


class _Attend(torch.autograd.Function):
    """Joint attention over the sequence and the slots below; the backward leaves (q, do, lse, delta) for the writes."""

    @staticmethod
    def forward(ctx, handle, q, k, v, stream, lease, layer, scale, cu_seqlens, operations):
        ctx.set_materialize_grads(False)
        out, lse = operations.joint_forward(q, k, v, _slots(stream, lease, layer), scale, cu_seqlens)
        lease.read.add(layer)
        lease.layer = max(lease.layer, layer)
        lease.lse_dtype = torch.promote_types(lease.lse_dtype or lse.dtype, lse.dtype)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.stream, ctx.lease, ctx.layer, ctx.handle_shape = stream, lease, layer, handle.shape
        ctx.scale, ctx.operations = scale, operations
        return out, next_handle(handle, lease)

    @staticmethod
    @first_order
    def backward(ctx, do, dhandle):
        if do is None:  # the output is not part of the loss
            return dhandle if dhandle is None else dhandle.new_empty(ctx.handle_shape), *[None] * 9
        slots = _slots(ctx.stream, ctx.lease, ctx.layer)
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        rest = (k, v, out, lse, slots, ctx.scale, cu_seqlens)
        if slots:
            readers = ctx.lease.readers_of_backward(ctx.stream.num_layers, lse, reference.accumulation_dtype(q.dtype))
            kept = ctx.lease.apart(do), ctx.lease.apart(q)
            dq, dk, dv = ctx.operations.reader_backward(*kept, *rest, readers, ctx.layer)
            readers.ways[ctx.layer] = Way(ctx.scale, ctx.operations)
        else:
            dq, dk, dv, _ = ctx.operations.joint_backward(do, q, *rest)
        return do.new_empty(ctx.handle_shape), dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 6


class _Finish(torch.autograd.Function):
    """Identity on x that makes the last handle part of the loss."""

    @staticmethod
    def forward(ctx, handle, x):
        ctx.handle_shape = handle.shape
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx, dx):
        return dx.new_empty(ctx.handle_shape), dx
