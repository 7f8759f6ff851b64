"""Refuses second derivatives, which the backward formulas of this package do not have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


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
