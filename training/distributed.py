"""The processes of a run: who this one is, and the process group, made for a run and taken down after it.

In: the environment of torchrun, or none (one process). Out: a `World`. A process may run several jobs, one after the
other (multirun); each has a process group of its own.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data.shards import DataError
from models.config import ConfigError
from training.config import LostRankError, TrainingError

ARRIVAL = timedelta(minutes=10)  # for all ranks to start
_jobs = itertools.count()


@dataclass(frozen=True)
class World:
    """This process among the processes of the run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # one dimension, all ranks
    store: dist.Store | None = None  # what ranks tell each other without a collective; None for one process

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def compute_dtype(self, precision: str) -> torch.dtype:
        """The dtype that `training.precision` means here: auto is bf16 on a GPU and fp32 on a CPU."""
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]

    def compile_backend(self, choice: bool | None) -> str | None:
        """The backend of torch.compile that `parallel.compile` means here, None for none: null compiles on a GPU."""
        return "inductor" if choice or (choice is None and self.device.type == "cuda") else None

    def parameter_mesh(self, replicate: int) -> DeviceMesh:
        """The mesh that parameters are laid out over: all ranks, or `replicate` groups of consecutive ranks."""
        if replicate == 1:
            return self.mesh
        shape = (replicate, self.size // replicate)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def from_main(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on rank 0, on every rank; so with what it raises for the user."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = act(), None
            except (ConfigError, DataError, TrainingError) as error:
                outcome = None, error
        value, mistake = self.broadcast(outcome)
        if mistake is not None:
            raise mistake
        return value

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` over ranks."""
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over ranks."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, on every rank."""
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest `number` of all ranks. They wait for each other, not for their devices."""
        if self.size == 1:
            return number
        value = torch.tensor(number)  # on the CPU
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)


@contextmanager
def distributed_world(device: str) -> Iterator[World]:
    """The process group of one job; `device` is "auto" (cuda when there is one), "cpu" or "cuda".

    Raises LostRankError when not all ranks come.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    own = torch.device("cpu")
    if kind == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
    # Jobs of one process share the store of the launcher, and so do the attempts of torchrun --max-restarts: a prefix
    # keeps their addresses apart.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}-job-{next(_jobs)}", _store(rank))
    _meet(store, rank, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        device_id=own if kind == "cuda" else None,
    )
    try:
        yield World(rank, size, own, init_device_mesh(kind, (size,)), store if size > 1 else None)
    finally:
        dist.destroy_process_group()


@cache
def _store(rank: int) -> dist.Store:
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    # As torch's rendezvous does; but rank 0 does not wait in it, so that `_meet` can say who is missing.
    hosts_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=hosts_it, timeout=ARRIVAL, wait_for_workers=False)


def _meet(store: dist.Store, rank: int, size: int) -> None:
    """Wait until all ranks have come. Raises LostRankError, naming those that have not within `ARRIVAL`."""
    names = [f"rank-{other}" for other in range(size)]
    store.set(names[rank], platform.node())
    try:
        store.wait(names, ARRIVAL)
    except dist.DistStoreError as error:
        missing = [other for other, name in enumerate(names) if not store.check([name])]
        raise LostRankError(
            f"of {size} ranks, {', '.join(map(str, missing[:8]))} did not come within {ARRIVAL.total_seconds():.0f} s: "
            "look into the log of their hosts."
        ) from error
