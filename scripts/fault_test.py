"""Injects faults into real runs and prints what each cost: `python scripts/fault_test.py` (minutes), `--short` (one).

In: nothing; a corpus of counting documents and a two-layer model are made in a temporary folder, on the CPU in fp32
(`scripts/fault_injection`). Out: a table, a row a fault: how it was injected, how often, what was lost, what was said.
Exit status 1 when a run did not end as it should, or when its records differ in a bit from those of an undisturbed run.
`--only WORD` takes the faults whose name has the word; `--json FILE` writes the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.fault_injection import endings, files, ranks, steps
from scripts.fault_injection.bench import Bench, Row

FAULTS: dict[str, Callable[[Bench, int], Row | list[Row]]] = {
    "killed": endings.killed,
    "signals": endings.signals,
    "second": endings.second,
    "damaged": files.damaged,
    "crafted": files.crafted,
    "disk": files.disk,
    "numbers": steps.numbers,
    "memory": steps.memory,
    "wandb": steps.wandb,
    "changed": steps.changed,
    "ranks": ranks.ranks,
}
SHORT = ("killed", "damaged", "crafted", "disk", "numbers", "memory")


def main(arguments: list[str] | None = None) -> int:
    """Inject all faults, or those that were asked for. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Inject faults into small runs and print what each cost.")
    parser.add_argument("--short", action="store_true", help="the faults of one process, few times")
    parser.add_argument("--only", default="", help="faults whose name has this word: " + ", ".join(FAULTS))
    parser.add_argument("--kills", type=int, help="random kills (default: 20, or 3 with --short)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    times = options.kills or (3 if options.short else 20)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name, fault in FAULTS.items():
            if options.only not in name or (options.short and name not in SHORT):
                continue
            begun, found = time.monotonic(), fault(bench, times)
            found = found if isinstance(found, list) else [found]
            rows += found
            verdict = "done" if all(row.passed for row in found) else "FAILED"
            print(f"{name}: {verdict}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print("| fault | how injected | times | lost | message | |\n|---|---|---|---|---|---|")
    for row in rows:
        verdict = "as it should" if row.passed else "**FAILED**"
        print(f"| {row.fault} | {row.injected} | {row.times} | {row.lost} | {row.message} | {verdict} |")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return int(not rows or not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
