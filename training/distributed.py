"""The processes of a run: who this one is, and the process group, made for a run and taken down after it.

In: the environment of torchrun, or none (one process). Out: a `World`. A process may run several jobs, one after the
other (multirun); each has a process group of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data.shards import DataError
from models.accounting import peak_flops
from models.config import ConfigError
from training.config import TrainingError
from training.environment import rank_variable
from training.rendezvous import presence
from training.startup import keep_compiled_kernels

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

    def synchronize(self) -> None:
        """Wait until this rank's device has done what is queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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
def distributed_world(device: str, stopping: Callable[[], Signals | None] = lambda: None) -> Iterator[World]:
    """The process group of one job; `device` is "auto" (cuda when there is one), "cpu" or "cuda".

    `stopping` returns the signal that asks to end the wait for other ranks, or None. Raises what `Presence.meet` does
    when not all ranks come, and ConfigError when they do not reach each other.
    """
    rank, size = rank_variable("RANK", 0), rank_variable("WORLD_SIZE", 1)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    own = torch.device("cpu")
    if kind == "cuda":
        own = torch.device("cuda", rank_variable("LOCAL_RANK", 0))
        torch.cuda.set_device(own)
        keep_compiled_kernels(own.index)
    job = next(_jobs)  # jobs of one process share the store of the launcher
    store = dist.HashStore() if size == 1 else presence().meet(job, stopping)
    with nullcontext() if size == 1 else presence().connecting():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            device_id=own if kind == "cuda" else None,
        )
        mesh = init_device_mesh(kind, (size,))
    try:
        yield World(rank, size, own, mesh, store if size > 1 else None)
    finally:
        dist.destroy_process_group()


def bf16_peak(device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """Matrix peak of a device in FLOP/s; None where it is not known, or not that of what a step in this dtype does."""
    if device.type != "cuda" or compute_dtype != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name(device))
