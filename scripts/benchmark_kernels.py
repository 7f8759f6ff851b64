"""Time and memory of the attention kernels on one GPU: `python scripts/benchmark_kernels.py [--only table2,depth]`.

In: nothing but the machine (and, optionally, packages of other kernels to compare with). Out: tables on standard
output as they come, `kernels.json` in the folder `--out`; with `--docs`, the kernels' section and picture of the
documentation.

    --from kernels.json --docs     writes the documentation from results files, on a machine without a GPU
    --tune                         measures the sequence kernels and writes the table that `joined` chooses by
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from scripts.console import run
from scripts.kernel_benchmarks import page, picture, session, tables

PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images" / "kernels.png"


def main(arguments: list[str] | None = None) -> int:
    """Measure or render, and return the exit code: 0; 1 when a part failed; 2 for what cannot be done here."""
    try:
        return _run(_parse(arguments))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.docs:
        page.SECTION.check(PAGE)
    if options.results:
        results = session.merge([session.read(path) for path in options.results])
        for name, part in results["parts"].items():
            print(f"## {tables.TITLES[name]}\n\n{tables.render(name, part)}\n")
    elif not torch.cuda.is_available():
        raise ValueError(
            "These measurements need a CUDA device and none is visible: run them on a machine with a GPU, "
            "or show an earlier run with --from kernels.json."
        )
    elif options.tune:
        _tune(options.out)
        return 0
    else:
        results = session.run(options.only, options.out, _command(options), options.tutorial)
    if options.docs:
        drawn = picture.draw(results, PICTURE)
        page.replace(PAGE, results, drawn)
        print(f"written: {PAGE}" + (f" and {drawn}" if drawn else ""))
    return 1 if results["failures"] else 0


def _command(options: argparse.Namespace) -> str:
    """What to type for the same measurements: no folders of this machine."""
    words = ["python", "scripts/benchmark_kernels.py"]
    if options.only != list(session.PARTS):
        words += ["--only", ",".join(options.only)]
    if options.tutorial is not None:
        words += ["--tutorial", options.tutorial.name]
    return shlex.join(words)


def _tune(folder: Path) -> None:
    try:
        tuning = importlib.import_module("moda.tuning")
    except ImportError as error:
        raise ImportError(f"--tune needs moda.tuning, which cannot be imported ({error}).") from None
    table = tuning.tune("cuda")
    tuning.write_table(table)
    print(tuning.summary(table))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"written: {tuning.TABLE}, and a copy: {shutil.copy(tuning.TABLE, folder)}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of the attention kernels on one GPU.")
    parser.add_argument("--only", type=_part_names, help=f"parts, by commas: {','.join(session.PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for kernels.json")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md and docs/images/kernels.png")
    parser.add_argument("--tutorial", type=Path, help="Triton's 06-fused-attention.py, one more FA2-Triton baseline")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--from", dest="results", type=Path, nargs="+", help="results files of one machine, shown as one"
    )
    exclusive.add_argument("--tune", action="store_true", help="measure the sequence kernels, write their table")
    options = parser.parse_args(arguments)
    of_measurements = {"--only": options.only is not None, "--tutorial": options.tutorial is not None}
    for other, chosen in (("--tune", options.tune), ("--from", options.results is not None)):
        ignored = of_measurements | ({"--docs": options.docs} if other == "--tune" else {})
        for name, given in ignored.items():
            if chosen and given:
                parser.error(f"{name} does nothing with {other}: leave one of them away.")
    options.only = options.only or list(session.PARTS)
    return options


def _part_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in session.PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a part: choose from {', '.join(session.PARTS)}.")
    return [name for name in session.PARTS if name in names]


if __name__ == "__main__":
    run(main)
