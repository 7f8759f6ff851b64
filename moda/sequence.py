"""Attention over the sequence alone, with its log-sum-exp, by the fastest kernel of the menu that can take the call.

In and out as in `moda.sequence_kernels`. Which kernel is fastest is never measured here: `sequence_table.json`, written
by `scripts/benchmark_kernels.py --tune` (`moda.tuning`), holds the times of every kernel over a grid of shapes, forward
and backward apart, as they can be mixed. Of the lines for the architecture, dtype (fp16 takes bf16's where it has none)
and presence of documents, a call takes the one of the next larger head_dim, then group, then time, or of the largest
there is. Kernels come in the order of that line's times, those without a time after them, and for an architecture
without lines in the order of the menu. The first that can take the call does.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moda.sequence_kernels import MENU, Call, SequenceKernel

Kind = Literal["forward", "backward"]

TABLE = Path(__file__).with_name("sequence_table.json")


class Line(NamedTuple):
    """Times of the kernels for one shape."""

    architecture: int  # compute capability, 90 for 9.0
    dtype: str
    documents: bool
    head_dim: int
    group: int
    time: int
    forward: dict[str, float]  # kernel: milliseconds
    backward: dict[str, float]


def read_table(path: Path) -> list[Line]:
    """The lines of a table. Raises ValueError for a line or a kernel that does not exist."""
    lines = []
    for number, entry in enumerate(json.loads(path.read_text())["lines"]):
        if set(entry) != set(Line._fields) or not set(entry["forward"]) | set(entry["backward"]) <= set(MENU):
            raise ValueError(
                f"{path.name}: line {number} must have the fields {', '.join(Line._fields)} and times of the kernels "
                f"{', '.join(MENU)}, got {entry}. Write the table again: scripts/benchmark_kernels.py --tune."
            )
        lines.append(Line(**entry))
    return lines


def order(call: Call, kind: Kind, lines: list[Line]) -> list[str]:
    """Names of the kernels, the fastest for the call first, whether or not they can take it."""
    known = [line for line in lines if (line.architecture, line.documents) == (call.architecture, call.documents)]
    dtype = str(call.dtype).removeprefix("torch.")
    if dtype not in {line.dtype for line in known}:
        dtype = "bfloat16"
    known = [line for line in known if line.dtype == dtype]
    for axis in ("head_dim", "group", "time"):
        sizes = sorted({getattr(line, axis) for line in known})
        size = next((size for size in sizes if size >= getattr(call, axis)), sizes[-1] if sizes else None)
        known = [line for line in known if getattr(line, axis) == size]
    times = getattr(known[0], kind) if known else {}
    return sorted(MENU, key=lambda name: times.get(name, float("inf")))  # stable: the rest as in the menu


def choose(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, kind: Kind) -> SequenceKernel:
    """The kernel that does a call. Raises ValueError, with every kernel's reason, when none can."""
    call = Call.of(q, k, _masks(q, cu_seqlens))
    kernel, reason = _choice(call, kind)
    if kernel is None:
        raise ValueError(f"No sequence kernel can take this call: {reason}. Use backend='auto'.")
    return kernel


def unusable(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> str | None:
    """Why no kernel of the menu can take a call, None when there is one for the forward and one for the backward."""
    call = Call.of(q, k, _masks(q, cu_seqlens))
    return _choice(call, "forward")[1] or _choice(call, "backward")[1]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """o [batch, time, query_heads, head_dim], contiguous, and lse as the kernels give it."""
    q, k, v = (_aligned(x) for x in (q, k, v))
    q, scale, _ = _positive(q, scale)
    return choose(q, k, cu_seqlens, "forward").forward(q, k, v, scale, _masks(q, cu_seqlens))


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (contiguous), dk, dv of the sequence's part, given the o and lse of a joint softmax that has it as a part."""
    q, k, v = (_aligned(x) for x in (q, k, v))
    q, scale, sign = _positive(q, scale)
    kernel = choose(q, k, cu_seqlens, "backward")
    do = _aligned(do.contiguous())  # a slice of a larger gradient may begin anywhere
    dq, dk, dv = kernel.backward(do, q, k, v, o, lse, scale, _masks(q, cu_seqlens))
    return (dq if sign == 1 else dq * sign).contiguous(), dk, dv


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """q times the sign of a scale, a positive scale, and the sign: the same scores by kernels that take the maximum
    before they scale, and give no numbers for a scale of 0 or less."""
    if scale > 0:
        return q, scale, 1
    sign = -1 if scale < 0 else 0
    return q * sign, -scale or 1.0, sign


@cache
def _lines() -> list[Line]:
    return read_table(TABLE)


@lru_cache(maxsize=4096)
def _choice(call: Call, kind: Kind) -> tuple[SequenceKernel | None, str | None]:
    """The kernel, or why there is none."""
    return first_usable(call, order(call, kind, _lines()), MENU)


def first_usable(
    call: Call, names: list[str], menu: dict[str, SequenceKernel]
) -> tuple[SequenceKernel | None, str | None]:
    """The first kernel of these that can take the call, or None and everyone's reason why not."""
    reasons = []
    for name in names:
        reason = menu[name].unusable(call)
        if reason is None:
            return menu[name], None
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def _masks(q: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """A row of one token is a document of its own anyway."""
    return None if q.shape[1] == 1 else cu_seqlens


def _aligned(x: Tensor) -> Tensor:
    """x where kernels can read its rows 16 bytes at a time (no copy of what a projection gives), else a copy."""
    whole = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % whole == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)
