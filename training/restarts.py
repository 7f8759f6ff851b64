"""Starts that nobody makes by hand: torchrun --max-restarts, and a SLURM job that went back into the queue.

In: the launcher's environment, and `versions.json`, which has an entry for every start of a run. Out: whether this
start continues what the same launch has begun, and an end to a launch that fails at one step again and again.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from training.config import TrainingError
from training.metrics import read_metrics

VERSIONS, METRICS = "versions.json", "metrics.jsonl"
ATTEMPTS = 3  # starts of one launch that may end at the same step, before it is given up


def launch() -> str | None:
    """What the starts of one launch have in common and others have not; None where nothing starts a run again."""
    if "SLURM_JOB_ID" in os.environ:
        return f"SLURM job {os.environ['SLURM_JOB_ID']}"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # its agent is the parent of all attempts
        return f"torchrun {os.environ['TORCHELASTIC_RUN_ID']}, process {os.getppid()} on {platform.node()}"
    return None


def entries(run_dir: Path) -> list[dict[str, Any]]:
    """The content of `versions.json`, oldest start first; none where it is missing or damaged."""
    try:
        content = list(json.loads((run_dir / VERSIONS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return []
    return [entry for entry in content if isinstance(entry, dict) and {"step", "found"} <= entry.keys()]


def earlier_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Entries of this launch, oldest first: none for the first start of a launch."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    # Of several hosts, one that starts its ranks again because another did counts no restart; its agent is the same.
    counted = os.environ.get("GROUP_WORLD_SIZE", "1") == "1" or "SLURM_JOB_ID" in os.environ
    if counted and all(count == "0" for count in counts):
        return []
    return [entry for entry in entries(run_dir) if entry.get("launch") == launch()]


def last_record(run_dir: Path) -> int:
    """The step that the records of a run have come to; -1 without any."""
    try:
        return max((record["step"] for record in read_metrics(run_dir / METRICS, lambda damage: None)), default=-1)
    except FileNotFoundError:
        return -1


def give_up_if_stuck(run_dir: Path, step: int) -> None:
    """Raise TrainingError when `ATTEMPTS` starts of this launch began at `step`, as this one would, and ended alike.

    Not to be asked of a run that has no step left to make: it ends alike each time.
    """
    ends = [entry["found"] for entry in earlier_starts(run_dir)] + [last_record(run_dir)]  # of the start before each
    starts = earlier_starts(run_dir)[-ATTEMPTS:]
    if len(starts) < ATTEMPTS or any(entry["step"] != step for entry in starts) or len(set(ends[-ATTEMPTS:])) > 1:
        return
    begun = f"continued step {step}" if step else "begun anew"
    raise TrainingError(
        f"{ATTEMPTS} starts in a row have {begun} and ended after step {max(ends[-1], step)}, so the "
        f"next would too: look into the log and {run_dir}/stacks. The same command, given by hand, tries again."
    )
