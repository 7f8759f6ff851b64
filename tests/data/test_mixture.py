"""Mixtures: exact proportions in every window, each dataset's instances once an epoch, a position is all the state."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data.loader import BatchLoader
from data.mixture import MAX_PERIOD, InstanceStream, balanced_table, difference, period_counts
from data.order import InstanceOrder
from data.shard_writer import ShardWriter
from data.shards import DataError, TokenDataset

LENGTH = 4
WEIGHTS = [0.5, 0.3, 0.2]


def write(folder: Path, instances: int, first: int, tokenizer: str = "0", eos: int = 0) -> TokenDataset:
    """A dataset whose ids count up from `first`, so that an instance is known by its first id."""
    with ShardWriter(folder, vocab_size=5000, eos_id=eos, tokens_per_file=60) as writer:
        writer.write([list(range(first, first + instances * LENGTH))], text_bytes=1)
        writer.finish(tokenizer={"name": "t", "sha256": tokenizer}, preparation={})
    return TokenDataset(folder, LENGTH)


@pytest.fixture
def datasets(tmp_path: Path) -> list[TokenDataset]:
    return [
        write(tmp_path / name, size, first) for name, size, first in (("a", 37, 1), ("b", 50, 1000), ("c", 5, 3000))
    ]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1], [1]),
        ([0.7], [1]),
        (WEIGHTS, [5, 3, 2]),
        ([5, 3, 2], [5, 3, 2]),
        ([0.1, 0.1, 0.1], [1, 1, 1]),
        ([1, 2.5], [2, 5]),
        ([3e-3, 0.997], [3, 997]),
    ],
)
def test_weights_are_taken_as_they_are_written(weights: list[float], counts: list[int]) -> None:
    assert period_counts(weights) == counts


def test_weights_of_many_digits_are_rounded_to_a_hundred_thousandth_and_nothing_is_lost() -> None:
    weights = [123456789, 987654321, 55, 1]
    counts = period_counts(weights)
    assert sum(counts) == pytest.approx(MAX_PERIOD, abs=len(weights))
    for count, weight in zip(counts, weights, strict=True):
        assert count >= 1
        assert count / sum(counts) == pytest.approx(weight / sum(weights), abs=2e-5)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(DataError, match=f"weight of {weight}"):
        period_counts([1, weight])


def test_every_prefix_of_every_table_is_as_close_to_its_proportions_as_can_be() -> None:
    generator = np.random.default_rng(0)
    tables = [generator.integers(1, 60, size=generator.integers(2, 9)).tolist() for _ in range(60)]
    for counts in [*tables, [1, 1], [1, 99], [997, 3], [1] * 10]:
        table, period, kinds = balanced_table(counts), sum(counts), len(counts)
        assert np.bincount(table, minlength=kinds).tolist() == counts
        so_far = np.cumsum(table[:, None] == np.arange(kinds), axis=0)
        ideal = np.arange(1, period + 1)[:, None] * np.array(counts)  # times period
        largest = np.abs(so_far * period - ideal).max()
        assert largest * (2 * kinds - 2) <= period * (2 * kinds - 3), counts  # Tijdeman's bound, in integers


def test_windows_of_a_mixture_have_the_proportions_of_the_weights(datasets: list[TokenDataset]) -> None:
    numbers, _ = InstanceStream(datasets, WEIGHTS, seed=0).locate(np.arange(100_000))
    chosen = numbers[:, None] == np.arange(3)
    for window in (7, 10, 64, 1000, 1024):
        windows = np.diff(np.cumsum(np.vstack((np.zeros(3, int), chosen)), axis=0)[::window], axis=0)
        error = np.abs(windows - window * np.array(WEIGHTS)).max()
        assert error < (1e-9 if window % 10 == 0 else 2)


def test_each_dataset_goes_through_its_own_epochs(datasets: list[TokenDataset]) -> None:
    stream = InstanceStream(datasets, WEIGHTS, seed=3)
    numbers, instances = stream.locate(np.arange(1000))
    for number, dataset in enumerate(datasets):
        own = instances[numbers == number]
        assert np.array_equal(own, InstanceOrder(3, len(dataset)).order(np.arange(len(own))))
        for epoch in range(len(own) // len(dataset)):
            part = own[epoch * len(dataset) : (epoch + 1) * len(dataset)]
            assert np.array_equal(np.sort(part), np.arange(len(dataset)))


def test_the_epoch_of_a_position_is_that_of_its_own_dataset(datasets: list[TokenDataset]) -> None:
    stream = InstanceStream(datasets, WEIGHTS, seed=3)
    numbers, _ = stream.locate(np.arange(1000))
    epochs = stream.epochs(np.arange(1000))
    for number, dataset in enumerate(datasets):
        own = epochs[numbers == number]
        assert own.tolist() == [place // len(dataset) for place in range(len(own))]


def test_a_position_alone_says_what_stands_there(datasets: list[TokenDataset]) -> None:
    stream = InstanceStream(datasets, WEIGHTS, seed=1)
    numbers, instances = stream.locate(np.arange(500))
    again = InstanceStream(datasets, WEIGHTS, seed=1)
    for position in (499, 0, 123, 7):
        number, instance = again.locate(np.array([position]))
        assert (number[0], instance[0]) == (numbers[position], instances[position])
    far = 10**15
    numbers, instances = again.locate(np.array([far, far + 10]))
    assert numbers[0] == numbers[1]
    with pytest.raises(ValueError, match="negative"):
        again.locate(np.array([-1]))


def test_one_dataset_is_the_stream_of_its_order_alone(datasets: list[TokenDataset]) -> None:
    numbers, instances = InstanceStream(datasets[:1], [0.3], seed=5).locate(np.arange(200))
    assert not numbers.any()
    assert np.array_equal(instances, InstanceOrder(5, len(datasets[0])).order(np.arange(200)))


@pytest.mark.parametrize(("micro", "world", "workers"), [(1, 1, 1), (5, 2, 2), (2, 5, 1), (4, 5, 3)])
def test_batches_of_a_mixture_are_the_same_for_any_ranks_and_micro_batches(
    datasets: list[TokenDataset], micro: int, world: int, workers: int
) -> None:
    def batch(position: int, micro: int, world: int, workers: int) -> list[list[int]]:
        rows: list[list[int]] = []
        for rank in range(world):
            loader = BatchLoader(InstanceStream(datasets, WEIGHTS, 0), 20, micro, rank, world, workers=workers)
            rows += [row for part in loader.batch(position) for row in part.inputs.tolist()]
            loader.close()
        return rows

    for position in (0, 20, 13, 4000):
        assert batch(position, micro, world, workers) == batch(position, 20, 1, 1)


def test_the_fingerprint_covers_content_and_shares(datasets: list[TokenDataset]) -> None:
    stream = InstanceStream(datasets, WEIGHTS, seed=0)
    assert stream.fingerprint == InstanceStream(datasets, [5, 3, 2], seed=9).fingerprint
    others = [
        InstanceStream(datasets, [0.4, 0.4, 0.2], 0),
        InstanceStream(datasets[:2], [0.5, 0.5], 0),
        InstanceStream([datasets[1], datasets[0], datasets[2]], WEIGHTS, 0),
    ]
    assert len({stream.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert InstanceStream(datasets[:1], [1], 0).fingerprint == datasets[0].manifest.fingerprint
    assert [Fraction(source.share) for source in stream.sources] == [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]


def test_a_difference_names_what_changed(datasets: list[TokenDataset], tmp_path: Path) -> None:
    saved = [asdict(source) for source in InstanceStream(datasets[:2], [1, 1], 0).sources]
    assert difference(saved, InstanceStream(datasets[:2], [2, 2], 0).sources) == ""
    text = difference(saved, InstanceStream(datasets[:2], [1, 3], 0).sources)
    assert "share 1/2 → 1/4" in text
    assert "share 1/2 → 3/4" in text
    assert "c is new" in difference(saved, InstanceStream(datasets, WEIGHTS, 0).sources)
    assert "b was there and is gone" in difference(saved, InstanceStream(datasets[:1], [1], 0).sources)
    changed = write(tmp_path / "other", 30, 1)
    text = difference(saved, InstanceStream([datasets[0], changed], [1, 1], 0).sources)
    assert text.startswith(f"{tmp_path / 'b' / ''}".rstrip("/"))
    assert "tokens 201 → 121" in text
    assert "fingerprint" in text


def test_datasets_that_do_not_go_together_are_refused(datasets: list[TokenDataset], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different tokenizers"):
        InstanceStream([datasets[0], write(tmp_path / "t", 9, 1, tokenizer="1")], [1, 1], 0)
    with pytest.raises(DataError, match=r"different EOS ids \(7 and 0\)"):
        InstanceStream([datasets[0], write(tmp_path / "e", 9, 1, eos=7)], [1, 1], 0)
    with pytest.raises(ValueError, match="sequence lengths"):
        InstanceStream([datasets[0], TokenDataset(datasets[1].folder, 8)], [1, 1], 0)
