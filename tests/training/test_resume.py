"""training/resume.py: the command that continues a run (the choice of a checkpoint: test_checkpoint.py)."""

import sys

import pytest

from training.resume import continue_command

TORCHRUN = {"TORCHELASTIC_RUN_ID": "first", "RANK": "0", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "PYTHON train.py a=b training.stop_at=null"),
        ({"SLURM_JOB_ID": "7"}, "PYTHON train.py a=b training.stop_at=null"),  # by hand, in an allocation
        (
            TORCHRUN | {"GROUP_WORLD_SIZE": "1"},
            "PYTHON -m torch.distributed.run --nproc-per-node 8 train.py a=b training.stop_at=null",
        ),
        (
            TORCHRUN | {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"},
            "PYTHON -m torch.distributed.run --nproc-per-node 8 --max-restarts 3 train.py a=b training.stop_at=null",
        ),
        (
            TORCHRUN | SLURM | {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"},
            "on each of the 2 hosts, PYTHON -m torch.distributed.run --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d "
            "--rdzv-endpoint node-1:29500 --rdzv-id first train.py a=b training.stop_at=null",
        ),
        (
            SLURM | {"RANK": "0", "WORLD_SIZE": "8"},
            "sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 scripts/slurm/train.sbatch a=b "
            "training.stop_at=null",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "on every rank, with RANK and WORLD_SIZE as they were, PYTHON train.py a=b training.stop_at=null",
        ),
    ],
    ids=["one process", "in an allocation", "one host", "restarts", "hosts", "slurm", "by hand"],
)
def test_the_command_that_continues_starts_all_ranks(environment, command, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE", "RANK", *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "a=b", "training.stop_at=10"])
    monkeypatch.setattr(sys, "executable", "/elsewhere/PYTHON")
    assert continue_command(at_stop=True) == command.replace("PYTHON", "/elsewhere/PYTHON")
    unchanged = command.replace("training.stop_at=null", "training.stop_at=10")
    assert continue_command(at_stop=False) == unchanged.replace("PYTHON", "/elsewhere/PYTHON"), "after a signal"
