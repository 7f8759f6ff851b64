"""Draw the curves of runs, finished or not: `python scripts/plot.py RUN_DIR...`.

In: run directories. Out: `curves.png` in each, its path on standard output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.console import run
from training.curves import draw_curves


def main(arguments: list[str] | None = None) -> int:
    """Draw each run and return the exit code: 0, or 2 when one of them could not be drawn."""
    parser = argparse.ArgumentParser(description="Draw curves.png of one or more runs.")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folder with metrics.jsonl")
    code = 0
    for run_dir in parser.parse_args(arguments).run_dirs:
        try:
            print(draw_curves(run_dir, warn=lambda sentence: print(f"warning: {sentence}", file=sys.stderr)))
        except (FileNotFoundError, NotADirectoryError):
            print(f"error: {run_dir} is not the folder of a run: it holds no metrics.jsonl.", file=sys.stderr)
            code = 2
        except BrokenPipeError:
            raise
        except OSError as error:
            print(
                f"error: {error.filename} cannot be used ({error.strerror}): give access or make room there.",
                file=sys.stderr,
            )
            code = 2
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    run(main)
