"""How fast batches are read, and how long a training loop waits for them: `python scripts/benchmark_loading.py SHARDS`.

In: a shards directory, or none: then random ids are written to a temporary folder. Out: Markdown tables on standard
output: tokens a second of one reading process, and the share of its time that a loop waits for its batch, for several
ranks at once that compute at a given speed. The computation is a sleep: the loader is the one of training, the rest is
not measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from data.loader import BatchLoader
from data.mixture import InstanceStream
from data.packing import PackedDataset
from data.shard_writer import ShardWriter
from data.shards import DataError, TokenDataset
from scripts.console import run

EOS = 0


def main(arguments: list[str] | None = None) -> int:
    """Measure as the command line says. Returns the exit status: 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path, help="shards directory (default: random ids)")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="random ids, where no shards are given")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=8, help="instances a rank computes at a time")
    parser.add_argument("--steps", type=int, default=20, help="steps that count")
    parser.add_argument("--ranks", type=int, default=4, help="processes that read at once")
    parser.add_argument("--rate", type=float, default=100_000, help="tokens a second that each rank computes")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a rank in a step")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (options.shards or write_random(Path(scratch), options.tokens)) / "train"
            print(
                f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, torch {torch.__version__}, "
                f"numpy {np.__version__}; instances of {options.sequence_length} tokens\n"
            )
            _reading(folder, options)
            _waiting(folder, options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_random(folder: Path, tokens: int) -> Path:
    """A shards directory of documents of about 400 random ids below 100,000."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "train", vocab_size=100_000, eos_id=EOS, tokens_per_file=2**25) as writer:
        while writer.tokens < tokens:
            block = generator.integers(1, 100_000, size=2**20)
            cuts = np.cumsum(generator.geometric(1 / 400, size=2**20 // 400))
            writer.write(
                [part.tolist() for part in np.split(block, cuts[cuts < len(block)])], text_bytes=4 * len(block)
            )
        writer.finish(tokenizer={"name": "random", "sha256": "0"}, preparation={})
    return folder


def stream_of(folder: Path, length: int, kind: str) -> InstanceStream:
    """The stream that a `kind` of run reads: windows, packed, or a mixture of three datasets."""
    if kind == "packed":
        return InstanceStream([PackedDataset(folder, length)], [1], seed=0)
    datasets = [TokenDataset(folder, length) for _ in range(3 if kind == "mixture" else 1)]
    return InstanceStream(datasets, [0.5, 0.3, 0.2][: len(datasets)], seed=0)


def _reading(folder: Path, options: argparse.Namespace) -> None:
    batch = options.micro_batch_size * options.accumulate
    print("| batches of | ms | million tokens/s, one process |\n|---|---|---|")
    for kind in ("windows", "windows, document masks", "packed", "mixture"):
        stream = stream_of(folder, options.sequence_length, kind)
        loader = BatchLoader(stream, batch, options.micro_batch_size, 0, 1, document_mask="masks" in kind)
        seconds = []
        for step in range(options.steps + 2):
            begin = time.perf_counter()
            loader.batch(step * batch)
            seconds.append(time.perf_counter() - begin)
        loader.close()
        middle = float(np.median(seconds[2:]))
        print(f"| {batch} × {kind} | {middle * 1e3:.2f} | {batch * options.sequence_length / middle / 1e6:.1f} |")


def _waiting(folder: Path, options: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(options.ranks), context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(i, folder, options, barrier, results)) for i in range(options.ranks)]
    for rank in ranks:
        rank.start()
    found = sorted(results.get() for _ in ranks)
    for rank in ranks:
        rank.join()
    print(f"\n{options.ranks} ranks × {options.rate:,.0f} tokens/s, {options.steps} steps:\n")
    print("| rank | seconds | waited, ms | share |\n|---|---|---|---|")
    for number, seconds, waited in found:
        print(f"| {number} | {seconds:.2f} | {waited * 1e3:.2f} | {waited / seconds:.4%} |")


def _rank(number: int, folder: Path, options: argparse.Namespace, barrier: Any, results: Any) -> None:
    """The loop of the trainer, with a sleep for the model."""
    torch.set_num_threads(1)
    per_rank = options.micro_batch_size * options.accumulate
    batch = per_rank * options.ranks
    stream = stream_of(folder, options.sequence_length, "windows")
    loader = BatchLoader(stream, batch, options.micro_batch_size, number, options.ranks, document_mask=True)
    compute = per_rank * options.sequence_length / options.rate
    loader.prefetch(0)
    barrier.wait()
    for step in range(options.steps + 1):
        if step == 1:  # the first batch is waited for by every loop, once
            begin, before = time.perf_counter(), loader.waited
        loader.ready(step * batch)
        loader.batch(step * batch)
        loader.prefetch((step + 1) * batch)
        time.sleep(compute)
    results.put((number, time.perf_counter() - begin, loader.waited - before))
    loader.close()


if __name__ == "__main__":
    run(main)
