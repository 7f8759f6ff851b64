"""Compare runs: `python scripts/report.py RUNS_OR_SWEEP_DIR`.

In: a folder with runs somewhere below it. Out: `report.md` and `report.png` in it, and the table on standard output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.console import run
from training.report import ReportError, write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report and return the exit code: 0, or 2 when there is nothing to report."""
    parser = argparse.ArgumentParser(description="Compare all runs below a folder: table, report.md and report.png.")
    parser.add_argument("folder", type=Path, help="folder of a run, of several runs, or of a sweep")
    folder = parser.parse_args(arguments).folder
    try:
        report = write_report(folder, warn=lambda sentence: print(f"warning: {sentence}", file=sys.stderr))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename} cannot be used ({error.strerror}): give access or make room.", file=sys.stderr)
        return 2
    print(report.text)
    print(f"written: {report.markdown} and {report.picture}")
    return 0


if __name__ == "__main__":
    run(main)
