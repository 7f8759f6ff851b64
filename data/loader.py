"""Batches of a training run: which instances a rank computes at a step, read while the step before runs.

In: an `InstanceStream`, the batch sizes, this process's rank. Out: micro-batches as torch tensors, in pinned memory on
request. There is no state to save: a batch depends on nothing but its position in the stream of instances.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial

import numpy as np

from data.documents import MicroBatch, micro_batch
from data.mixture import InstanceStream
from data.shards import DataError

CLOSING = 5.0  # seconds that all threads together may take to end: other ranks wait for this one meanwhile


class BatchLoader:
    """Micro-batches of one rank.

    The global batch at stream position p is the instances at p .. p + global_batch_size - 1; rank r computes the r-th
    of `world_size` equal runs of it, cut into micro-batches in order. So the set of instances of a batch, and even
    their order over ranks, is the same for every number of ranks, micro-batch size and number of threads.

    Args:
        stream: what stands at every position.
        global_batch_size, micro_batch_size: instances of a step over all ranks; of one computation on one rank.
        rank, world_size: this process among those that share the batch.
        document_mask: give micro-batches document boundaries.
        pin_memory: leave micro-batches in pinned memory (needs CUDA).
        workers: threads that read, each a micro-batch at a time.
        timeout: seconds a batch may take to come; more are an error, not a hang.

    Raises `DataError` when the global batch cannot be divided.
    """

    def __init__(
        self,
        stream: InstanceStream,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        *,
        document_mask: bool = False,
        pin_memory: bool = False,
        workers: int = 1,
        timeout: float = 300.0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if min(global_batch_size, micro_batch_size) < 1 or global_batch_size % (micro_batch_size * world_size):
            raise DataError(
                f"training.global_batch_size={global_batch_size} cannot be divided over {world_size} rank(s): use a "
                f"multiple of training.micro_batch_size={micro_batch_size} times {world_size}."
            )
        self.stream = stream
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.timeout = timeout
        self.waited = 0.0  # seconds that `batch` and `ready` have waited, in all
        self.failure: str | None = None  # why the last batch that `ready` waited for could not be read
        self._eos_id = stream.eos_id if document_mask else None
        self._pin_memory = pin_memory
        self._prefetched: tuple[int, list[Future[MicroBatch]]] | None = None
        self._held: tuple[int, list[MicroBatch]] | None = None
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Threads of our own, since those of an executor are joined at exit: a read that hangs would hang the process.
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-loader-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def batch(self, position: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch that begins at stream position `position`.

        Raises `DataError` when it cannot be read, or does not come in time.
        """
        held, self._held = self._held, None
        if held is not None and held[0] == position:
            return held[1]
        if self._prefetched is None or self._prefetched[0] != position:
            self.prefetch(position)
        assert self._prefetched is not None
        (_, futures), self._prefetched = self._prefetched, None
        begin = time.perf_counter()
        try:
            deadline = begin + self.timeout
            return [future.result(max(0.0, deadline - time.perf_counter())) for future in futures]
        except TimeoutError as error:
            raise DataError(
                f"{self._where()} gave no batch within data.timeout={self.timeout:g} seconds: look at its disk or "
                "network, or allow more."
            ) from error
        except OSError as error:
            raise DataError(f"{self._where()} cannot be read ({error}).") from error
        finally:
            self.waited += time.perf_counter() - begin

    def ready(self, position: int) -> bool:
        """Wait for the batch at `position`, which `batch` then returns; False when it cannot be read (see `failure`).

        With this every rank learns what one of them lacks before a step that they do together.
        """
        try:
            self._held = position, self.batch(position)
        except DataError as error:
            self.failure = str(error)
        return self._held is not None

    def prefetch(self, position: int) -> None:
        """Begin reading the batch at `position` in the background; the next `batch(position)` takes it."""
        targets = cache(partial(self._targets, position))
        per_rank = self.global_batch_size // self.world_size
        first = position + self.rank * per_rank
        starts = range(first, first + per_rank, self.micro_batch_size)
        self._prefetched = position, [self._submit(partial(self._read, start, targets)) for start in starts]

    def close(self) -> None:
        """Stop the background threads. One whose read hangs is left behind: it ends with the process."""
        self._prefetched = None
        with suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(timeout=max(0.0, end - time.monotonic()))

    def _submit(self, read: Callable[[], MicroBatch]) -> Future[MicroBatch]:
        future: Future[MicroBatch] = Future()

        def task() -> None:
            try:
                future.set_result(read())
            except BaseException as error:  # for whoever waits
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _targets(self, position: int) -> int:
        """Targets of the whole global batch at `position`, of all ranks."""
        return self.stream.target_count(*self.stream.locate(np.arange(position, position + self.global_batch_size)))

    def _read(self, start: int, targets: Callable[[], int]) -> MicroBatch:
        """The micro-batch that begins at stream position `start`."""
        rows = self.stream.rows(*self.stream.locate(np.arange(start, start + self.micro_batch_size)))
        weight = int((rows[:, 1:] >= 0).sum()) * self.world_size / max(targets(), 1)
        read = micro_batch(rows, self._eos_id, weight)
        return read.pin_memory() if self._pin_memory else read

    def _where(self) -> str:
        return " or ".join(str(dataset.stream.folder) for dataset in self.stream.datasets)
