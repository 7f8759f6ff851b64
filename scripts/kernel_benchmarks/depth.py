"""The depth kernels alone, in bytes a second: every tensor that a pass must read or write is counted, statistics too.

forward     q, K, V; o and lse in place
gradients   do, q, o, lse, K, V, dq in place; delta, dK, dV out: the backward of `moda.attention`
query       do, q, o, lse, K, V, dq in place; delta and a copy of lse out: the backward of a stream's reader
pull        q, do, lse, delta of all readers, K, V of one layer's slots; dK, dV out: the backward of a stream's write
block       the same for the slots of several layers, dK, dV in fp32: what a blocked pull does ahead for the next layers
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scripts.kernel_benchmarks import paper, timing

HALF, FULL = 2, 4  # bytes of an element
READER_BYTES = 16 * 2**30  # q and do of the readers of a pull, at most: bounds memory for large groups
MAX_READERS = 32
KERNELS = ("forward", "gradients", "query", "pull", "block")


class Problem(NamedTuple):
    """Sizes of a call; tokens = batch * time."""

    tokens: int
    group: int
    slots: int = 64
    pulled: int = 2  # slots of one layer
    block: int = 16  # slots of several layers
    kv_heads: int = paper.KV_HEADS
    head_dim: int = paper.HEAD_DIM

    @property
    def query_bytes(self) -> int:
        """Of q, and of whatever has its shape, in bf16."""
        return HALF * self.tokens * self.group * self.kv_heads * self.head_dim

    @property
    def slot_bytes(self) -> int:
        """Of the keys, or the values, of one slot, in bf16."""
        return HALF * self.tokens * self.kv_heads * self.head_dim

    @property
    def statistic_bytes(self) -> int:
        """Of lse or delta, fp32."""
        return FULL * self.tokens * self.group * self.kv_heads

    @property
    def readers(self) -> int:
        """Of a pull."""
        return max(1, min(MAX_READERS, READER_BYTES // (2 * self.query_bytes)))


PROBLEMS = tuple(Problem(tokens, group) for tokens in (16384, 32768) for group in (2, 8, 32))


def bytes_moved(kernel: str, problem: Problem) -> int:
    """Bytes that a pass of one of KERNELS reads and writes, each tensor once a pass."""
    query, slot, statistic = problem.query_bytes, problem.slot_bytes, problem.statistic_bytes
    keys_and_values = 2 * problem.slots * slot
    if kernel == "forward":
        return keys_and_values + 3 * query + 2 * statistic
    if kernel == "gradients":
        return 2 * keys_and_values + 5 * query + 2 * statistic
    if kernel == "query":
        return keys_and_values + 5 * query + 3 * statistic
    if kernel == "pull":
        return problem.readers * 2 * (query + statistic) + 4 * problem.pulled * slot
    if kernel == "block":
        return problem.readers * 2 * (query + statistic) + (2 + 2 * FULL // HALF) * problem.block * slot
    raise ValueError(f"kernel={kernel!r} is none of {', '.join(KERNELS)}.")


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Time and speed of every kernel and problem; `copy` is the speed of a plain copy, bytes a second."""
    copy = timing.copy_speed()
    timing.free()
    say(f"a copy runs at {copy / 1e12:.2f} TB/s")
    rows = []
    for problem in PROBLEMS:
        row: dict[str, Any] = {**problem._asdict(), "readers": problem.readers, "kernels": {}}
        for kernel in KERNELS:
            ms = timing.milliseconds(prepare(kernel, problem))
            moved = bytes_moved(kernel, problem)
            row["kernels"][kernel] = {"ms": ms, "bytes": moved, "speed": moved / ms * 1e3}
            timing.free()
        rows.append(row)
        speeds = ", ".join(f"{name} {of['speed'] / 1e12:.2f}" for name, of in row["kernels"].items())
        say(f"tokens={problem.tokens} G={problem.group}, TB/s: {speeds}")
    return {"copy": copy, "rows": rows}


def prepare(kernel: str, problem: Problem) -> Callable[[], None]:
    """A function that runs one kernel on random inputs of the problem, on the present CUDA device."""
    from moda.kernels import depth

    generator = torch.Generator("cuda").manual_seed(0)
    random = partial(timing.random, generator)
    tokens, heads, scale = problem.tokens, problem.group * problem.kv_heads, problem.head_dim**-0.5

    def statistic(*readers: int) -> Tensor:  # an lse so large that no probability overflows
        return torch.randn(*readers, 1, tokens, heads, device="cuda", generator=generator) + 20

    query_shape = (1, tokens, heads, problem.head_dim)
    slot_shape = (1, tokens, problem.kv_heads, problem.head_dim)
    if kernel in ("pull", "block"):
        slots, dtype = (problem.pulled, torch.bfloat16) if kernel == "pull" else (problem.block, torch.float32)
        q, do = (random(problem.readers, *query_shape) for _ in range(2))
        lse, delta = statistic(problem.readers), statistic(problem.readers)
        keys, values = random(slots, *slot_shape), random(slots, *slot_shape)
        dk, dv = torch.empty_like(keys, dtype=dtype), torch.empty_like(values, dtype=dtype)
        readers = list(zip(q, do, strict=True))  # the kernel knows only where they lie: they must stay alive
        addresses = torch.tensor([[x.data_ptr() for x in pair] for pair in readers], device="cuda")

        def pull() -> None:
            depth.depth_backward_slots(addresses, lse, delta, 0, len(readers), keys, values, dk, dv, scale)

        return pull

    q, o, keys, values = (
        random(*shape)
        for shape in (query_shape, query_shape, (problem.slots, *slot_shape), (problem.slots, *slot_shape))
    )
    lse = statistic()
    if kernel == "forward":
        return lambda: depth.depth_forward(q, keys, values, o, lse, scale)
    do, dq, delta = random(*query_shape), random(*query_shape), statistic()
    if kernel == "gradients":
        dk, dv = torch.empty_like(keys), torch.empty_like(values)
        return lambda: depth.depth_backward_query(do, q, keys, values, lse, delta, dq, scale, o=o, dk=dk, dv=dv)
    left = {"address": torch.empty(2, dtype=torch.int64, device="cuda"), "reader_lse": torch.empty_like(delta)}
    return lambda: depth.depth_backward_query(do, q, keys, values, lse, delta, dq, scale, o=o, **left)
