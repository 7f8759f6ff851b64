"""Refuses second derivatives and forward-mode ones, which the formulas of this package do not have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `backward` of an autograd.Function: under create_graph=True it raises.

    `once_differentiable` raises only where the incoming gradient itself requires one: a gradient penalty on a loss that
    is linear in the output would lose its gradient without a word.
    """

    @wraps(backward)
    def checked(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("moda has no second derivatives: take this gradient without create_graph=True.")
        return backward(*arguments)

    return checked


def refuse_tangents(*inputs: Tensor | None) -> None:
    """Raise RuntimeError if an input carries a tangent: a registered operator would drop it without a word."""
    # Without an open level of forward mode, as almost always, nothing is asked of the tensors.
    if forward_ad._current_level >= 0 and any(x is not None and _has_tangent(x) for x in inputs):
        raise RuntimeError(
            "moda has no forward-mode derivatives: take this one in reverse mode, with backward() or torch.autograd."
        )


def _has_tangent(x: Tensor) -> bool:
    while _functorch.is_batchedtensor(x):  # of vmap, which cannot unpack
        x = _functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None
