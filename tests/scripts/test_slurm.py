"""scripts/slurm/train.sbatch with stand-ins for SLURM's commands: which ends put a job back into the queue."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def submitted(folder, status, restarts=0):
    """The job's exit status, and whether it went back into the queue, when srun gives `status`."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
    (tools / "scontrol").write_text(f'#!/bin/sh\n[ "$1" = show ] && echo host && exit\necho "$@" > {folder}/asked\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(
        ["bash", "scripts/slurm/train.sbatch", "run.name=first"],
        cwd=ROOT,
        env={**os.environ, **variables, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        check=False,
    )
    asked = (folder / "asked").read_text() if (folder / "asked").exists() else ""
    return done.returncode, asked == "requeue 7\n"


@pytest.mark.parametrize("status", [75, 137, 138, 139])
def test_a_lost_rank_and_the_warning_before_the_time_limit_go_back_into_the_queue(status, tmp_path):
    assert submitted(tmp_path, status) == (0, True)


@pytest.mark.parametrize("status", [0, 1, 2, 130, 143])
def test_other_ends_are_ends(status, tmp_path):
    assert submitted(tmp_path, status) == (status, False)


def test_a_job_is_not_requeued_for_ever(tmp_path):
    assert submitted(tmp_path, 75, restarts=20) == (2, False)
