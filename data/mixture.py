"""The stream of instances that a run trains on: one dataset, or several in fixed proportions.

In: datasets, their weights, a seed. Out: which instance stands at each position of an endless stream, a pure function
of the position: how many instances were consumed is all there is to remember.

*Proportions.* Weights become integers c_i that sum to a period P. A table of P entries says which dataset a position
belongs to, and repeats. It is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980):
among the first n positions, dataset i has within 1 - 1/(2k - 2) of n c_i / P instances, for k datasets and every n, the
best possible. So a window of any length misses a proportion by less than two instances, and a multiple of P by none.

*Order.* The j-th instance of a dataset in the stream is the j-th of its own `InstanceOrder`: each dataset goes through
its own epochs, every instance once in each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np

from data.order import InstanceOrder
from data.shards import DataError, Instances

MAX_PERIOD = 100_000  # proportions that need a longer period are rounded to one of this length: to 1e-5


@dataclass(frozen=True)
class Source:
    """What one dataset of a stream is, for a checkpoint and for a reader."""

    path: str  # where it was
    share: str  # of the stream's instances, a fraction such as 3/10
    fingerprint: str  # of its ids
    tokenizer: str  # SHA-256 of tokenizer.json
    documents: int
    tokens: int
    instances: int


class InstanceStream:
    """The instances of a run, in the order in which it sees them.

    Args:
        datasets: what to read, all of one tokenizer and one sequence length.
        weights: positive, one a dataset; their proportions count. They are taken as they are written: 0.3 is 3/10.
        seed: of the order within every dataset.

    Raises `DataError` when the datasets do not go together.
    """

    def __init__(self, datasets: Sequence[Instances], weights: Sequence[float], seed: int) -> None:
        if len(datasets) != len(weights) or not datasets:
            raise ValueError(f"{len(datasets)} datasets, {len(weights)} weights: give one weight a dataset")
        first = datasets[0].stream.manifest
        for dataset in datasets[1:]:
            if dataset.stream.manifest.tokenizer["sha256"] != first.tokenizer["sha256"]:
                raise DataError(
                    f"{dataset.stream.folder} and {datasets[0].stream.folder} have different tokenizers: "
                    "prepare both with the same one."
                )
            if dataset.stream.manifest.eos_id != first.eos_id:
                raise DataError(
                    f"{dataset.stream.folder} and {datasets[0].stream.folder} have different EOS ids "
                    f"({dataset.stream.manifest.eos_id} and {first.eos_id}): prepare both with the same one."
                )
            if dataset.sequence_length != datasets[0].sequence_length:
                raise ValueError("the datasets have different sequence lengths")
        self.datasets = list(datasets)
        self.sequence_length = datasets[0].sequence_length
        self.eos_id = first.eos_id
        self.tokenizer = first.tokenizer
        self.vocab_size = max(dataset.stream.manifest.vocab_size for dataset in datasets)
        self.counts = period_counts(weights)  # of each dataset in a period
        self.period = sum(self.counts)
        self._orders = [InstanceOrder(seed, len(dataset)) for dataset in datasets]
        self._table = balanced_table(self.counts)  # [period], the dataset of each position
        self._rank = np.empty(self.period, dtype=np.int64)  # how many of its own dataset precede it in the period
        for number, count in enumerate(self.counts):
            self._rank[self._table == number] = np.arange(count)

    @property
    def size(self) -> int:
        """Instances of all datasets together."""
        return sum(map(len, self.datasets))

    @property
    def sources(self) -> list[Source]:
        """A description of every dataset."""
        found = []
        for dataset, count in zip(self.datasets, self.counts, strict=True):
            manifest = dataset.stream.manifest
            found.append(
                Source(
                    path=str(dataset.stream.folder),
                    share=str(Fraction(count, self.period)),
                    fingerprint=manifest.fingerprint,
                    tokenizer=manifest.tokenizer["sha256"],
                    documents=manifest.documents,
                    tokens=manifest.tokens,
                    instances=len(dataset),
                )
            )
        return found

    @property
    def fingerprint(self) -> str:
        """Short hex digest of the content: that of the ids of a single dataset, else of all with their shares."""
        sources = self.sources
        if len(sources) == 1:
            return sources[0].fingerprint
        content = [[source.fingerprint, source.share] for source in sources]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def datasets_at(self, positions: np.ndarray) -> np.ndarray:
        """Number of the dataset that each of `positions` (int64 [n], ≥ 0) belongs to: int64 [n]."""
        return self._table[positions % self.period]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and instance in it at each of `positions` (int64 [n], ≥ 0): two int64 [n]."""
        numbers, before = self._precede(positions)
        instances = np.empty_like(before)
        for number, order in enumerate(self._orders):
            chosen = numbers == number
            instances[chosen] = order.order(before[chosen])
        return numbers, instances

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """Epoch, from 0, of its own dataset that each of `positions` (int64 [n], ≥ 0) stands in: int64 [n]."""
        numbers, before = self._precede(positions)
        return before // np.array([len(dataset) for dataset in self.datasets])[numbers]

    def _precede(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset at each of `positions`, and how many of its own instances come before: two int64 [n]."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} is negative: positions count from 0")
        periods, places = np.divmod(positions, self.period)
        numbers = self._table[places]
        return numbers, periods * np.array(self.counts)[numbers] + self._rank[places]

    def rows(self, numbers: np.ndarray, instances: np.ndarray) -> np.ndarray:
        """The ids of located instances: int64 `[n, sequence_length + 1]` (see `data.shards.Instances`)."""
        out = np.empty((len(numbers), self.sequence_length + 1), dtype=np.int64)
        for row, number, instance in zip(out, numbers.tolist(), instances.tolist(), strict=True):
            row[:] = self.datasets[number][instance]
            manifest = self.datasets[number].stream.manifest
            if row.max() >= manifest.vocab_size:  # an index error on a GPU would say nothing
                folder = self.datasets[number].stream.folder
                raise DataError(
                    f"{folder} holds the id {row.max()} and its tokenizer has only {manifest.vocab_size}: the files "
                    "are damaged, so remove the folder and prepare it again."
                )
        return out

    def target_count(self, numbers: np.ndarray, instances: np.ndarray) -> int:
        """How many targets the located instances have together."""
        return sum(
            int(dataset.target_counts(instances[numbers == number]).sum())
            for number, dataset in enumerate(self.datasets)
        )


def period_counts(weights: Sequence[float]) -> list[int]:
    """Integers in the proportions of `weights`, as small as they can be; rounded where they would sum to over 1e5.

    Every dataset keeps at least one instance a period. Raises `DataError` for a weight that is not positive.
    """
    for weight in weights:
        if not 0 < weight < math.inf:
            raise DataError(f"data.mixture has a weight of {weight}: use a positive number.")
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [max(1, math.floor(share * MAX_PERIOD)) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_PERIOD)
    for i in by_rest[: max(0, MAX_PERIOD - sum(counts))]:
        counts[i] += 1
    return counts


def balanced_table(counts: Sequence[int]) -> np.ndarray:
    """Which of k kinds stands at each of sum(counts) places, as evenly as can be: int64 [sum(counts)].

    Tijdeman's rule in integers. With s_i = n c_i / P - (times chosen so far), after n places: place n + 1 goes to the
    kind with the least (1 - 1/(2k - 2) - s_i) P / c_i, among those with s_i + c_i / P ≥ 1/(2k - 2).
    """
    kinds, period = len(counts), sum(counts)
    if kinds == 1:
        return np.zeros(period, dtype=np.int64)
    scale = 2 * kinds - 2
    surplus = [0] * kinds  # s_i * period
    table = np.empty(period, dtype=np.int64)
    for place in range(period):
        chosen, least = -1, 0
        for i in range(kinds):
            wait = (scale - 1) * period - scale * surplus[i]  # over counts[i], and compared so
            due = (surplus[i] + counts[i]) * scale >= period
            if due and (chosen < 0 or wait * counts[chosen] < least * counts[i]):
                chosen, least = i, wait
        for i in range(kinds):
            surplus[i] += counts[i]
        surplus[chosen] -= period
        table[place] = chosen
    return table


def difference(saved: Sequence[dict[str, object]], current: Sequence[Source]) -> str:
    """What tells the datasets of a checkpoint, as it holds them, from those of now: a clause for each that changed."""
    now = [asdict(source) for source in current]
    clauses = []
    for number in range(max(len(saved), len(now))):
        old = saved[number] if number < len(saved) else None
        new = now[number] if number < len(now) else None
        if old is None or new is None:
            only = old or new
            assert only is not None
            clauses.append(f"{only['path']} {'was there and is gone' if new is None else 'is new'}")
            continue
        compared = [key for key in old if key != "path" and key in new and old[key] != new[key]]
        if compared:
            values = ", ".join(f"{key} {old[key]} → {new[key]}" for key in compared)
            clauses.append(f"{old['path']} → {new['path']}: {values}")
    return "; ".join(clauses)
