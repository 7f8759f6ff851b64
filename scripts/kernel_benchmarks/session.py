"""Runs the chosen parts one after the other: progress, tables as they come, a results file that is always whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.shards import write_atomically
from scripts.kernel_benchmarks import baselines, depth, ladder, overlap, stream, tables, timing
from scripts.kernel_benchmarks.goals import goals
from scripts.kernel_benchmarks.joint import JointBenchmark

PARTS = {  # name: seconds it takes on an H200, about
    "table2": 70,
    "over-sequence": 5,
    "depth": 15,
    "overlap": 40,
    "stream": 15,
    "memory": 25,
    "ladder": 60,
}
Measure = Callable[[Callable[[str], None]], dict[str, Any]]


def run(names: Sequence[str], folder: Path, command: str, tutorial: Path | None = None) -> dict[str, Any]:
    """Measure the named parts on the present CUDA device; write `kernels.json` in `folder` after each.

    A part that fails is noted under "failures" and the next one goes on. Returns what the file holds: commands,
    environment, parts, failures, seconds.
    """
    joint = JointBenchmark(tutorial)
    measures: dict[str, Measure] = {
        "table2": joint.table2,
        "over-sequence": joint.over_sequence,
        "depth": depth.measure,
        "overlap": overlap.measure,
        "stream": stream.measure,
        "memory": stream.measure_memory,
        "ladder": ladder.measure,
    }
    results: dict[str, Any] = {"commands": [command], "environment": timing.environment()}
    results |= {"parts": {}, "failures": {}, "seconds": {}}
    print(tables.machine(results["environment"]), flush=True)
    start = time.monotonic()
    for index, name in enumerate(names):
        begun = time.monotonic()
        left = time_left(names[index:], sum(PARTS[done] for done in names[:index]), begun - start)
        print(f"\n## {tables.TITLES[name]}\n\n[{begun - start:.0f} s used, about {left:.0f} s left]", flush=True)
        try:
            results["parts"][name] = measures[name](lambda text: print(f"  {text}", flush=True))
            print(f"\n{tables.render(name, results['parts'][name])}", flush=True)
        except Exception as error:  # the other parts must not be lost
            results["failures"][name] = baselines.one_line(error)
            print(f"  failed, and the next part goes on: {type(error).__name__}: {error}", flush=True)
        results["seconds"][name] = round(time.monotonic() - begun, 1)
        timing.free()
        write(results, folder)
    if goals(results["parts"]):
        print(f"\n## {tables.TITLES['goals']}\n\n{tables.render_goals(results['parts'])}", flush=True)
    print(f"\n{time.monotonic() - start:.0f} s; written: {results_path(folder)}", flush=True)
    return results


def time_left(names: Sequence[str], expected_so_far: float, used: float) -> float:
    """Seconds that the named parts will take, from what the parts before took of what they were expected to."""
    pace = max(used / expected_so_far, 0.2) if expected_so_far else 1.0
    return pace * sum(PARTS[name] for name in names)


def results_path(folder: Path) -> Path:
    """The results file of a folder."""
    return folder / "kernels.json"


def write(results: dict[str, Any], folder: Path) -> None:
    """Replace the results file in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(results_path(folder), (json.dumps(results, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """A results file. Raises ValueError, in one sentence, for anything else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--from {path} cannot be read as JSON ({error}): give the kernels.json of a run.") from None
    needed = {"commands", "environment", "parts", "failures", "seconds"}
    if not isinstance(results, dict) or not needed <= results.keys():
        raise ValueError(f"--from {path} holds no results of this script: give the kernels.json of a run.")
    if unknown := set(results["parts"]) - set(PARTS):
        raise ValueError(f"--from {path} holds the unknown part {min(unknown)!r}: it was written by another version.")
    return results


def merge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of several runs as of one; where runs share a part, the last one has it.

    Raises ValueError when they are of different machines or versions.
    """
    merged: dict[str, Any] = {"commands": [], "environment": runs[-1]["environment"]}
    merged |= {"parts": {}, "failures": {}, "seconds": {}}
    for run_results in runs:
        if (found := _setting(run_results)) != (wanted := _setting(merged)):
            raise ValueError(f"Results of different machines cannot be shown as one: {found} and {wanted}.")
        merged["commands"] += run_results["commands"]
        for name in PARTS:
            if name in run_results["parts"] or name in run_results["failures"]:
                for column in ("parts", "failures", "seconds"):
                    merged[column].pop(name, None)
                    if name in run_results[column]:
                        merged[column][name] = run_results[column][name]
    merged["parts"] = {name: merged["parts"][name] for name in PARTS if name in merged["parts"]}
    return merged


def _setting(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results["environment"].items() if name != "date"}
