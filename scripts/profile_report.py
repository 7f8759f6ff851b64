"""Where the time of steps goes: `python scripts/profile_report.py OLMo2=TRACE MoDA=TRACE [--picture FILE.png]`.

In: traces of profiled steps, with or without a label (`logging.profile.steps=[20]` of train.py leaves
`profile/step-20-rank-0.json.gz` in its run directory). Out: tables by kind of kernel and by kernel as Markdown on
standard output, and a picture on request.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.console import run
from scripts.training_benchmark import trace


def main(arguments: list[str] | None = None) -> int:
    """Report and return the exit status: 0, or 2 for a file that is no trace of a GPU."""
    parser = argparse.ArgumentParser(description="Kernels of profiled steps, by kind and by name.")
    parser.add_argument("traces", nargs="+", metavar="[LABEL=]TRACE", help="step-N-rank-R.json.gz of a run")
    parser.add_argument("--picture", type=Path, help="draw the kinds as bars into this PNG")
    options = parser.parse_args(arguments)
    profiles = {}
    try:
        for argument in options.traces:
            label, _, path = argument.rpartition("=")
            profiles[label or Path(path).name.removesuffix(".json.gz")] = trace.read(Path(path))
        if options.picture is not None and not options.picture.absolute().parent.is_dir():
            raise ValueError(f"--picture {options.picture} cannot be written: its folder does not exist.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(trace.table(profiles))
    if options.picture is not None:
        trace.draw(profiles, options.picture)
        print(f"\npicture {options.picture}")
    return 0


if __name__ == "__main__":
    run(main)
