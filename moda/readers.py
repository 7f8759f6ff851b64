"""What the reads of one backward pass leave behind, and the blocked pull that turns it into gradients of slots.

In: for every layer whose backward has come by, its queries q, the gradient do of its output, lse and delta. Out: the
gradients of a layer's slots, summed over the layers that have read them.

The pull is blocked. Every slot of BLOCK_LAYERS neighbouring layers has the layers above the block as readers in common.
They are gone through once for all those slots, when the first of them is asked for, into partial sums in fp32; after
that a layer adds the few readers inside its own block. That reads a reader 1 / BLOCK_LAYERS times as often. The sums
lie where the slots of the layers above were, which nobody reads again, unless the graph is retained; near the last
layer, where these are too few, blocks are smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor]  # dk, dv [slots, batch, time, kv_heads, head_dim]
Spare = Callable[[int, int, torch.dtype], Gradients]  # room for sums in a dtype where a range of slots was

BLOCK_LAYERS = 4  # of two slots each, half of what a program of the kernel can hold; more would cost more in partials


@dataclass(frozen=True)
class Way:
    """How a layer has read: what its gradients depend on besides tensors."""

    scale: float
    operations: ModuleType


class Partial(NamedTuple):
    """Of the block of layers that is being gone through."""

    first: int  # layer
    readers: list[int]  # that its sums have in them
    sums: Gradients | None  # of the slots from the first layer's on; None without readers


class Readers:
    """The finished readers of one backward pass.

    q and do stay where autograd has them; this holds on to them until the pass ends, or its graph is freed. `addresses`
    names their places to kernels, written by the readers' own kernels. lse and delta are stacked over layers; delta,
    and sums of gradients, are in the accumulation dtype, lse in one that holds every reader's.
    """

    def __init__(
        self, num_layers: int, lse: Tensor, sums: torch.dtype = torch.float32, lse_dtype: torch.dtype | None = None
    ) -> None:
        shape = (num_layers, *lse.shape)
        # [layers, batch, time, query_heads]
        self.lse = torch.empty(shape, dtype=lse_dtype or lse.dtype, device=lse.device)
        self.delta = torch.empty_like(self.lse, dtype=sums)
        self.addresses = torch.empty(num_layers, 2, dtype=torch.int64, device=lse.device)
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}  # layer: q, do [batch, time, query_heads, head_dim]
        self.ways: dict[int, Way] = {}
        self._partial: Partial | None = None
        self._along: dict[int, Gradients] = {}  # slot: gradients that the pull of a later slot took along

    def keep(self, layer: int, q: Tensor, do: Tensor) -> None:
        """Hold on to what the reader of a layer leaves, not to the graph that it comes from.

        That reaches the lease, which holds this: a backward pass that an exception ends would never be freed.
        """
        self.tensors[layer] = (q.detach(), do.detach())

    @property
    def held(self) -> list[Tensor]:
        """All tensors that live as long as this, q and do too."""
        sums = self._partial.sums or () if self._partial else ()
        return [self.lse, self.delta, self.addresses, *sums, *(x for pair in self.tensors.values() for x in pair)]

    def pull(
        self,
        layer: int,
        slot: int,
        written: set[int],
        keys: Tensor,
        values: Tensor,
        slots_per_layer: int,
        reads: Callable[[int, int], bool],
        spare: Spare | None,
    ) -> Gradients | None:
        """dk, dv of one slot [batch, time, kv_heads, head_dim], in its dtype; None when no finished layer has read it.

        `slot` counts over all layers, `written` are the slots of the pass, `keys`, `values` all its storage and
        `reads(reader, layer)` says who reads whom. `spare` makes room for partial sums where slots were that nobody
        will read; None: somebody may.
        The slots of a layer have the same readers: the first one asked for, which is the last one written, takes those
        before it along.
        """
        if slot in self._along:
            return self._along.pop(slot)
        reading = [reader for reader in sorted(self.ways) if reads(reader, layer)]
        if not reading:
            return None
        if self._partial is None or layer < self._partial.first:
            self._partial = None  # frees the block before
            first = self._first_of_block(layer, slots_per_layer, keys)
            slots = slice(first * slots_per_layer, (layer + 1) * slots_per_layer)
            common = self._common(first, layer, reads) if first < layer else []
            room = None
            if common and spare is not None and keys.stride(0) * keys.itemsize % self.delta.itemsize == 0:
                needed = (slots.stop - slots.start) * self.delta.dtype.itemsize // keys.dtype.itemsize
                room = spare(slots.stop, slots.stop + needed, self.delta.dtype)
            sums = self._sum(common, keys[slots], values[slots], None, self.delta.dtype, room)
            self._partial = Partial(first, common, sums)
        start = layer * slots_per_layer
        taken = slice(start if all(s in written for s in range(start, slot)) else slot, slot + 1)
        partial = self._partial.sums
        if partial is not None:
            first = self._partial.first * slots_per_layer
            within = slice(taken.start - first, taken.stop - first)
            partial = (partial[0][within], partial[1][within])
        rest = [reader for reader in reading if reader not in self._partial.readers]
        total = self._sum(rest, keys[taken], values[taken], partial, keys.dtype, None)
        assert total is not None
        for index in range(taken.start, slot):
            self._along[index] = (total[0][index - taken.start], total[1][index - taken.start])
        return total[0][-1], total[1][-1]

    def _first_of_block(self, layer: int, slots_per_layer: int, keys: Tensor) -> int:
        """The first layer of the block that ends with `layer`: of the largest whose sums fit above it."""
        ratio = self.delta.dtype.itemsize // keys.dtype.itemsize
        above = len(keys) - (layer + 1) * slots_per_layer
        size = BLOCK_LAYERS
        while size > 1 and (layer % size + 1) * slots_per_layer * ratio > above:
            size //= 2
        return layer - layer % size

    def _common(self, first: int, last: int, reads: Callable[[int, int], bool]) -> list[int]:
        """The finished layers above a block that read all layers of it."""
        block = range(first, last + 1)
        return [r for r in sorted(self.ways) if r > last and all(reads(r, layer) for layer in block)]

    def _sum(
        self,
        layers: list[int],
        k: Tensor,
        v: Tensor,
        partial: Gradients | None,
        dtype: torch.dtype,
        out: Gradients | None,
    ) -> Gradients | None:
        """Gradients of slots k, v from some layers' readers and a partial sum, in `out` if it is given; None when there
        is neither."""
        runs = list(self._runs(layers))
        if not runs and partial is None:
            return None
        if not runs:
            last = next(iter(self.ways))
            runs = [(range(last, last), self.ways[last])]  # of no reader: the partial sum, in the dtype asked for
        for index, (run, way) in enumerate(runs):
            ends = index == len(runs) - 1
            wanted = (dtype, out) if ends else (self.delta.dtype, None)
            partial = way.operations.pull(self, run, k, v, way.scale, partial, *wanted)
        return partial

    def _runs(self, layers: list[int]) -> Iterator[tuple[range, Way]]:
        """Rising layers as ranges without gaps that were read in one way."""
        first = None
        for layer in layers:
            way = self.ways[layer]
            first = layer if first is None else first
            if layer + 1 not in layers or self.ways[layer + 1] != way:
                yield range(first, layer + 1), way
                first = None
