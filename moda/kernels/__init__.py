"""Triton kernels of the package; importing it needs neither Triton nor a GPU.

`available` says whether the kernels can run on a device, `unfit` why heads do not fit them. `moda.kernels.depth` has
those of the depth part, `moda.kernels.fused` those of the sequence and, forward, of both at once.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

MAX_GROUP = 128  # query heads a kv head: the queries of a row are one tile in registers

# Read once: Triton decides when a kernel is decorated, that is on import, whether it will be compiled or interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def available(device: torch.device | str) -> bool:
    """Whether Triton is installed and runs kernels on tensors of `device`.

    That is on CUDA devices of compute capability 8.0 and later (bf16), and anywhere, in fp32 and very slowly, where
    the environment had TRITON_INTERPRET=1 before the first import of this package.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    device = torch.device(device)
    return INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def unfit(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels cannot take the heads of q, k [batch, time, heads, head_dim], None when they can."""
    if q.shape[3] % 16 or not 16 <= q.shape[3] <= 128:
        return f"it needs a head_dim that is a multiple of 16 up to 128, not {q.shape[3]}"
    if q.shape[2] > MAX_GROUP * k.shape[2]:
        return f"it takes up to {MAX_GROUP} query heads a kv head, not {q.shape[2] // k.shape[2]}"
    return None
