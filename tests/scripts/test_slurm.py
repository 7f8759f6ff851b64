"""scripts/slurm/train.sbatch with stand-ins for SLURM's commands: which ends put a job back into the queue."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def submitted(folder, status, restarts=0, arguments=("run.name=first",), **more):
    """The job's exit status, and whether it went back into the queue, when srun gives `status`."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(
        f'#!/bin/sh\necho "$@" > {folder}/started\necho "$SRUN_CPUS_PER_TASK" > {folder}/cpus\nexit {status}\n'
    )
    (tools / "scontrol").write_text(f'#!/bin/sh\n[ "$1" = show ] && echo host && exit\necho "$@" > {folder}/asked\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLURM_RESTART_COUNT": str(restarts)} | more
    done = subprocess.run(
        ["bash", "scripts/slurm/train.sbatch", *arguments],
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


def test_each_node_holds_a_copy_of_the_model_unless_told_otherwise(tmp_path):
    submitted(tmp_path, 0)
    assert "run.name=first parallel.replicate=2" in (tmp_path / "started").read_text()
    (tmp_path / "again").mkdir()
    submitted(tmp_path / "again", 0, arguments=("run.name=first", "parallel.replicate=1"))
    assert (tmp_path / "again" / "started").read_text().endswith("run.name=first parallel.replicate=1\n")


@pytest.mark.parametrize(("given", "cores"), [({"SLURM_CPUS_PER_TASK": "12"}, "12"), ({}, "8")])
def test_each_rank_gets_the_cores_that_the_job_asked_for(tmp_path, monkeypatch, given, cores):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    submitted(tmp_path, 0, **given)
    assert (tmp_path / "cpus").read_text() == f"{cores}\n"


def test_outside_slurm_is_one_sentence():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    command = ["bash", "scripts/slurm/train.sbatch", "run.name=first"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: SLURM_JOB_NODELIST is not set: submit with sbatch")
    assert done.stderr.count("\n") == 1
