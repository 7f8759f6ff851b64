"""Starts ranks: each runs a function in a process group of its own, gloo on the CPU."""

import os
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing


def _rank(rank, function, world_size, store, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(*arguments)
        torch.distributed.barrier()  # ranks leave together: none closes connections that another still uses
    finally:
        torch.distributed.destroy_process_group()


def run_ranks(function, world_size, *arguments):
    """Run `function(*arguments)` on every rank; a rank's exception ends the test."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        torch.multiprocessing.spawn(_rank, (function, world_size, store, arguments), nprocs=world_size)
