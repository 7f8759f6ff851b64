"""Rows of ids as a model takes them: inputs, targets, and where documents begin.

In: instances, int64 `[rows, sequence_length + 1]`, where a negative number ~x (bitwise not) stands for the id x at a
place that is no target: padding, or the first id of a packed document. Out: a `MicroBatch` of torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class MicroBatch(NamedTuple):
    """What a model computes at one time, and how much of the global batch it is."""

    inputs: Tensor  # int64 [rows, sequence_length]
    targets: Tensor  # int64 [rows, sequence_length]; a negative one is ignored
    cu_seqlens: Tensor | None  # int32, document boundaries as `moda.attention` takes them; None without document masks
    # Factor of this micro-batch's mean loss: summed over micro-batches and averaged over ranks, weighted means are the
    # mean over all targets of the global batch.
    weight: float

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`, copied without waiting where the memory is pinned."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The same in pinned memory, from where a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        boundaries = None if self.cu_seqlens is None else change(self.cu_seqlens)
        return MicroBatch(change(self.inputs), change(self.targets), boundaries, self.weight)


def micro_batch(rows: np.ndarray, eos_id: int | None, weight: float) -> MicroBatch:
    """Instances `rows` [rows, sequence_length + 1] as a micro-batch; with `eos_id` documents do not see each other."""
    ids = inputs_of(rows)
    boundaries = None if eos_id is None else torch.from_numpy(document_boundaries(ids, eos_id))
    return MicroBatch(torch.from_numpy(ids), torch.from_numpy(rows[:, 1:].copy()), boundaries, weight)


def inputs_of(rows: np.ndarray) -> np.ndarray:
    """The ids that enter the model: `rows` [rows, sequence_length + 1] without its last column and without marks."""
    ids = rows[:, :-1]
    return ids ^ (ids >> 63)  # x for x >= 0, ~x below


def document_boundaries(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Cumulative document lengths over the flattened `ids` [rows, time]: int32, from 0 to rows * time.

    An EOS id ends its document and belongs to it; the end of a row ends one too. The result is filled up with the
    total, that is with documents of no tokens, to the next power of two plus one: a few shapes occur, not one for each
    batch, and a kernel that starts programs for each document starts at most twice as many as it needs.
    """
    ends = ids == eos_id
    ends[:, -1] = True
    cumulative = np.flatnonzero(ends) + 1  # [documents]
    padded = np.full(2 ** int(len(cumulative) - 1).bit_length() + 1, ids.size, dtype=np.int32)
    padded[0] = 0
    padded[1 : len(cumulative) + 1] = cumulative
    return padded
