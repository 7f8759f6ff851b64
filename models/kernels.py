"""What the operators of the layers share: where their Triton kernels run, how they are registered, their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from moda import kernels

# A custom_op would check at every call, six of which a layer makes, that nothing is aliased, as tests do once.
LIBRARY = torch.library.Library("models", "FRAGMENT")


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


@torch.compiler.assume_constant_result
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels take tensors of this device and dtype."""
    dtypes = (torch.float32,) if kernels.INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
    return dtype in dtypes and device.type != "meta" and kernels.available(device)


def registered(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """A function of tensors, which writes to none of them, as the operator models::`name` of all devices."""
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"models::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.models, name).default
