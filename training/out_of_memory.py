"""What to say when a device has no memory left: the sizes that would have fitted."""

from __future__ import annotations

import torch

from training.config import Config
from training.distributed import World
from training.memory_estimate import estimate

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
    per_rank = config.training.global_batch_size // world.size
    fitting = []
    for checkpointing in dict.fromkeys((mode, "full")):
        sizes = [n for n in range(tried, 0, -1) if per_rank % n == 0 and (n, checkpointing) != (tried, mode)]
        fits = next((n for n in sizes if total(n, checkpointing) <= USABLE * capacity), None)
        if fits is not None:
            setting = [f"training.micro_batch_size={fits}"] if fits != tried else []
            setting += [f"parallel.activation_checkpointing={checkpointing}"] if checkpointing != mode else []
            fitting.append(f"{' '.join(setting)} ({total(fits, checkpointing) / 1e9:.1f} GB)")
    needed = (
        f"training.micro_batch_size={tried} with parallel.activation_checkpointing={mode} needs about "
        f"{total(tried, mode) / 1e9:.1f} GB on a rank, and the device has {capacity / 1e9:.1f} GB"
    )
    if not fitting:
        return f"{needed}: no micro-batch fits, so use more ranks, a shorter data.sequence_length or a smaller model."
    remedies = ", or ".join(fitting)
    return f"{needed}: what fits is {remedies}. The same command with it continues the last checkpoint, if any."


def explain(error: torch.OutOfMemoryError, config: Config, world: World) -> str:
    """The message for the user in place of a traceback."""
    capacity = torch.cuda.get_device_properties(world.device).total_memory
    first = str(error).partition(". ")[0]
    return f"{first}. {what_would_fit(config, world, capacity)}"
