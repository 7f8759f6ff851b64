"""The order is a bijection in every epoch, different between epochs and seeds, even, and free of tables."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from data.order import InstanceOrder


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 100, 127, 128, 129, 1000, 4096, 4097])
@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890])
def test_each_epoch_visits_every_instance_exactly_once(size: int, seed: int) -> None:
    order = InstanceOrder(seed, size)
    for epoch in (0, 1, 17):
        found = order.order(np.arange(epoch * size, (epoch + 1) * size))
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(size))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    size = 1000
    rows = [InstanceOrder(seed, size).order(np.arange(size) + epoch * size) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, first in enumerate(rows):
        for second in rows[:i]:
            # Independent permutations agree in one place on average (Poisson): ten is out of the question.
            assert (first == second).sum() < 10
        assert (first == np.arange(size)).sum() < 10


def test_a_vector_of_positions_over_many_epochs_gives_what_each_alone_gives() -> None:
    order = InstanceOrder(3, 37)
    positions = np.random.default_rng(0).integers(0, 37 * 50, size=(20, 10))
    alone = [int(order.order(np.array([p]))[0]) for p in positions.reshape(-1).tolist()]
    assert np.array_equal(order.order(positions), np.array(alone).reshape(positions.shape))


@pytest.mark.parametrize("size", [5, 10, 33, 64])
def test_every_position_receives_every_instance_equally_often(size: int) -> None:
    epochs = 4000
    rows = InstanceOrder(7, size).order(np.arange(size * epochs)).reshape(epochs, size)
    for place in (0, size // 2, size - 1):
        counts = np.bincount(rows[:, place], minlength=size)
        chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
        # Mean size - 1, variance 2 (size - 1): five standard deviations.
        assert chi_square < size - 1 + 5 * np.sqrt(2 * (size - 1))


def test_every_pair_of_positions_receives_every_pair_of_instances_equally_often() -> None:
    size, epochs = 12, 30_000
    rows = InstanceOrder(11, size).order(np.arange(size * epochs)).reshape(epochs, size)
    pairs = size * (size - 1)
    for first, second in ((0, 1), (5, 6), (0, 11), (3, 8)):
        counts = np.bincount(rows[:, first] * size + rows[:, second], minlength=size * size).reshape(size, size)
        assert not np.diag(counts).any()
        counts = counts[~np.eye(size, dtype=bool)]
        chi_square = ((counts - epochs / pairs) ** 2 / (epochs / pairs)).sum()
        # Mean pairs - 1, variance 2 (pairs - 1): five standard deviations, on both sides.
        assert abs(chi_square - (pairs - 1)) < 5 * np.sqrt(2 * (pairs - 1))


def test_an_instance_stands_anywhere_in_the_next_epoch() -> None:
    size, epochs = 12, 30_000
    rows = InstanceOrder(5, size).order(np.arange(size * epochs)).reshape(epochs, size)
    places = np.argsort(rows, axis=1)  # [epochs, size], where each instance stands
    counts = np.bincount((places[:-1] * size + places[1:]).reshape(-1), minlength=size * size)
    expected = (epochs - 1) * size / size**2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2  # rows and columns have given sums
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours() -> None:
    size = 4097
    found = InstanceOrder(0, size).order(np.arange(size))
    gaps = np.bincount(np.diff(found) % size, minlength=size)
    assert gaps.max() < 12  # one each on average; a structured order repeats one gap again and again
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.08  # standard deviation 1 / sqrt(4097) = 0.016


def test_a_huge_corpus_needs_no_table() -> None:
    size = 10**12 + 39
    peaks = []
    for _ in range(3):  # other threads of this process are counted too; a table would be there each time
        tracemalloc.start()
        found = InstanceOrder(0, size).order(np.arange(5 * size, 5 * size + 10_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 5_000_000
    assert len(np.unique(found)) == 10_000
    assert found.min() >= 0
    assert found.max() < size


def test_the_order_of_published_runs_stays_what_it_was() -> None:
    """A change of the function would silently change what resumed runs see."""
    assert InstanceOrder(0, 10).order(np.arange(20)).tolist() == [
        7,
        4,
        3,
        8,
        2,
        0,
        6,
        5,
        9,
        1,
        7,
        9,
        4,
        6,
        8,
        0,
        3,
        1,
        2,
        5,
    ]


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        InstanceOrder(0, 0)
    with pytest.raises(ValueError, match="negative"):
        InstanceOrder(0, 5).order(np.array([3, -1]))
