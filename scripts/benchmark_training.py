"""Speed and memory of training steps: `python scripts/benchmark_training.py --data SHARDS --out DIR [--rows 'moda*']`.

In: token shards, and rows of `scripts/training_benchmark/rows.py`. Each row is a process (with several GPUs a torchrun)
of its own that runs real steps of train.py. Out: `training.json` in DIR after every row, and the table as Markdown.

    --cold        before each row, one step with empty compilation caches: time from start to first step
    --profile     look into the last step but one of each row: DIR/ROW.json.gz for scripts/profile_report.py
    --from FILE   shows an earlier `training.json` (several: a table for each machine and its versions, newest first, in
                  which rows of later files win)
    --docs        writes the table into docs/benchmarks.md, and its picture
    --set KEY=VALUE   an override of train.py for all rows
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.shards import write_atomically
from models.config import ConfigError
from scripts import console
from scripts.page_section import PageSection
from scripts.training_benchmark import picture, rows, tables
from scripts.training_benchmark.process import StepsFailed, check_device, run_steps

SECTION, PAGE = PageSection("training", "scripts/benchmark_training.py"), ROOT / "docs" / "benchmarks.md"
RESULTS = "training.json"
# Folders of compiled kernels: of torch.compile, Triton, quack-kernels and flash-attn-4.
CACHES = (
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    *("QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"),
)
PICTURE = ROOT / "docs" / "images" / "training.png"


def main(arguments: list[str] | None = None) -> int:
    """Measure or show. Returns the exit status: 0; 1 when a row failed; 2 for what cannot be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    try:
        if options.docs:
            SECTION.check(PAGE)
        if options.results:
            parts = [read(path) for path in options.results]
        else:
            parts = [run(options, shlex.join(["python", "scripts/benchmark_training.py", *arguments]))]
    except BrokenPipeError:
        raise
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    groups = tables.merge(parts)
    print(tables.render(groups))
    if options.docs:
        drawn = picture.draw(groups, PICTURE)
        shown = [f"![Tokens a second and GPU](images/{PICTURE.name})"] if drawn else []
        SECTION.replace(PAGE, "\n\n".join([*shown, tables.render(groups)]))
        print(f"written: {PAGE}" + (f" and {drawn}" if drawn else ""))
    return 1 if any(group["failures"] for group in groups) else 0


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure the chosen rows one after the other; the results file is whole after each."""
    if options.data is None or options.out is None:
        raise ValueError("--data SHARDS and --out DIR are needed for a measurement: give both, or --from FILE to show.")
    if not (options.data / "train" / "manifest.json").is_file():
        raise ValueError(f"--data {options.data} holds no token shards: prepare some with scripts/prepare_data.py.")
    if options.steps < 3:
        raise ValueError(f"--steps {options.steps} leaves nothing to measure: use at least 3.")
    if (options.out / RESULTS).exists():
        raise ValueError(
            f"--out {options.out} holds the {RESULTS} of an earlier measurement: give a new folder, --from shows both."
        )
    todo = rows.chosen(options.rows)
    check_device(options.set)
    results: dict[str, Any] = {"commands": [command], "environment": {}, "rows": {}, "failures": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(todo, start=1):
        print(f"[{number} of {len(todo)}] {row.name}: {shlex.join(row.arguments)}", flush=True)
        begin = time.monotonic()
        try:
            measured = _measure(row, options)
        except StepsFailed as failed:
            log = options.out / f"{file_name(row)}.log"
            log.write_text(failed.output, encoding="utf-8")
            results["failures"][row.name] = str(failed)
            print(f"  failed: {failed} (all of it: {log})", flush=True)
        else:
            results["environment"] = measured.pop("environment")
            results["rows"][row.name] = {"arguments": row.arguments} | measured
            rate = measured["tokens_per_second"] / 1e3
            print(f"  {measured['startup']}", flush=True)
            print(f"  {rate:.1f} k tokens/s, {time.monotonic() - begin:.0f} s in all", flush=True)
        write_atomically(options.out / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return results


def read(path: Path) -> dict[str, Any]:
    """Results of an earlier measurement. Raises ValueError, in one sentence, for a file that holds none."""
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tables.render(tables.merge([results]))  # which looks at everything that is shown
    except OSError as error:
        raise ValueError(f"--from {path} cannot be read ({error.strerror}): give the training.json of a run.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--from {path} holds no results of this benchmark ({error!r}): give a training.json that it has written."
        ) from None
    return results


def _measure(row: rows.Row, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one row. Raises StepsFailed."""
    overrides = [f"data.path={options.data.resolve()}", *row.arguments, *options.set]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        environment = dict(os.environ)
        cold, warm = Path(folder) / "cold", Path(folder) / "warm"
        measured: dict[str, Any] = {}
        if options.cold:
            for cache in CACHES:
                environment[cache] = f"{folder}/{cache.lower()}"
            first = run_steps(overrides, gpus=row.gpus, steps=1, folder=cold, environment=environment)
            measured["cold_start_seconds"] = first["start_to_first_step_seconds"]
        if options.profile:
            overrides.append(f"logging.profile.steps=[{options.steps - 1}]")
        measured |= run_steps(overrides, gpus=row.gpus, steps=options.steps, folder=warm, environment=environment)
        for trace in warm.glob("run/profile/step-*-rank-0.json.gz"):
            shutil.move(trace, options.out / f"{file_name(row)}.json.gz")
    return measured


def file_name(row: rows.Row) -> str:
    """Of what belongs to a row in the results' folder, without suffix."""
    return row.name.replace("/", "-")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens/s, MFU and memory of training steps.")
    parser.add_argument("--data", type=Path, help="token shards, as scripts/prepare_data.py writes them")
    parser.add_argument("--out", type=Path, help="folder for training.json and the logs of rows that fail")
    parser.add_argument("--rows", nargs="+", default=["olmo2_700m", "moda_700m"], help="names, * allowed")
    parser.add_argument("--steps", type=int, default=30, help="steps of a row, the first of which are warm-up")
    parser.add_argument("--cold", action="store_true", help="measure the start with empty caches too")
    parser.add_argument("--profile", action="store_true", help="write a trace of the last step but one of each row")
    parser.add_argument("--set", action="append", default=[], help="an override of train.py for all rows")
    parser.add_argument("--from", dest="results", nargs="+", type=Path, help="show these results, measure nothing")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    console.run(main)
