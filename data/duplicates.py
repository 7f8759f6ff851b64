"""Exact duplicates in a split: which documents are word for word an earlier one, whatever process reads them.

In: the parts of a split. Out: for each part the numbers of the documents to leave out.

Two passes over the text, as a decision may depend on a part that another process or machine reads. The first
(`HashPart`) writes a 128-bit hash (BLAKE2b) of every document, sorted, a file a part. `find_repeats` then walks through
the space of hashes range by range, each of which lies together in every file: memory holds one range, however many
documents there are. Of equal texts the first in the order of the split stays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.readers import Broken
from data.sources import Part
from data.tokenize import TextTokenizer
from data.tokenized_parts import writing

ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4")])  # a document's hash and its place in its part
RANGE_DOCUMENTS = 4_000_000  # compared at once: about 400 MB with the sorting


def repeats_path(folder: Path, index: int) -> Path:
    """Where the numbers of the documents of part `index` to leave out are, uint32, ascending."""
    return folder / f"{index:05d}.repeats.npy"


@dataclass(frozen=True)
class HashPart:
    """The first pass over one part; what is broken is left to the second."""

    part: Part
    path: Path  # of the file of hashes

    def run(self, tokenizer: TextTokenizer, report: Callable[[int, int], None]) -> None:
        """Write the hashes of the part, telling `report` how far it is."""
        digests, position, reported = bytearray(), 0, 0
        for item, position in self.part.read():
            if not isinstance(item, Broken) and item:
                digests += hashlib.blake2b(item.encode(), digest_size=16).digest()
                if len(digests) % 2**16 == 0:
                    report(position - reported, 0)
                    reported = position
        report(position - reported, 0)
        halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        entries = np.empty(len(halves), dtype=ENTRY)
        entries["high"], entries["low"] = halves[:, 0], halves[:, 1]
        entries["number"] = np.arange(len(halves))
        _save(self.path, entries[np.lexsort((halves[:, 1], halves[:, 0]))])


def find_repeats(hashes: Sequence[Path], folder: Path) -> None:
    """Write the repeats of all parts to `folder`, from the files of their `hashes`, unless it was done before."""
    done = folder / "repeats.npy"
    if done.exists():
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tables = [np.load(path, mmap_mode="r") for path in hashes]
    documents = sum(map(len, tables))
    ranges = max(1, -(-documents // RANGE_DOCUMENTS))
    repeats: list[list[np.ndarray]] = [[] for _ in tables]
    starts = [0] * len(tables)
    for number in range(ranges):
        last = np.uint64(2**64 - 1) if number == ranges - 1 else np.uint64((number + 1) * 2**64 // ranges - 1)
        stops = [int(np.searchsorted(table["high"], last, side="right")) for table in tables]
        entries = np.concatenate([table[i:j] for table, i, j in zip(tables, starts, stops, strict=True)])
        parts_of = np.repeat(np.arange(len(tables), dtype=np.uint32), np.subtract(stops, starts))
        # A stable sort: equal hashes stay in the order of parts, and inside a part in that of documents.
        order = np.lexsort((entries["low"], entries["high"]))
        high, low = entries["high"][order], entries["low"][order]
        repeated = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
        for index in np.unique(parts_of[repeated]).tolist():
            repeats[index].append(entries["number"][repeated[parts_of[repeated] == index]])
        starts = stops
    for index, found in enumerate(repeats):
        _save(repeats_path(folder, index), np.sort(np.concatenate([np.empty(0, np.uint32), *found])))
    _save(done, np.array([sum(len(a) for found in repeats for a in found)]))


def _save(path: Path, array: np.ndarray) -> None:
    """Write in one step, by a name that no other process uses: tasks on several machines may write the same file."""
    partial = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    with writing(path.parent):
        with open(partial, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
