"""What a token dataset consists of, by reading all of it once: how often each id occurs, how long documents are.

In: a token stream. Out: counts, and every way in which the data contradicts its manifest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.shards import TokenStream

LENGTH_BINS = 40  # powers of two: the last one holds documents of 2^39 ids


@dataclass
class TokenStatistics:
    """Counts over a whole dataset."""

    counts: np.ndarray  # int64 [vocab_size]; ids that are too large are not among them
    documents: int  # EOS ids found
    lengths: np.ndarray  # int64 [LENGTH_BINS], documents of 2^i to 2^(i + 1) - 1 ids, EOS included
    longest: int  # ids of the longest document
    problems: list[str]  # sentences; empty for data that is what its manifest says

    @property
    def used(self) -> int:
        """How many different ids occur."""
        return int((self.counts > 0).sum())

    def most_frequent(self, number: int) -> list[tuple[int, int]]:
        """The ids that occur most, with their counts, most frequent first."""
        order = np.argsort(-self.counts, kind="stable")[:number]
        return [(int(i), int(self.counts[i])) for i in order if self.counts[i]]

    def entropy(self) -> float:
        """Of the distribution of ids, in nats: the loss of a model that knows their frequencies and nothing else."""
        p = self.counts[self.counts > 0] / self.counts.sum()
        return float(-(p * np.log(p)).sum())


def statistics(stream: TokenStream) -> TokenStatistics:
    """Count everything in `stream`, in constant memory."""
    manifest = stream.manifest
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    lengths = np.zeros(LENGTH_BINS, dtype=np.int64)
    documents, longest, position, begin, largest = 0, 0, 0, 0, 0
    for chunk in stream.chunks():
        largest = max(largest, int(chunk.max()))
        known = chunk if largest < len(counts) else chunk[chunk < len(counts)]  # a damaged id may be four billion
        counts += np.bincount(known, minlength=len(counts))
        ends = np.flatnonzero(chunk == manifest.eos_id) + position + 1
        position += len(chunk)
        if len(ends):
            sizes = np.diff(np.concatenate(([begin], ends)))
            lengths += np.bincount(np.log2(sizes).astype(np.int64), minlength=LENGTH_BINS)
            longest, begin, documents = max(longest, int(sizes.max())), int(ends[-1]), documents + len(ends)
    problems = []
    if documents != manifest.documents:
        problems.append(f"{documents:,} EOS ids were found and the manifest has {manifest.documents:,} documents")
    if begin != position:
        problems.append(f"the last {position - begin:,} ids have no EOS after them")
    if largest >= manifest.vocab_size:
        problems.append(f"the id {largest} occurs and the tokenizer has {manifest.vocab_size:,}")
    return TokenStatistics(counts, documents, lengths, longest, problems)
