"""Two ranks: the check that they can train together, and the mesh of replicas."""

import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from models.config import ConfigError
from tests.distributed.ranks import run_ranks
from tests.models.plain import small
from training import rank_check
from training.config import Config
from training.distributed import World
from training.rank_check import check_ranks
from training.rendezvous import bounded


def two_ranks():
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return rank, World(rank, size, torch.device("cpu"), init_device_mesh("cpu", (size,)))


def check(folder):
    rank, world = two_ranks()
    assert world.parameter_mesh(1) is world.mesh
    assert world.parameter_mesh(2).mesh.tolist() == [[0], [1]]  # replicas x shards
    config = Config()
    config.model = small()
    check_ranks(world, config, Path(folder), "data", print)
    with pytest.raises(ConfigError, match=r"rank 1 on .* has the data data-1 and rank 0 on .* has data-0"):
        check_ranks(world, config, Path(folder), f"data-{rank}", print)


def test_ranks_that_see_other_data_all_say_so(tmp_path):
    run_ranks(check, 2, str(tmp_path))


def check_with_a_sum_that_hangs(folder):
    _, world = two_ranks()
    rank_check._sum_of_ones = lambda *_: time.sleep(100)
    rank_check.bounded = lambda seconds, sentence: bounded(0.5, sentence)
    config = Config()
    config.model = small()
    check_ranks(world, config, Path(folder), "data", print)


def test_a_sum_that_hangs_ends_the_ranks_with_the_status_that_asks_for_a_restart(tmp_path, capfd):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 75"):
        run_ranks(check_with_a_sum_that_hangs, 2, str(tmp_path))
    assert "error: after 0 s, the first sum over 2 ranks has not ended: check the network" in capfd.readouterr().err
