"""The backends of joint attention, and the choice among them.

A backend is a module with one set of functions (see `moda.reference`, which defines what they compute):

    unusable(q, k, cu_seqlens)   why it cannot take a call, None when it can
    explain(q, k, cu_seqlens)    what runs when it does
    joint_forward                o and the joint lse
    joint_backward               gradients of a call that owns its slots: dq, dk, dv and dense ones of the slots
    reader_backward              gradients of a layer of a stream: dq, dk, dv; the slots pull theirs later
    pull                         gradients of slots from readers

lse is [batch, time, query_heads] everywhere, and lies in memory as [batch, query_heads, time].
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

from torch import Tensor

from moda import fused, joined, reference

BACKENDS = {"joined": joined, "fused": fused, "reference": reference}  # the fastest first


def choose_backend(backend: str, q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> ModuleType:
    """The module that does a call; "auto" takes the first that is exact for it.

    Raises ValueError for a backend that does not exist or cannot take the call.
    """
    if backend == "auto":
        for module in BACKENDS.values():
            if module.unusable(q, k, cu_seqlens) is None:
                if module is reference and q.is_cuda:
                    _warn_of_reference("; ".join(reasons_against(q, k, cu_seqlens)))
                return module
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist: choose one of auto, {', '.join(BACKENDS)}.")
    if reason := BACKENDS[backend].unusable(q, k, cu_seqlens):
        raise ValueError(f"backend={backend!r} cannot take this call: {reason}. Use backend='auto'.")
    return BACKENDS[backend]


def reasons_against(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> list[str]:
    """Why the backends before the first that takes a call do not, a sentence each."""
    reasons = []
    for name, module in BACKENDS.items():
        reason = module.unusable(q, k, cu_seqlens)
        if reason is None:
            break
        reasons.append(f"not {name}: {reason}")
    return reasons


@cache  # once for each reason
def _warn_of_reference(reasons: str) -> None:
    warnings.warn(f"moda.attention runs its slow reference on this GPU ({reasons}).", stacklevel=2)
