"""Where the Triton kernels of the layers run: `models.norm_rotary`, `models.swiglu`."""

from __future__ import annotations

import torch

from moda import kernels


@torch.compiler.assume_constant_result
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels take tensors of this device and dtype."""
    dtypes = (torch.float32,) if kernels.INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
    return dtype in dtypes and device.type != "meta" and kernels.available(device)
