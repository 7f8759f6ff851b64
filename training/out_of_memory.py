"""What to say when a device has no memory left: the sizes that would have fitted."""

from __future__ import annotations

import os

import torch

from training.config import Config
from training.distributed import World
from training.memory_estimate import estimate

HOST_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
USABLE = 0.92  # share of a device that an estimate may take: the allocator's gaps and the libraries' own come on top


def what_would_fit(config: Config, world: World, capacity: int) -> str:
    """A sentence with the largest settings that fit `capacity` bytes a rank, by `models.accounting`."""
    compiled = world.compile_backend(config.parallel.compile) is not None

    def total(size: int, checkpointing: str) -> int:
        return estimate(
            config,
            world.size,
            compute_dtype=world.compute_dtype(config.training.precision),
            compiled=compiled,
            activation_checkpointing=checkpointing,
            micro_batch_size=size,
        ).total

    tried, mode = config.training.micro_batch_size, config.parallel.activation_checkpointing
    needed = (
        f"training.micro_batch_size={tried} with parallel.activation_checkpointing={mode} needs about "
        f"{total(tried, mode) / 1e9:.1f} GB on a rank"
    )
    if total(tried, mode) <= USABLE * capacity:
        evaluated = config.evaluation.micro_batch_size or tried
        larger = f", or give evaluation.micro_batch_size={evaluated} less" if evaluated > tried else ""
        return (
            f"{needed}, which the {capacity / 1e9:.1f} GB of the device would hold: look at what else takes its memory"
            f"{larger}. The same command continues the last checkpoint, if any."
        )
    per_rank = config.training.global_batch_size // world.size
    fitting = []
    for checkpointing in dict.fromkeys((mode, "full")):
        sizes = [n for n in range(tried, 0, -1) if per_rank % n == 0 and (n, checkpointing) != (tried, mode)]
        fits = next((n for n in sizes if total(n, checkpointing) <= USABLE * capacity), None)
        if fits is not None:
            setting = [f"training.micro_batch_size={fits}"] if fits != tried else []
            setting += [f"parallel.activation_checkpointing={checkpointing}"] if checkpointing != mode else []
            fitting.append(f"{' '.join(setting)} ({total(fits, checkpointing) / 1e9:.1f} GB)")
    needed += f", and the device has {capacity / 1e9:.1f} GB"
    if not fitting:
        return f"{needed}: no micro-batch fits, so use more ranks, a shorter data.sequence_length or a smaller model."
    remedies = ", or ".join(fitting)
    return f"{needed}: what fits is {remedies}. The same command with it continues the last checkpoint, if any."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, has no memory left; PyTorch's allocator of the host raises RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and HOST_ALLOCATOR in str(error)
    )


def explain(error: BaseException, config: Config, world: World) -> str:
    """The message for the user in place of a traceback: what was asked for and is free, and sizes that would fit."""
    if isinstance(error, torch.OutOfMemoryError):
        capacity = torch.cuda.get_device_properties(world.device).total_memory
        said = str(error).partition(" Of the allocated memory")[0]  # what follows is about the allocator's settings
    else:
        capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        said = f"the host is out of memory{str(error).partition(HOST_ALLOCATOR)[2]}."
    return f"{' '.join(said.split())} {what_would_fit(config, world, capacity)}"
