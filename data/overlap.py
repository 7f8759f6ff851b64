"""How much of a validation set occurs word for word in the training data: exact n-gram overlap.

In: the token streams of a training and of a validation dataset. Out: which n-grams of validation the training data has,
by document. An n-gram is n ids in a row inside one document, EOS not among them.

The n-grams of validation are hashed into a sorted table; the training data goes past it once, in constant memory. What
has the hash of a validation n-gram is compared with it id by id, so nothing is reported that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data.order import mix
from data.shards import TokenStream

FILTER_BITS = 26  # of the table that most training n-grams fail at once: 64 MB


@dataclass
class Overlap:
    """What the training data has of one validation set."""

    ngram: int
    ngrams: int = 0  # n-grams of validation, repeated ones counted each time
    found: int = 0  # those that occur in training
    documents: int = 0  # validation documents long enough for an n-gram
    touched: int = 0  # those with an n-gram that occurs in training
    covered: int = 0  # those of which at least half of the n-grams do
    worst: list[tuple[float, int, int]] = field(default_factory=list)  # share, position, length of the worst documents


class OverlapFinder:
    """Marks the n-grams of a validation stream that training data has.

    Args:
        validation: read into memory whole, 8 bytes an id and 25 more an n-gram.
        ngram: ids of an n-gram, at least 1.
    """

    def __init__(self, validation: TokenStream, ngram: int) -> None:
        if ngram < 1:
            raise ValueError(f"ngram={ngram}: use a positive number of ids")
        self.ngram, self.eos_id = ngram, validation.manifest.eos_id
        self._ids = np.concatenate([chunk.astype(np.int64) for chunk in validation.chunks()])
        hashes, begins = ngram_hashes(self._ids, ngram, self.eos_id)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._begins = hashes[order], begins[order]  # [n-grams], rising hashes
        self._found = np.zeros(len(begins), dtype=bool)
        self._filter = np.zeros(2**FILTER_BITS, dtype=bool)
        self._filter[hashes & np.uint64(2**FILTER_BITS - 1)] = True

    def scan(self, train: TokenStream) -> None:
        """Mark every n-gram of validation that `train` has."""
        rest = np.empty(0, dtype=np.int64)
        for chunk in train.chunks():
            ids = np.concatenate((rest, chunk.astype(np.int64)))
            rest = ids[max(0, len(ids) - self.ngram + 1) :] if self.ngram > 1 else rest
            hashes, begins = ngram_hashes(ids, self.ngram, self.eos_id)
            likely = self._filter[hashes & np.uint64(2**FILTER_BITS - 1)]
            self._mark(ids, hashes[likely], begins[likely])

    def _mark(self, ids: np.ndarray, hashes: np.ndarray, begins: np.ndarray) -> None:
        hashes, first = np.unique(hashes, return_index=True)
        begins = begins[first]
        low = np.searchsorted(self._hashes, hashes, side="left")
        high = np.searchsorted(self._hashes, hashes, side="right")
        steps = np.arange(self.ngram)
        for start, stop, begin in zip(low, high, begins, strict=True):
            if start < stop and not self._found[start:stop].all():
                # All of one hash are one n-gram but for a collision, and then none of them is wrongly marked.
                same = self._ids[self._begins[start:stop, None] + steps] == ids[begin : begin + self.ngram]
                self._found[start:stop] |= same.all(1)

    def report(self, worst: int = 3) -> Overlap:
        """What has been found so far, with the `worst` documents of which the training data has most."""
        overlap = Overlap(self.ngram, ngrams=len(self._found), found=int(self._found.sum()))
        ends = np.flatnonzero(self._ids == self.eos_id)  # the document of a position: how many ends are before it
        number = np.searchsorted(ends, self._begins)
        counts = np.bincount(number, minlength=len(ends) + 1)
        found = np.bincount(number[self._found], minlength=len(ends) + 1)
        shares = found / np.maximum(counts, 1)
        overlap.documents = int((counts > 0).sum())
        overlap.touched, overlap.covered = int((found > 0).sum()), int((shares >= 0.5).sum())
        bounds = np.concatenate(([0], ends + 1, [len(self._ids)]))
        for document in np.argsort(-shares, kind="stable")[:worst].tolist():
            if found[document]:
                begin, end = int(bounds[document]), int(bounds[document + 1])
                overlap.worst.append((float(shares[document]), begin, end - begin))
        return overlap


def ngram_hashes(ids: np.ndarray, ngram: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of all n-grams of `ids` (int64) without EOS, uint64, and the positions where they begin, int64."""
    count = len(ids) - ngram + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    with np.errstate(over="ignore"):
        words = mix(ids.astype(np.uint64))
        hashes = np.zeros(count, dtype=np.uint64)
        for step in range(ngram):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[step : step + count]
        hashes = mix(hashes)
    eos_before = np.concatenate(([0], np.cumsum(ids == eos_id)))
    begins = np.flatnonzero(eos_before[ngram:] == eos_before[:count])
    return hashes[begins], begins
