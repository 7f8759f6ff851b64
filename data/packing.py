"""Best-fit packing: whole documents put together into instances, instead of windows that cut them.

In: a token dataset, found to end each document with EOS. Out: instances made of whole documents, filled up with
padding; only a document that is longer than an instance is cut. (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830: best-fit decreasing.)

A document of n ids gives n - 1 targets: its first id follows nothing and is none. One longer than `sequence_length + 1`
becomes pieces of `sequence_length + 1` ids of which each begins with the last id of the one before, so that every
target is kept, once.

The result is an index, made once in constant memory and kept beside the shards as `packing-LENGTH/`:

    pieces.bin     uint64: position of each piece in the stream, instance after instance
    lengths.bin    uint32: ids of each piece
    ends.bin       uint64: number of pieces up to the end of each instance
    targets.bin    uint32: targets of each instance
    packing.json   fingerprint of the data, SHA-256 of these files, the shares of padding and cuts; written last

An index that is cut short, altered or of other data is made again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.host_lock import host_lock
from data.shards import (
    DataError,
    TokenStream,
    check_sequence_length,
    partial_path,
    sha256_of,
    write_atomically,
)

BLOCK = 2**20  # documents packed together: bounds the memory to about 200 MB; packing more gains nothing
NAME = "packing.json"
ARRAYS: dict[str, np.dtype[np.unsignedinteger[Any]]] = {
    "pieces": np.dtype("<u8"),
    "lengths": np.dtype("<u4"),
    "ends": np.dtype("<u8"),
    "targets": np.dtype("<u4"),
}


@dataclass
class PackingReport:
    """What packing did to a dataset, and what windows would have done."""

    fingerprint: str  # of the data
    sequence_length: int
    instances: int = 0
    documents: int = 0  # ends of documents found, and a last one that has none
    without_targets: int = 0  # documents of a single id, left out
    cut: int = 0  # documents that were longer than an instance
    cut_by_windows: int = 0  # documents that lie in several windows of `sequence_length`
    padding: int = 0  # places without an id, of instances * (sequence_length + 1)
    sha256: dict[str, str] = field(default_factory=dict)  # hex digest of each file of the index, by its name

    @property
    def padding_share(self) -> float:
        """Of all places in instances."""
        return self.padding / (self.instances * (self.sequence_length + 1))

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents in {self.instances:,} instances of {self.sequence_length:,} tokens: "
            f"{self.padding_share:.3%} padding, {self.cut / self.documents:.2%} of documents cut "
            f"(windows cut {self.cut_by_windows / self.documents:.2%})"
        )


class PackedDataset:
    """Instances of a token dataset, packed; the index is made at the first opening, which `say` hears of, and kept.

    Raises `DataError` when the folder is unfinished or damaged, or the index cannot be written.
    """

    def __init__(
        self, folder: str | Path, sequence_length: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        check_sequence_length(sequence_length)
        self.sequence_length = sequence_length
        self.stream = TokenStream(folder)
        index = self.stream.folder / f"packing-{sequence_length}"
        with host_lock(index):
            report = _read_report(index, self.stream)
            if report is None:
                say(f"packing the {self.stream.manifest.documents:,} documents of {self.stream.folder}")
                report = pack(self.stream, sequence_length, index)
                say(f"packed: {report}")
        self.report = report
        arrays = {name: np.memmap(index / f"{name}.bin", dtype=dtype, mode="r") for name, dtype in ARRAYS.items()}
        self._pieces, self._lengths = arrays["pieces"], arrays["lengths"]
        self._ends, self._targets = arrays["ends"], arrays["targets"]

    def __len__(self) -> int:
        return self.report.instances

    def __getitem__(self, index: int) -> np.ndarray:
        """Instance `index`: int64 `[sequence_length + 1]`, as `data.shards.Instances` says. `IndexError` outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"instance {index} of {len(self)} in {self.stream.folder}")
        out = np.full(self.sequence_length + 1, ~self.stream.manifest.eos_id, dtype=np.int64)
        first = int(self._ends[index - 1]) if index else 0
        filled = 0
        for piece in range(first, int(self._ends[index])):
            part = out[filled : filled + int(self._lengths[piece])]
            self.stream.read(int(self._pieces[piece]), part)
            part[0] = ~part[0]
            filled += len(part)
        return out

    def target_counts(self, indices: np.ndarray) -> np.ndarray:
        """Targets of each of the instances `indices`: int64, of the same shape."""
        return self._targets[indices].astype(np.int64)


def pack(stream: TokenStream, sequence_length: int, index: Path) -> PackingReport:
    """Pack a whole dataset, write its index to the folder `index`. Raises `DataError` when that cannot be written."""
    report = PackingReport(stream.manifest.fingerprint, sequence_length)
    partial = partial_path(index)
    try:
        for old in (partial, index):  # of an interrupted attempt; of other data, or damaged
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        pieces_before = 0
        files = {name: open(partial / f"{name}.bin", "wb") for name in ARRAYS}  # noqa: SIM115 (closed below)
        try:
            for starts, lengths in _documents(stream, BLOCK):
                packed = _pack_block(starts, lengths, sequence_length, report)
                packed["ends"] += pieces_before
                pieces_before += len(packed["pieces"])
                for name, dtype in ARRAYS.items():
                    packed[name].astype(dtype).tofile(files[name])
        finally:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
        if not report.instances:
            raise DataError(f"{stream.folder} has no document of two ids or more: nothing can be packed.")
        report.sha256 = _checksums(partial)
        write_atomically(partial / NAME, json.dumps(asdict(report), indent=1).encode())
        try:
            os.replace(partial, index)
        except OSError:
            if _read_report(index, stream) is None:
                raise
            shutil.rmtree(partial)  # another host was faster, and its processes read from there
    except OSError as error:
        raise DataError(
            f"data.packing=best_fit cannot write its index to {index} ({error.strerror}): make {stream.folder} "
            "writable with space for 13 bytes a document, or use data.packing=none."
        ) from error
    return report


def _read_report(index: Path, stream: TokenStream) -> PackingReport | None:
    """The report of a finished and undamaged index of this very data, None when there is none."""
    try:
        report = PackingReport(**json.loads((index / NAME).read_bytes()))
        ends = np.memmap(index / "ends.bin", dtype=ARRAYS["ends"], mode="r")
        counts = dict.fromkeys(("ends", "targets"), report.instances) | dict.fromkeys(
            ("pieces", "lengths"), int(ends[-1])
        )
        sizes = {name: (index / f"{name}.bin").stat().st_size for name in ARRAYS}
        whole = sizes == {name: counts[name] * dtype.itemsize for name, dtype in ARRAYS.items()}
        same = report.fingerprint == stream.manifest.fingerprint and whole and report.sha256 == _checksums(index)
    except (OSError, ValueError, TypeError):
        return None
    return report if same else None


def _checksums(index: Path) -> dict[str, str]:
    return {f"{name}.bin": sha256_of(index / f"{name}.bin") for name in ARRAYS}


def _documents(stream: TokenStream, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions and lengths (EOS included) of all documents in order, int64, `block` or somewhat more at a time."""
    begin, position, waiting = 0, 0, 0
    found: list[np.ndarray] = []
    for chunk in stream.chunks():
        ends = np.flatnonzero(chunk == stream.manifest.eos_id) + position + 1
        position += len(chunk)
        if position == len(stream) and (not len(ends) or ends[-1] != position):
            ends = np.append(ends, position)  # the stream's last document has no EOS
        found.append(ends)
        waiting += len(ends)
        if waiting >= block or position == len(stream):
            all_ends = np.concatenate(found)
            starts = np.concatenate(([begin], all_ends[:-1]))
            yield starts, all_ends - starts
            begin, waiting, found = int(all_ends[-1]), 0, []


def _pack_block(
    starts: np.ndarray, lengths: np.ndarray, sequence_length: int, report: PackingReport
) -> dict[str, np.ndarray]:
    """Pack some documents on their own; counts are added to `report`. Returns the arrays of the index."""
    capacity = sequence_length + 1
    report.documents += len(starts)
    report.without_targets += int((lengths < 2).sum())
    report.cut += int((lengths > capacity).sum())
    report.cut_by_windows += int((starts // sequence_length != (starts + lengths - 1) // sequence_length).sum())
    starts, lengths = _pieces(starts[lengths > 1], lengths[lengths > 1], sequence_length)
    instance = best_fit(lengths, capacity)
    count = int(instance.max()) + 1 if len(instance) else 0
    order = np.lexsort((starts, instance))  # within an instance as in the stream, not the longest first
    filled = np.bincount(instance, weights=lengths, minlength=count).astype(np.int64)
    held = np.bincount(instance, minlength=count)
    report.instances += count
    report.padding += int(count * capacity - filled.sum())
    return {"pieces": starts[order], "lengths": lengths[order], "ends": np.cumsum(held), "targets": filled - held}


def _pieces(starts: np.ndarray, lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of at least two ids, those cut that are longer than an instance: positions and lengths of pieces."""
    counts = -(-(lengths - 1) // sequence_length)
    which = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
    skipped = number * sequence_length
    return starts[which] + skipped, np.minimum(lengths[which] - skipped, sequence_length + 1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the longest piece first, each into the fullest bin that has room for it.

    Args:
        lengths: of the pieces, from 1 to `capacity`.
        capacity: of a bin.

    Returns the bin of every piece, int64, numbered from 0 in the order in which they were opened.
    """
    bins_of_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some bin has room r left: the best fit is the lowest bit from `length` on
    out = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = bins_of_room[room].pop()
            if not bins_of_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, opened
            opened += 1
        out[piece] = chosen
        left = room - length
        if left:
            bins_of_room[left].append(chosen)
            rooms |= 1 << left
    return out
