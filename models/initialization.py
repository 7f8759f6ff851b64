"""Initial weights of a decoder (OLMo 2): truncated normal for every matrix, norms 1, biases 0.

In: a decoder, sharded or not, and a seed. Out: the same values for any sharding and any order of modules.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.decoder import Decoder

CUT = 3.0  # standard deviations at which the normal is cut


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Fill every parameter in place.

    Each has a generator of its own, made from (seed, name). Values are drawn on the parameter's device: a CPU and a GPU
    give different ones.
    """
    std = model.config.init_std
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            generator = torch.Generator(parameter.device).manual_seed(_seed_of(seed, name))
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            nn.init.trunc_normal_(full, std=std, a=-CUT * std, b=CUT * std, generator=generator)
            if isinstance(parameter, DTensor):  # every rank has drawn the same matrix and keeps its part
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(full)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
