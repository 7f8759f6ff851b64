"""Steps of a run in processes of their own, so that nothing is left of one measurement when the next begins.

In: overrides of train.py and a number of GPUs (torchrun with more than one). Out: what `measure` has measured; the run
directory, with `metrics.jsonl`, stays in the folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TIMEOUT = 900  # seconds

# A run of which nothing but steps is wanted; logging is on, and reads the loss every ten steps as by default.
QUIET = [
    "training.steps=1000",
    "schedule.warmup_steps=100",
    "evaluation.every=0",
    "checkpoint.every=1000",
    "logging.wandb.mode=disabled",
]

REFUSED = {
    "run.dir": "the run directory is one of this script's own",
    "checkpoint.resume": "steps begin with new weights here",
}

LAUNCHER = "torch.distributed.elastic"  # torchrun's own words on a rank that failed say nothing of why


def check_device(overrides: Sequence[str], option: str = "--set ") -> None:
    """Raise ValueError where no GPU is visible and the overrides do not ask for a CPU: steps would take hours.

    `option`: what the command wants before an override.
    """
    import torch  # here, as earlier results are shown without it

    on_cpu = "training.device=cpu"
    if not torch.cuda.is_available() and on_cpu not in overrides:
        raise ValueError(f"A GPU is needed and none is visible: {option}{on_cpu} takes a CPU, for small models.")


class StepsFailed(RuntimeError):
    """The processes failed: the reason in a line, and all that they printed."""

    def __init__(self, reason: str, output: str) -> None:
        super().__init__(reason)
        self.output = output


class StepsTimeout(StepsFailed):
    """The processes took too long, and were ended."""


def run_steps(
    overrides: Sequence[str],
    *,
    gpus: int,
    steps: int,
    folder: Path,
    environment: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Do `steps` steps in the new folder `folder` and return the results of `measure`.

    Raises StepsFailed, and StepsTimeout after `timeout` seconds.
    """
    whole = train_arguments(overrides, folder)
    folder.mkdir(parents=True)
    result = folder / "result.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command = [sys.executable, *(torchrun if gpus > 1 else []), str(Path(__file__).with_name("measure.py"))]
    command += [str(result), str(steps), str(time.time()), *whole]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process, killed_on_error(process):
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise StepsTimeout(f"not done within {timeout:g} s", "") from None
    if process.returncode or not result.is_file():
        raise StepsFailed(reason(errors, process.returncode), printed + errors)
    return json.loads(result.read_text(encoding="utf-8"))


def train_arguments(overrides: Sequence[str], folder: Path) -> list[str]:
    """Arguments of train.py for steps in `folder`. Raises StepsFailed for overrides that such steps have no use for."""
    if sentence := refusal(overrides):
        raise StepsFailed(sentence, "")
    return [*QUIET, f"run.dir={folder / 'run'}", *overrides]


def refusal(overrides: Sequence[str], more: Mapping[str, str] | None = None) -> str | None:
    """What to say of the first override that measured steps have no use for, None where there is none.

    `more`: further keys, and why, in the way of REFUSED.
    """
    for key, why in {**REFUSED, **(more or {})}.items():
        if own := [override for override in overrides if override.lstrip("+").startswith(f"{key}=")]:
            return f"{own[0]} cannot be used: {why}, so leave it out."
    return None


@contextmanager
def killed_on_error(launcher: subprocess.Popen[Any]) -> Iterator[None]:
    """`kill` where the block is left by an exception, Ctrl-C among them: nothing then runs on without its starter."""
    try:
        yield
    except BaseException:
        kill(launcher)
        raise


def kill(launcher: subprocess.Popen[Any]) -> None:
    """SIGKILL for the ranks of a torchrun, all at once, and for the launcher; of a single process for that."""
    if launcher.poll() is not None:
        return  # its number may be another's by now
    ranks = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == launcher.pid]
    for pid in [*ranks, launcher.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait(60)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None


def reason(stderr: str, status: int) -> str:
    """Why a process failed, from what it printed, in a line."""
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip() and LAUNCHER not in line]
    for word in ("OutOfMemoryError", "out of memory", "error:", "Error"):
        for index, line in reversed(list(enumerate(lines))):
            if word in line and not line.startswith("error:"):
                return line.strip()[:300]
            if word in line:  # a sentence of ours is whole; a command may follow, indented
                command = [more.strip() for more in lines[index + 1 : index + 2] if more[0] == " "]
                return " ".join([line, *command])
    return f"exit status {status}"
