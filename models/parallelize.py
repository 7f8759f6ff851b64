"""Lays a decoder out over devices, from outside: activation checkpointing and compilation of its blocks, then FSDP2.

In: a `Decoder` on the meta device and a device mesh. Out: the same object, sharded, materialised on the mesh's device,
weights still undefined. The model file knows nothing of this.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from models.config import ACTIVATION_CHECKPOINTING
from models.decoder import Decoder
from models.one_rank import reduce_in_place

REGIONS = ("before_attention", "after_attention")  # methods of a block; attention and the depth stream lie between

# At most so many neighbouring blocks are gathered and reduced together: hooks, events and collectives of FSDP2 take the
# host as long for many as for one, but the gradients of all their weights are held at a time.
UNIT_BLOCKS, UNIT_PARAMETERS = 6, 100_000_000


def parallelize(
    model: Decoder,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    activation_checkpointing: str = "none",
    compile_backend: str | None = None,
    attention_backend: str = "auto",
    reshard_after_forward: bool = True,
) -> Decoder:
    """Shard every parameter over `mesh`; fp32 master weights and gradient reduction, `compute_dtype` in between.

    Args:
        model: on the meta device; returned on the mesh's device, its values undefined until `initialize` or a load.
        mesh: of ranks that share the batch: one dimension to shard over, or two (FSDP2's HSDP), replicas x shards.
        compute_dtype: dtype of gathered weights and activations.
        activation_checkpointing, compile_backend, attention_backend: as `prepare_blocks` takes them.
        reshard_after_forward: free a block's gathered weights between its forward and its backward.
    """
    prepare_blocks(model, activation_checkpointing, compile_backend, attention_backend)
    # Inputs are not cast: activations have the compute dtype already, and the rotary tables stay fp32.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units(model, reshard_after_forward):
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)
    # The root holds embedding, final norm and head: needed at both ends of the pass, so they stay gathered.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    model.to_empty(device=mesh.device_type)
    reduce_in_place(model)
    return model


def units(model: Decoder, reshard_after_forward: bool) -> list[list[nn.Module]]:
    """The blocks, in order, as FSDP2 gathers their weights: one by one where these are to be freed after forward.

    The first block is alone: what is gathered first and reduced last, other ranks wait for.
    """
    blocks = list(model.blocks)
    size = 1
    if not reshard_after_forward:
        largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
        size = max(1, min(UNIT_BLOCKS, UNIT_PARAMETERS // largest))
    return [blocks[:1], *(blocks[first : first + size] for first in range(1, len(blocks), size))]


def prepare_blocks(
    model: Decoder, activation_checkpointing: str, compile_backend: str | None, attention_backend: str = "auto"
) -> None:
    """Compile the regions of every block, and have what is asked for computed again in backward; in place.

    Args:
        activation_checkpointing: "none"; "selective" (what lies before and after attention is computed again, attention
            is not); "full" (each block is).
        compile_backend: of torch.compile, None compiles nothing. Layers of one kind share their graphs. Compiled are
            the regions alone: the stream's autograd functions have a state that a traced graph would not see.
        attention_backend: of `moda.attention`.
    """
    if activation_checkpointing not in ACTIVATION_CHECKPOINTING:
        raise ValueError(
            f"activation_checkpointing={activation_checkpointing!r}: choose one of "
            f"{', '.join(ACTIVATION_CHECKPOINTING)}."
        )
    if compile_backend is not None:
        torch.compiler.reset()  # graphs of an earlier model of this process count against the limit on a function's own
    # No dropout: no random state to preserve.
    computed_again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.blocks:
        block.attention_backend = attention_backend  # type: ignore[assignment]
        for name in REGIONS:
            if compile_backend is not None:
                compiled = torch.compile(getattr(block, name), backend=compile_backend, dynamic=False)
                setattr(block, name, compiled)
            if activation_checkpointing == "selective":
                setattr(block, name, computed_again(getattr(block, name)))
        if activation_checkpointing == "full":
            # Inside FSDP2's hooks: the weights are gathered once for recomputation and backward.
            block.forward = computed_again(block.forward)
