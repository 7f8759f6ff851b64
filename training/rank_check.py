"""What goes wrong between hosts, found in seconds: before the model is built, every rank says what it sees.

In: the process group, the run directory, the fingerprint of a rank's data. Out: nothing, or the same ConfigError on
every rank, which names a rank and its host. On one rank only the disk is looked at.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.accounting import count_parameters
from models.config import ConfigError, shown
from training.checkpoint import checkpoint_folders
from training.config import Config, resolved
from training.distributed import World
from training.rendezvous import NETWORK, bounded, unreachable
from training.resume import flatten, table

TIMEOUT = timedelta(seconds=60)  # for all ranks to come, and for the first sum over devices
# Keys that hosts may have values of their own for: what lies there is compared instead.
OF_HOSTS = ("data.path", "data.mixture", "data.cache", "data.prepare", "run.dir")
CLOCK_SECONDS = 30.0  # that clocks may differ by: records and checkpoints of a run carry times of several hosts
SEEN_SECONDS = 10.0  # that a shared file system may take to show a new folder to other hosts
BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weights and two moments


@dataclass(frozen=True)
class Seen:
    """What one rank sees."""

    host: str
    clock: float  # Unix time, right after all ranks have come
    torch: str
    data: str  # fingerprint
    config: dict[str, Any]  # resolved, with dotted keys
    sees_run_dir: bool
    sum_over_devices: float  # of one from each rank


def check_ranks(world: World, config: Config, run_dir: Path, data: str, say: Callable[[str], None]) -> None:
    """Raise ConfigError unless the ranks can train together; `run_dir` is rank 0's, which makes it when missing.

    `say` takes a warning for the user.
    """
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    _check_room(world, config, run_dir, say)
    if world.size == 1:
        return
    groups = [dist.new_group(backend="gloo", timeout=TIMEOUT)]
    try:
        dist.monitored_barrier(groups[0], TIMEOUT, wait_all_ranks=True)
        clock = time.time()
        if world.device.type == "cuda":
            groups.append(dist.new_group(backend="nccl", timeout=2 * TIMEOUT))  # its end is an abort: ours comes first
        with bounded(TIMEOUT.total_seconds(), f"the first sum over {world.size} ranks has not ended: {NETWORK}"):
            sum_over_devices = _sum_of_ones(world, groups[-1])
        own = Seen(
            host=platform.node(),
            clock=clock,
            torch=torch.__version__,
            data=data,
            config=flatten(resolved(config)),
            sees_run_dir=_appears(run_dir),
            sum_over_devices=sum_over_devices,
        )
        seen: list[Any] = [None] * world.size
        dist.all_gather_object(seen, own, group=groups[0])
    except RuntimeError as error:
        raise ConfigError(unreachable(world.size, error)) from error
    finally:
        for group in groups:
            dist.destroy_process_group(group)
    compare(seen, config.run.dir)


def _check_room(world: World, config: Config, run_dir: Path, say: Callable[[str], None]) -> None:
    needed = BYTES_PER_PARAMETER * count_parameters(config.model).total
    free = world.broadcast(shutil.disk_usage(run_dir).free if world.is_main else None)
    if free < needed:
        raise ConfigError(
            f"run.dir={config.run.dir} has {free / 1e6:,.1f} MB free and a checkpoint needs {needed / 1e6:,.1f} MB: "
            "make room, or use another folder."
        )
    keep = config.checkpoint.keep
    if world.is_main and keep is not None:
        to_come = max(1, keep + 1 - len(checkpoint_folders(run_dir)))
        if free < to_come * needed:
            say(
                f"warning: run.dir={config.run.dir} has {free / 1e6:,.1f} MB free, room for {free // needed} "
                f"checkpoints of {needed / 1e6:,.1f} MB, and checkpoint.keep={keep} comes to {keep + 1}, as the oldest "
                "is deleted after a new one is whole: make room, or keep fewer"
            )


def compare(seen: list[Seen], run_dir: str) -> None:
    """Raise ConfigError for the first rank that differs from rank 0 where it must not."""

    def require_same(value: Callable[[Seen], str], name: str, remedy: str) -> None:
        for rank, other in enumerate(seen):
            if value(other) != value(seen[0]):
                raise ConfigError(
                    f"rank {rank} on {other.host} has {name} {value(other)} and rank 0 on {seen[0].host} has "
                    f"{value(seen[0])}: {remedy}."
                )

    require_same(lambda s: s.torch, "torch", "install one version on all hosts")
    for rank, other in enumerate(seen):
        _require_same_config(seen[0], rank, other)
    require_same(lambda s: s.data, "the data", "give all hosts one copy of data.path, or equal copies")
    for rank, other in enumerate(seen):
        if not other.sees_run_dir:
            raise ConfigError(
                f"run.dir={run_dir} of rank 0 does not exist for rank {rank} on {other.host}: every rank writes its "
                "part of a checkpoint, so use a folder that all hosts share."
            )
        if abs(other.clock - seen[0].clock) > CLOCK_SECONDS:
            raise ConfigError(
                f"the clock of rank {rank} on {other.host} differs from that of rank 0 on {seen[0].host} by "
                f"{other.clock - seen[0].clock:+.0f} s: synchronise the hosts (NTP)."
            )
        if other.sum_over_devices != len(seen):
            raise ConfigError(
                f"a sum over the devices of {len(seen)} ranks gave {other.sum_over_devices:g} on rank {rank} "
                f"({other.host}): check that host's GPU and network."
            )


def _require_same_config(first: Seen, rank: int, other: Seen) -> None:
    keys = [
        key
        for key in sorted(first.config.keys() | other.config.keys())
        if key not in OF_HOSTS and first.config.get(key) != other.config.get(key)
    ]
    if keys:
        rows = [(key, shown(first.config.get(key)), shown(other.config.get(key))) for key in keys]
        raise ConfigError(
            f"rank {rank} on {other.host} has another configuration than rank 0 on {first.host}: start every host with "
            f"the same command and the same files.{table([('key', 'rank 0', f'rank {rank}'), *rows])}"
        )


def _sum_of_ones(world: World, group: dist.ProcessGroup) -> float:
    """Of one from each rank, over devices."""
    ones = torch.ones(1, device=world.device)
    dist.all_reduce(ones, group=group)
    return ones.item()


def _appears(folder: Path) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while not folder.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
