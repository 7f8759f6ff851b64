"""Injects faults into real runs and prints what each cost: `python scripts/fault_test.py` (minutes), `--short` (one).

In: nothing; a corpus of counting documents and a two-layer model are made in a temporary folder, in fp32, on the CPU or
with `--device cuda` on GPUs (`scripts/fault_injection`). Out: a table, a row a fault: how it was injected, how often,
what was lost, what was said. Exit status 1 when a run did not end as it should, or when its records differ in a bit
from those of an undisturbed run; on GPUs, where two undisturbed runs do, by more than a tolerance that the table names.

    --only WORDS   faults whose name has one of these words: --only killed,disk
    --jobs N       inject so many side by side
    --logs DIR     leave there what the runs of a fault that failed have printed
    --json FILE    write the rows
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.console import run
from scripts.fault_injection import endings, files, steps
from scripts.fault_injection.bench import Bench, Row, undisturbed
from scripts.fault_injection.ranks import RANKS
from training.config import one_line

Fault = Callable[[Bench, int], Row | list[Row]]
FAULTS: dict[str, Fault] = {
    **RANKS,  # they take longest
    "killed": endings.killed,
    "killed-waiting": endings.killed_waiting,
    "signals": endings.signals,
    "second": endings.second,
    "damaged": files.damaged,
    "crafted": files.crafted,
    "disk": files.disk,
    "numbers": steps.numbers,
    "memory": steps.memory,
    "wandb": steps.wandb,
    "changed": steps.changed,
}
SHORT = ("killed", "killed-waiting", "damaged", "crafted", "disk", "numbers", "memory")


def main(arguments: list[str] | None = None) -> int:
    """Inject all faults, or those that were asked for. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Inject faults into small runs and print what each cost.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all runs (default: cpu)")
    parser.add_argument("--short", action="store_true", help="the faults of one process, few times")
    parser.add_argument("--only", default="", help="faults whose name has one of these words: " + ", ".join(FAULTS))
    parser.add_argument("--kills", type=int, help="random kills (default: 20, or 3 with --short)")
    parser.add_argument("--jobs", type=int, default=1, help="faults that are injected side by side (default: 1)")
    parser.add_argument("--logs", type=Path, help="folder for what the runs of a fault that failed have printed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} cannot be used: inject at least 1 at a time.")
    if options.kills is not None and options.kills < 1:
        parser.error(f"--kills {options.kills} cannot be used: kill at least once.")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json} cannot be written: its folder does not exist.")
    faults = chosen(options.only, short=options.short)
    if not faults:
        parser.error(f"--only {options.only} names no fault: use words of {', '.join(FAULTS)}.")
    gpus = visible_gpus() if options.device == "cuda" else 0
    if options.device == "cuda" and gpus == 0:
        parser.error("--device cuda cannot be used: no CUDA device is visible, so use --device cpu.")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS may add in another order
    times = options.kills or (3 if options.short else 20)
    rows: list[Row] = []
    print("| fault | how injected | times | lost | message | |\n|---|---|---|---|---|---|", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(options.jobs) as pool,
        Bench(Path(folder), options.device, gpus) as bench,  # the first to be left: the pool waits for its runs
    ):

        def inject(name: str) -> list[Row]:
            return attempt(name, bench.of(name), times, options.logs)

        def show(found: list[Row]) -> None:
            for row in found:
                print(line(row), flush=True)
            rows.extend(found)

        show(inject("undisturbed"))
        if rows[0].passed:
            for found in pool.map(inject, faults):
                show(found)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    passed = all(row.passed or row.skipped for row in rows) and any(row.passed for row in rows[1:])
    return int(not passed)


def chosen(words: str, *, short: bool) -> list[str]:
    """Names of the faults that were asked for, in the order of `FAULTS`."""
    names = [name for name in FAULTS if any(word in name for word in words.split(",")) and (not short or name in SHORT)]
    needed = set(names) | ({"ranks-undisturbed"} if any(name in RANKS for name in names) else set())
    return [name for name in FAULTS if name in needed]


def attempt(name: str, bench: Bench, times: int, logs: Path | None) -> list[Row]:
    """The rows of a fault; one that cannot be injected has a row that says why."""
    begun = time.monotonic()
    try:
        found = FAULTS[name](bench, times) if name in FAULTS else undisturbed(bench, times)
        rows = found if isinstance(found, list) else [found]
    except Exception as error:  # whatever it is: the other faults go on
        bench.note(traceback.format_exc())
        rows = [Row(name, "", 0, "", one_line(error), False)]
    if bench.ended.is_set():  # by Ctrl-C: what became of the fault says nothing
        return []
    failed = not all(row.passed or row.skipped for row in rows)
    verdict = "FAILED" if failed else "done"
    print(f"{name}: {verdict}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if failed and logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{name}.log").write_text(bench.log(), encoding="utf-8")
    elif failed:
        print(bench.log()[-4000:], file=sys.stderr, flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the table."""
    verdict = f"**skipped**: {row.skipped}" if row.skipped else "as it should" if row.passed else "**FAILED**"
    return f"| {row.fault} | {row.injected} | {row.times} | {row.lost} | {row.message} | {verdict} |"


def visible_gpus() -> int:
    """CUDA devices of this host."""
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    run(main)
