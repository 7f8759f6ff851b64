"""Two ranks: the check that they can train together, and the mesh of replicas."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from models.config import ConfigError
from tests.distributed.ranks import run_ranks
from tests.models.plain import small
from training.config import Config
from training.distributed import World
from training.rank_check import check_ranks


def check(folder):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = World(rank, size, torch.device("cpu"), init_device_mesh("cpu", (size,)))
    assert world.parameter_mesh(1) is world.mesh
    assert world.parameter_mesh(2).mesh.tolist() == [[0], [1]]  # replicas x shards
    config = Config()
    config.model = small()
    check_ranks(world, config, Path(folder), "data")
    with pytest.raises(ConfigError, match=r"rank 1 on .* has the data data-1 and rank 0 on .* has data-0"):
        check_ranks(world, config, Path(folder), f"data-{rank}")


def test_ranks_that_see_other_data_all_say_so(tmp_path):
    run_ranks(check, 2, str(tmp_path))
