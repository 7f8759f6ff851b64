"""A batch depends on its position alone: not on ranks, micro-batches, prefetching or what was read before."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.documents import document_boundaries
from data.loader import BatchLoader
from data.mixture import InstanceStream
from data.shard_writer import ShardWriter
from data.shards import DataError, TokenDataset

LENGTH = 4
INSTANCES = 50


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    """Ids count up, so an instance is known by its first id."""
    with ShardWriter(tmp_path, vocab_size=1000, eos_id=999, tokens_per_file=60) as writer:
        writer.write([list(range(i, i + 20)) for i in range(0, 200, 20)], text_bytes=1)
        writer.finish(tokenizer={"name": "t", "sha256": "0"}, preparation={})
    dataset = TokenDataset(tmp_path, LENGTH)
    assert len(dataset) == INSTANCES + 2
    return dataset


def stream(dataset: TokenDataset, seed: int = 0) -> InstanceStream:
    return InstanceStream([dataset], [1.0], seed)


def rows(
    dataset: TokenDataset, position: int, batch: int, micro: int, world: int, seed: int = 0, workers: int = 1
) -> list[list[int]]:
    """The global batch at `position`, ranks one after the other."""
    found = []
    for rank in range(world):
        loader = BatchLoader(stream(dataset, seed), batch, micro, rank, world, workers=workers)
        for part in loader.batch(position):
            assert part.inputs.dtype == part.targets.dtype == torch.int64
            assert part.inputs.shape == part.targets.shape == (micro, LENGTH)
            assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])
            assert part.cu_seqlens is None
            assert part.weight == micro * world / batch
            found += torch.cat((part.inputs, part.targets[:, -1:]), 1).tolist()
        loader.close()
    return found


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (12, 1), (3, 2), (1, 3), (2, 6), (1, 12)])
def test_any_ranks_micro_batches_and_workers_give_the_same_global_batch(
    dataset: TokenDataset, micro: int, world: int, workers: int
) -> None:
    for position in (0, 12, 48, 500):
        assert rows(dataset, position, 12, micro, world, workers=workers) == rows(dataset, position, 12, 12, 1)


def test_another_batch_size_goes_on_with_the_same_stream(dataset: TokenDataset) -> None:
    want = [row for position in range(0, 96, 12) for row in rows(dataset, position, 12, 4, 1)]
    sizes = [12, 12, 24, 6, 6, 36]  # changed on the way, at positions that the instances consumed give
    got, position = [], 0
    for size in sizes:
        got += rows(dataset, position, size, 3, 2)
        position += size
    assert got == want


def test_an_epoch_of_batches_holds_each_instance_once_and_wraps_within_a_batch(dataset: TokenDataset) -> None:
    size, batch = len(dataset), 12
    seen = [row for position in range(0, 3 * size, batch) for row in rows(dataset, position, batch, 4, 1)]
    everything = sorted(dataset[i].tolist() for i in range(size))
    assert size % batch  # epochs end inside batches
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == everything
    assert seen[:size] != seen[size : 2 * size]


def test_two_loaders_agree_and_seeds_differ(dataset: TokenDataset) -> None:
    assert rows(dataset, 24, 12, 4, 1) == rows(dataset, 24, 12, 4, 1)
    assert rows(dataset, 24, 12, 4, 1) != rows(dataset, 24, 12, 4, 1, seed=1)


def test_prefetching_changes_nothing_also_when_another_batch_is_asked_for(dataset: TokenDataset) -> None:
    loader = BatchLoader(stream(dataset), 12, 4, 0, 1)
    plain = BatchLoader(stream(dataset), 12, 4, 0, 1)
    for ahead, wanted in [(0, 0), (12, 12), (24, 36), (36, 36), (60, 48)]:
        loader.prefetch(ahead)
        assert loader.ready(ahead)
        for first, second in zip(loader.batch(wanted), plain.batch(wanted), strict=True):
            assert torch.equal(first.inputs, second.inputs)
            assert torch.equal(first.targets, second.targets)
    loader.close()
    plain.close()


def test_a_prefetched_batch_is_read_in_the_background_and_once(dataset: TokenDataset) -> None:
    class Watched(TokenDataset):
        threads: list[threading.Thread]

        def __getitem__(self, index: int) -> np.ndarray:
            self.threads.append(threading.current_thread())
            return super().__getitem__(index)

    watched = Watched(dataset.folder, LENGTH)
    watched.threads = []
    loader = BatchLoader(stream(watched), 12, 4, 0, 1)
    loader.prefetch(0)
    loader.batch(0)
    assert len(watched.threads) == 12
    assert threading.current_thread() not in watched.threads
    loader.close()
    assert not any(thread.is_alive() for thread in watched.threads)


def test_a_lost_file_is_an_error_with_its_name_and_the_loader_says_so_before_the_step(dataset: TokenDataset) -> None:
    loader = BatchLoader(stream(dataset), 12, 4, 0, 1)
    assert loader.ready(0)
    (dataset.folder / "00001.bin").unlink()
    assert len(loader.batch(0)) == 3
    loader.prefetch(12)
    assert not loader.ready(12)
    assert loader.failure is not None
    assert "00001.bin cannot be read any more" in loader.failure
    with pytest.raises(DataError, match=r"00001\.bin cannot be read any more"):
        loader.batch(24)
    loader.close()


def test_a_file_that_is_cut_short_is_an_error_and_not_the_end_of_the_process(dataset: TokenDataset) -> None:
    loader = BatchLoader(stream(dataset), 12, 4, 0, 1)
    (dataset.folder / "00002.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"00002\.bin has changed since it was opened \(0 bytes, 1\d\d before\)"):
        loader.batch(0)
    loader.close()


def test_a_read_that_hangs_is_an_error_in_time_and_does_not_hold_the_process(dataset: TokenDataset) -> None:
    release = threading.Event()

    class Hanging(TokenDataset):
        def __getitem__(self, index: int) -> np.ndarray:
            release.wait()
            return super().__getitem__(index)

    loader = BatchLoader(stream(Hanging(dataset.folder, LENGTH)), 12, 4, 0, 1, timeout=0.05)
    try:
        with pytest.raises(DataError, match=r"gave no batch within data\.timeout=0\.05 seconds"):
            loader.batch(0)
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("batch-loader"))
    finally:
        release.set()
        loader.close()


def test_an_id_that_the_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, vocab_size=10, eos_id=9, tokens_per_file=60) as writer:
        writer.write([[1, 2, 3, 70, 5, 6]], text_bytes=1)
        writer.finish(tokenizer={"name": "t", "sha256": "0"}, preparation={})
    loader = BatchLoader(stream(TokenDataset(tmp_path, LENGTH)), 1, 1, 0, 1)
    with pytest.raises(DataError, match="holds the id 70 and its tokenizer has only 10"):
        loader.batch(0)
    loader.close()


def test_a_batch_that_cannot_be_divided_is_refused_by_name(dataset: TokenDataset) -> None:
    with pytest.raises(DataError, match=r"training.global_batch_size=12 .* training.micro_batch_size=4 times 2"):
        BatchLoader(stream(dataset), 12, 4, 0, 2)


def test_document_boundaries_come_with_the_batch_when_they_are_asked_for(dataset: TokenDataset) -> None:
    loader = BatchLoader(stream(dataset), 12, 4, 0, 1, document_mask=True)
    for part in loader.batch(0):
        assert part.cu_seqlens is not None
        assert part.cu_seqlens.tolist() == document_boundaries(part.inputs.numpy(), 999).tolist()
    loader.close()


def test_all_reads_that_hang_together_hold_the_end_of_a_rank_no_longer_than_one(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.loader.CLOSING", 0.3)
    all_read, release = threading.Barrier(9), threading.Event()

    class Hanging(InstanceStream):
        def rows(self, *located: np.ndarray) -> np.ndarray:
            all_read.wait(30)
            release.wait(30)
            return super().rows(*located)

    loader = BatchLoader(Hanging([dataset], [1.0], 0), 8, 1, 0, 1, workers=8)
    loader.prefetch(0)
    all_read.wait(30)
    begin = time.monotonic()
    loader.close()
    assert 0.3 <= time.monotonic() - begin < 8 * 0.3
    release.set()
