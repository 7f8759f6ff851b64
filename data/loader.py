"""Batches of a training run: which instances a rank computes at a step, read while the step before runs.

In: a `TokenDataset`, an `InstanceOrder`, the batch sizes, this process's rank. Out: micro-batches as torch tensors.
There is no state to save: a batch depends on nothing but its position in the stream of instances.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data.order import InstanceOrder
from data.shards import DataError, TokenDataset


class BatchLoader:
    """Micro-batches of one rank.

    The global batch at stream position p is the instances `order(p .. p + global_batch_size - 1)`; rank r computes the
    r-th of `world_size` equal runs of it, cut into micro-batches in order. So the set of instances of a batch, and even
    their order over ranks, is the same for every number of ranks and every micro-batch size.

    Raises `DataError` when the global batch cannot be divided.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: InstanceOrder,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        if order.size != len(dataset):
            raise ValueError(f"the order permutes {order.size} instances, the dataset has {len(dataset)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if min(global_batch_size, micro_batch_size) < 1 or global_batch_size % (micro_batch_size * world_size):
            raise DataError(
                f"training.global_batch_size={global_batch_size} cannot be divided over {world_size} rank(s): use a "
                f"multiple of training.micro_batch_size={micro_batch_size} times {world_size}."
            )
        self.dataset = dataset
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self._per_rank = global_batch_size // world_size
        self._offset = rank * self._per_rank
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        self._prefetched: tuple[int, Future[list[torch.Tensor]]] | None = None

    def batch(self, position: int) -> list[torch.Tensor]:
        """This rank's micro-batches of the global batch that begins at stream position `position`.

        Returns int64 tensors `[micro_batch_size, sequence_length + 1]`: inputs are `[:, :-1]`, targets `[:, 1:]`.
        """
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == position:
            return prefetched[1].result()
        return self._read(position)

    def prefetch(self, position: int) -> None:
        """Begin reading the batch at `position` in the background; the next `batch(position)` takes it."""
        self._prefetched = (position, self._executor.submit(self._read, position))

    def close(self) -> None:
        """Stop the background thread. A closed loader still reads, but no longer ahead."""
        self._prefetched = None
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _read(self, position: int) -> list[torch.Tensor]:
        first = position + self._offset
        instances = self.order.order(np.arange(first, first + self._per_rank, dtype=np.int64))
        rows = np.stack([self.dataset[index] for index in instances.tolist()])  # [per_rank, sequence_length + 1]
        if rows.max() >= self.dataset.manifest.vocab_size:  # an index error on a GPU would say nothing
            raise DataError(
                f"{self.dataset.folder} holds the id {rows.max()} and its tokenizer has only "
                f"{self.dataset.manifest.vocab_size}: the files are damaged, so remove the folder and prepare it again."
            )
        return list(torch.from_numpy(rows).split(self.micro_batch_size))
