"""Triton kernels of the package; importing it needs neither Triton nor a GPU.

`available` says whether the kernels can run on a device. `moda.kernels.depth` has those of the depth part,
`moda.kernels.fused` those of the sequence and, forward, of both at once.
"""

import importlib.util
import os
from functools import cache

import torch

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
