"""Lays a decoder out over devices, from outside: activation checkpointing, then FSDP2.

In: a `Decoder` on the meta device and a device mesh. Out: the same object, sharded, materialised on the mesh's device,
weights still undefined. The model file knows nothing of this.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from models.decoder import Decoder

ACTIVATION_CHECKPOINTING = ("none", "full")


def parallelize(
    model: Decoder,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    activation_checkpointing: str = "none",
    reshard_after_forward: bool = True,
) -> Decoder:
    """Shard every parameter over `mesh`; fp32 master weights and gradient reduction, `compute_dtype` in between.

    Args:
        model: on the meta device; returned on the mesh's device, its values undefined until `initialize` or a load.
        mesh: one-dimensional, of ranks that share the batch.
        compute_dtype: dtype of gathered weights and activations.
        activation_checkpointing: "none", or "full" (each block is computed again in backward).
        reshard_after_forward: free a block's gathered weights between its forward and its backward.
    """
    if activation_checkpointing not in ACTIVATION_CHECKPOINTING:
        raise ValueError(
            f"activation_checkpointing={activation_checkpointing!r}: choose one of "
            f"{', '.join(ACTIVATION_CHECKPOINTING)}."
        )
    if activation_checkpointing == "full":
        for block in model.blocks:
            # Inside FSDP2's hooks: the weights are gathered once for recomputation and backward. No dropout: no random
            # state to preserve.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    # Inputs are not cast: activations have the compute dtype already, and the rotary tables stay fp32.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)
    # The root holds embedding, final norm and head: needed at both ends of the pass, so they stay gathered.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return model.to_empty(device=mesh.device_type)
