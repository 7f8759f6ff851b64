"""The memory of a run on a rank, from its configuration: `models.accounting.memory` with the keys that decide it."""

from __future__ import annotations

import torch

from models.accounting import Memory, memory
from training.config import Config


def estimate(
    config: Config,
    world_size: int,
    *,
    compute_dtype: torch.dtype,
    compiled: bool,
    activation_checkpointing: str | None = None,
    micro_batch_size: int | None = None,
) -> Memory:
    """What `config` needs on each of `world_size` ranks; the last two replace what it says itself."""
    training, parallel = config.training, config.parallel
    size = micro_batch_size or training.micro_batch_size
    return memory(
        config.model,
        size,
        config.data.sequence_length,
        world_size=world_size,
        replicate=parallel.replicate,
        compute_dtype=compute_dtype,
        activation_checkpointing=activation_checkpointing or parallel.activation_checkpointing,
        compiled=compiled,
        reshard_after_forward=parallel.reshard_after_forward,
        accumulates=training.global_batch_size > size * world_size,
    )
