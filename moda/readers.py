"""What the reads of one backward pass leave behind, and the blocked pull that turns it into gradients of slots.

In: for every layer whose backward has come by, its queries q, the gradient do of its output, lse and delta. Out: the
gradients of a layer's slots, summed over the layers that have read them.

The pull is blocked. Every slot of BLOCK_LAYERS neighbouring layers has the layers above the block as readers in common.
They are gone through once for all those slots, when the first of them is asked for, into partial sums in fp32; after
that a layer adds the few readers inside its own block. That reads a reader 1 / BLOCK_LAYERS times as often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor]  # dk, dv [slots, batch, time, kv_heads, head_dim]

BLOCK_LAYERS = 4  # of two slots each, half of what a program of the kernel can hold; more would cost more in partials


@dataclass(frozen=True)
class Way:
    """How a layer has read: what its gradients depend on besides tensors."""

    scale: float
    operations: ModuleType


class Readers:
    """The finished readers of one backward pass.

    q and do stay where autograd has them; this holds on to them until the pass ends. `addresses` names their places to
    kernels, written by the readers' own kernels. lse and delta are stacked over layers, in the accumulation dtype.
    """

    def __init__(self, num_layers: int, lse: Tensor) -> None:
        shape = (num_layers, *lse.shape)
        self.lse = torch.empty(shape, dtype=lse.dtype, device=lse.device)  # [layers, batch, time, query_heads]
        self.delta = torch.empty_like(self.lse)
        self.addresses = torch.empty(num_layers, 2, dtype=torch.int64, device=lse.device)
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}  # layer: q, do [batch, time, query_heads, head_dim]
        self.ways: dict[int, Way] = {}
        self._partial: tuple[int, Gradients | None] | None = None  # of the block that is being gone through: its number
        self._along: dict[int, Gradients] = {}  # slot: gradients that the pull of a later slot took along

    def keep(self, layer: int, q: Tensor, do: Tensor) -> None:
        """Hold on to what the reader of a layer leaves."""
        self.tensors[layer] = (q, do)

    @property
    def nbytes(self) -> int:
        """Bytes held, of q and do too."""
        held = [self.lse, self.delta, self.addresses, *(self._partial[1] or () if self._partial else ())]
        held += [tensor for pair in self.tensors.values() for tensor in pair]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def pull(
        self,
        layer: int,
        slot: int,
        written: set[int],
        keys: Tensor,
        values: Tensor,
        slots_per_layer: int,
        reads: Callable[[int, int], bool],
    ) -> Gradients | None:
        """dk, dv of one slot [batch, time, kv_heads, head_dim], in its dtype; None when no finished layer has read it.

        `slot` counts over all layers, `written` are the slots of the pass, `keys`, `values` all its storage and
        `reads(reader, layer)` says who reads whom. The slots of a layer have the same readers: the first one asked for,
        which is the last one written, takes those before it along.
        """
        if slot in self._along:
            return self._along.pop(slot)
        reading = [reader for reader in sorted(self.ways) if reads(reader, layer)]
        if not reading:
            return None
        block = layer // BLOCK_LAYERS
        common, first = self._common(block, reads), block * BLOCK_LAYERS * slots_per_layer
        if self._partial is None or self._partial[0] != block:
            self._partial = None  # frees the block before
            slots = slice(first, min(first + BLOCK_LAYERS * slots_per_layer, keys.shape[0]))
            self._partial = (block, self._sum(common, keys[slots], values[slots], None, self.lse.dtype))
        start = layer * slots_per_layer
        taken = slice(start if all(s in written for s in range(start, slot)) else slot, slot + 1)
        partial = self._partial[1]
        if partial is not None:
            within = slice(taken.start - first, taken.stop - first)
            partial = (partial[0][within], partial[1][within])
        rest = [reader for reader in reading if reader not in common]
        total = self._sum(rest, keys[taken], values[taken], partial, keys.dtype)
        assert total is not None
        for index in range(taken.start, slot):
            self._along[index] = (total[0][index - taken.start], total[1][index - taken.start])
        return total[0][-1], total[1][-1]

    def _common(self, block: int, reads: Callable[[int, int], bool]) -> list[int]:
        """The finished layers above a block that read all layers of it."""
        layers = range(block * BLOCK_LAYERS, (block + 1) * BLOCK_LAYERS)
        return [r for r in sorted(self.ways) if r >= layers.stop and all(reads(r, layer) for layer in layers)]

    def _sum(
        self, layers: list[int], k: Tensor, v: Tensor, partial: Gradients | None, dtype: torch.dtype
    ) -> Gradients | None:
        """Gradients of slots k, v from some layers' readers and a partial sum; None when there is neither."""
        runs = list(self._runs(layers))
        if not runs and partial is None:
            return None
        if not runs:
            last = next(iter(self.ways))
            runs = [(range(last, last), self.ways[last])]  # of no reader: the partial sum, in the dtype asked for
        for index, (run, way) in enumerate(runs):
            ends = index == len(runs) - 1
            partial = way.operations.pull(self, run, k, v, way.scale, partial, dtype if ends else self.lse.dtype)
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
