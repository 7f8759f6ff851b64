"""A batch depends on its position alone: not on ranks, micro-batches, prefetching or what was read before."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import BatchLoader
from data.order import InstanceOrder
from data.shards import DataError, ShardWriter, TokenDataset

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


def rows(dataset: TokenDataset, position: int, batch: int, micro: int, world: int, seed: int = 0) -> list[list[int]]:
    """The global batch at `position`, ranks one after the other."""
    found = []
    for rank in range(world):
        loader = BatchLoader(dataset, InstanceOrder(seed, len(dataset)), batch, micro, rank, world)
        for part in loader.batch(position):
            assert part.dtype == torch.int64
            assert part.shape == (micro, LENGTH + 1)
            found += part.tolist()
        loader.close()
    return found


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (12, 1), (3, 2), (1, 3), (2, 6), (1, 12)])
def test_any_ranks_and_micro_batches_give_the_same_global_batch(dataset: TokenDataset, micro: int, world: int) -> None:
    for position in (0, 12, 48, 500):
        assert rows(dataset, position, 12, micro, world) == rows(dataset, position, 12, 12, 1)


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
    order = InstanceOrder(0, len(dataset))
    loader = BatchLoader(dataset, order, 12, 4, 0, 1)
    plain = BatchLoader(dataset, order, 12, 4, 0, 1)
    for ahead, wanted in [(0, 0), (12, 12), (24, 36), (36, 36), (60, 48)]:
        loader.prefetch(ahead)
        for first, second in zip(loader.batch(wanted), plain.batch(wanted), strict=True):
            assert torch.equal(first, second)
    loader.close()
    plain.close()


def test_a_prefetched_batch_is_read_in_the_background_and_once(dataset: TokenDataset) -> None:
    class Watched(TokenDataset):
        threads: list[int]

        def __getitem__(self, index: int) -> np.ndarray:
            self.threads.append(threading.get_ident())
            return super().__getitem__(index)

    watched = Watched(dataset.folder, LENGTH)
    watched.threads = []
    loader = BatchLoader(watched, InstanceOrder(0, len(watched)), 12, 4, 0, 1)
    loader.prefetch(0)
    loader.batch(0)
    assert len(watched.threads) == 12
    assert threading.get_ident() not in watched.threads
    loader.batch(12)
    assert watched.threads[12:] == [threading.get_ident()] * 12
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.ident in watched.threads[:12]]


def test_an_error_of_the_background_read_reaches_the_reader(dataset: TokenDataset) -> None:
    loader = BatchLoader(dataset, InstanceOrder(0, len(dataset)), 12, 4, 0, 1)
    loader.prefetch(-100)
    with pytest.raises(ValueError, match="negative"):
        loader.batch(-100)
    loader.close()


def test_a_batch_that_cannot_be_divided_is_refused_by_name(dataset: TokenDataset) -> None:
    order = InstanceOrder(0, len(dataset))
    with pytest.raises(DataError, match=r"training.global_batch_size=12 .* training.micro_batch_size=4 times 2"):
        BatchLoader(dataset, order, 12, 4, 0, 2)
    with pytest.raises(ValueError, match="permutes 7"):
        BatchLoader(dataset, InstanceOrder(0, 7), 12, 4, 0, 1)
