"""How fast, how lean and how safe the data side is, measured on the machine at hand:

    python scripts/benchmark_data.py throughput 'DIR/*.json.gz' --tokenizer FILE    against encode_batch and other tools
    python scripts/benchmark_data.py memory 'DIR/*.json.gz' --tokenizer FILE        peak memory against size of input
    python scripts/benchmark_data.py kill 'DIR/*.json.gz' --tokenizer FILE          kill -9 at random, compare shards

In: C4-format text and a tokenizer. Out: Markdown tables on standard output. The tools of a throughput table run one
after the other, round by round, each in a fresh process; datatrove is among them when it and orjson are
installed.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.prepare import PrepareOptions, prepare
from data.readers import Piece, read_piece
from data.sources import Files
from data.tokenizer_choice import TokenizerRequest
from scripts.console import run

PREPARE = Path(__file__).resolve().with_name("prepare_data.py")
CORES = len(os.sched_getaffinity(0))
PART_FILES = 4  # files a core that a slice is cut in, so that every tool can spread them


def cut_slice(paths: list[str], megabytes: float, folder: Path) -> tuple[int, int]:
    """Write the first `megabytes` of text to gzip files in `folder`; returns the bytes of text and of the files."""
    texts, size = [], 0
    for path in paths:
        for item, _ in read_piece(Piece(path, 0), "text", "file"):
            if isinstance(item, str) and size < megabytes * 1e6:
                texts.append(item)
                size += len(item.encode())
    folder.mkdir(parents=True)
    files = PART_FILES * CORES
    for index in range(files):
        with gzip.open(folder / f"{index:05d}.json.gz", "wt", encoding="utf-8", compresslevel=6) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[index::files])
    return size, sum(path.stat().st_size for path in folder.iterdir())


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and seconds of all cores, those of finished child processes included."""
    clock, cpu = time.monotonic(), os.times()
    work()
    now = os.times()
    return time.monotonic() - clock, sum(now[:4]) - sum(cpu[:4])


def encode_batch(folder: Path, tokenizer: str, scratch: Path) -> tuple[float, float]:
    """The ceiling: texts are in memory, ids are thrown away. As `tokenizers` comes, with all its threads."""
    from tokenizers import Tokenizer

    texts = [t for f in sorted(folder.iterdir()) for t, _ in read_piece(Piece(str(f), 0), "text", "file")]
    loaded = Tokenizer.from_file(tokenizer)

    def work() -> None:
        for start in range(0, len(texts), 1000):
            loaded.encode_batch(texts[start : start + 1000], add_special_tokens=False)

    return measured(work)


def prepare_data(folder: Path, tokenizer: str, scratch: Path) -> tuple[float, float]:
    """This project: from the gzip files to finished shards with checksums, start of the processes included."""
    source = Files(str(folder), part_megabytes=sum(f.stat().st_size for f in folder.iterdir()) / CORES / 2e6)
    request = TokenizerRequest(tokenizer, 0)
    return measured(lambda: prepare(source, request, scratch, PrepareOptions(workers=CORES)))


def datasets_map(folder: Path, tokenizer: str, scratch: Path) -> tuple[float, float]:
    """`datasets`: files to Arrow, then `map` with a process a core, which writes the ids as Arrow."""
    import datasets
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    loaded = Tokenizer.from_file(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": [found.ids for found in loaded.encode_batch(batch["text"], add_special_tokens=False)]}

    def work() -> None:
        files = [str(path) for path in sorted(folder.iterdir())]
        rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(scratch))
        rows.map(encode, batched=True, num_proc=CORES, remove_columns=rows.column_names)

    return measured(work)


def datatrove(folder: Path, tokenizer: str, scratch: Path) -> tuple[float, float]:
    """`datatrove`: its reader and tokenizer as local tasks, a process a core, unshuffled."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(folder)),
        DocumentTokenizer(str(scratch / "out"), tokenizer, eos_token="<|endoftext|>", shuffle_documents=False),
    ]
    tasks = len(list(folder.iterdir()))
    executor = LocalPipelineExecutor(
        steps, tasks=tasks, workers=CORES, logging_dir=str(scratch / "logs"), start_method="spawn"
    )
    return measured(executor.run)


TOOLS = {
    "encode_batch": encode_batch,
    "prepare_data": prepare_data,
    "datasets.map": datasets_map,
    "datatrove": datatrove,
}


def _run_tool(pipe: Any, name: str, folder: Path, tokenizer: str) -> None:
    sys.stdout = sys.stderr  # the table alone goes to standard output
    with tempfile.TemporaryDirectory() as scratch:
        pipe.send(TOOLS[name](folder, tokenizer, Path(scratch)))


def throughput(options: argparse.Namespace, scratch: Path) -> None:
    """Print MB of text a second of every tool, and its rate as a share of the ceiling's in the same round."""
    size, _ = cut_slice(options.paths, options.megabytes, scratch / "slice")
    tools = [
        name for name in TOOLS if name != "datatrove" or all(map(importlib.util.find_spec, ("datatrove", "orjson")))
    ]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
    for _ in range(options.rounds):
        for name in tools:
            here, there = multiprocessing.Pipe()
            arguments = (there, name, scratch / "slice", options.tokenizer)
            process = multiprocessing.get_context("spawn").Process(target=_run_tool, args=arguments)
            process.start()
            there.close()
            found[name].append(here.recv())
            process.join()
    packages = [name for name in ("tokenizers", "datasets", "datatrove") if importlib.util.find_spec(name)]
    print(
        f"{size / 1e6:.1f} MB of text, {Path(options.tokenizer).name}, {options.rounds} rounds, median; {CORES} cores,"
    )
    print(f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}\n")
    print("| tool | MB/s | of encode_batch | core seconds | of encode_batch |\n|---|---|---|---|---|")
    for name in tools:
        clock, cpu = (statistics.median(column) for column in zip(*found[name], strict=True))
        shares = [
            statistics.median(c[i] / t[i] for c, t in zip(found["encode_batch"], found[name], strict=True))
            for i in (0, 1)
        ]
        print(f"| {name} | {size / 1e6 / clock:.2f} | {shares[0]:.2f} | {cpu:.1f} | {1 / shares[1]:.2f} |")


def tree_memory(root: int) -> int:
    """Resident bytes of a process and all below it, now."""
    parents: dict[int, int] = {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            content = Path(stat).read_text().rpartition(")")[2].split()
        except OSError:  # ended since it was listed
            continue
        parents[int(stat.split("/")[2])] = int(content[1])
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    total = 0
    for pid in tree:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue
    return total


def command(folder: Path, output: Path, part_bytes: float, filters: str, options: argparse.Namespace) -> list[str]:
    """A preparation of `folder` in parts of `part_bytes`, in two processes."""
    return [
        sys.executable, str(PREPARE), "source=files", f"source.path={folder}", f"tokenizer={options.tokenizer}",
        f"source.part_megabytes={part_bytes / 1e6}", f"filters={filters}", f"output={output}", "workers=2",
    ]  # fmt: skip


def memory(options: argparse.Namespace, scratch: Path) -> None:
    """Print the peak memory of preparations of 1, 2, 4 ... times the same slice, and the slope."""
    size, file_bytes = cut_slice(options.paths, options.megabytes, scratch / "one")
    limits = "min_characters: 30"
    if options.max_characters is not None:
        limits += f", max_characters: {options.max_characters}"
    rows = []
    for times in [2**i for i in range(options.doublings + 1)]:
        folder = scratch / "many"
        folder.mkdir()
        for copy in range(times):
            for path in (scratch / "one").iterdir():
                os.link(path, folder / f"{copy:05d}-{path.name}")
        prepare_it = command(folder, scratch / "out", file_bytes / 2, f"[{{name: length, {limits}}}]", options)
        process = subprocess.Popen(prepare_it, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"error: the preparation ended with status {process.returncode}.")
        rows.append((size * times / 1e6, peak / 1e6))
        for made in ("many", "out"):
            shutil.rmtree(scratch / made)
    print("| MB of text | peak MB, all processes |\n|---|---|")
    for size_mb, peak_mb in rows:
        print(f"| {size_mb:.1f} | {peak_mb:.1f} |")
    slope = statistics.linear_regression(*zip(*rows, strict=True)).slope
    print(f"\nslope: {slope:.4f} MB of memory for each MB of text; two processes, {Path(options.tokenizer).name}")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(options: argparse.Namespace, scratch: Path) -> None:
    """Kill a preparation at random moments, give the same command again each time, and compare with one left alone."""
    generator = random.Random(options.seed)
    _, file_bytes = cut_slice(options.paths, options.megabytes, scratch / "slice")
    filters = "[{name: duplicate}, {name: length, min_characters: 30}, {name: repetition}]"
    whole, out = (
        command(scratch / "slice", scratch / name, file_bytes / 10, filters, options) for name in ("whole", "out")
    )
    begun = time.monotonic()
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    duration = time.monotonic() - begun
    expected = digests(scratch / "whole")
    kills = finished = 0
    parts_left = []
    while kills < options.kills or not finished:
        process = subprocess.Popen(out, stdout=subprocess.DEVNULL)
        timer = threading.Timer(generator.uniform(0, duration), process.send_signal, [signal.SIGKILL])
        if kills < options.kills:
            timer.start()
        begun = time.monotonic()
        process.wait()
        timer.cancel()
        if process.returncode == -signal.SIGKILL:
            kills += 1
            parts_left.append(len(list((scratch / "out" / "train").glob("[0-9]*/manifest.json"))))
        elif process.returncode:
            raise SystemExit(f"error: after {kills} kills the command ended with status {process.returncode}.")
        else:
            finished += 1
            duration = min(duration, time.monotonic() - begun)  # the machine may be less busy than it was
            if (found := digests(scratch / "out")) != expected:
                changed = sorted(name for name in found | expected if found.get(name) != expected.get(name))
                raise SystemExit(f"error: after {kills} kills these files differ: {', '.join(changed)}.")
            if kills < options.kills:
                shutil.rmtree(scratch / "out")
    print(f"{kills} kills at random moments of {duration:.1f} s (finished parts after each: {parts_left}), {finished}")
    print(f"preparations ended by the same command: all {len(expected)} files identical to those of one left alone")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when a result is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for part, megabytes in ((throughput, 32.0), (memory, 8.0), (kill, 8.0)):
        added = commands.add_parser(part.__name__, help=part.__doc__)
        added.add_argument("paths", help="C4-format files, a glob in quotes")
        added.add_argument("--tokenizer", required=True, help="tokenizer.json")
        added.add_argument("--megabytes", type=float, default=megabytes, help="text to take from the files")
        added.set_defaults(run=part)
        if part is throughput:
            added.add_argument("--rounds", type=int, default=3, help="times that every tool runs")
        elif part is memory:
            added.add_argument("--doublings", type=int, default=3, help="times that the input is doubled")
            limit = "leave out longer documents, to read much in little time"
            added.add_argument("--max-characters", type=int, help=limit)
        else:
            added.add_argument("--kills", type=int, default=20, help="times that the preparation is killed")
            added.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    options.paths = sorted(glob.glob(options.paths))
    if not options.paths:
        parser.error("no file matches: give a glob of C4-format files in quotes.")
    with tempfile.TemporaryDirectory() as scratch:
        options.run(options, Path(scratch))
    return 0


if __name__ == "__main__":
    run(main)
