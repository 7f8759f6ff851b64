"""Stacks of attention layers through `moda.DepthStream`, beside the same stacks without depth: time and peak memory.

A layer writes its K, V, attends, and, but for the last, writes a second pair, as a decoder with FFN KV projections
does; nothing else of a decoder is here. What the stream costs is the difference of the two stacks, copies into the
slots and additions of gradients included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moda
from scripts.kernel_benchmarks import baselines, timing

SLOTS_PER_LAYER = 2
MEMORY_LAYERS = (12, 24, 36, 72)
MEMORY_BATCHES = (1, 2, 4, 8)
LISTED_SHARE = 0.01  # of the difference: kernels below it are summed up as one line


@dataclass(frozen=True)
class Shape:
    """Of a stack; the default is the 700M model on 8 sequences of 4096 tokens."""

    layers: int = 36
    batch: int = 8
    time: int = 4096
    query_heads: int = 16
    kv_heads: int = 8
    head_dim: int = 64

    @property
    def slot_bytes(self) -> int:
        """Of all slots of a pass, keys and values, bf16."""
        elements = self.batch * self.time * self.kv_heads * self.head_dim
        return 2 * 2 * SLOTS_PER_LAYER * self.layers * elements

    @property
    def retained_bytes(self) -> int:
        """Of the q and do of all layers, which a pass keeps until the slots they have read are pulled; bf16."""
        return 2 * 2 * self.layers * self.batch * self.time * self.query_heads * self.head_dim


class Stack:
    """Layers of attention whose outputs are added up, as a decoder's residual stream does; inputs are leaves.

    `shared`: one set of inputs serves all layers, each of which makes tensors of its own from it. What a step holds is
    then what a decoder's attention would hold, and its inputs and their gradients are as small as one layer's.
    """

    def __init__(self, shape: Shape, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, shared: bool):
        self.shape, self.device, self.dtype, self.shared = shape, device, dtype, shared
        generator = torch.Generator(device).manual_seed(0)

        def leaf(heads: int) -> Tensor:
            size = (shape.batch, shape.time, heads, shape.head_dim)
            return torch.randn(size, device=device, dtype=dtype, generator=generator).requires_grad_()

        heads = (shape.query_heads, *[shape.kv_heads] * 4)  # q, k, v, and the second pair of keys and values
        sets = [[leaf(number) for number in heads] for _ in range(1 if shared else shape.layers)]
        self.layers = [sets[index % len(sets)] for index in range(shape.layers)]
        self.leaves = [tensor for tensors in sets for tensor in tensors]
        self.x, self.dx = leaf(shape.query_heads).detach(), leaf(shape.query_heads).detach()

    def step(self, *, depth: bool) -> tuple[Tensor | None, ...]:
        """Forward and backward of all layers; the gradients of the leaves (None: not part of it)."""
        x = self._with_depth() if depth else self._plain()
        return torch.autograd.grad(x, self.leaves, self.dx, allow_unused=True)

    def _inputs(self, layer: int, wanted: slice) -> list[Tensor]:
        tensors = self.layers[layer][wanted]
        return [tensor * 0.5 for tensor in tensors] if self.shared else tensors

    def _plain(self) -> Tensor:
        x = self.x
        for layer in range(self.shape.layers):
            x = torch.add(x, moda.attention(*self._inputs(layer, slice(3))), alpha=0.5)
        return x

    def _with_depth(self) -> Tensor:
        shape = self.shape
        stream = moda.DepthStream(
            shape.layers,
            shape.batch,
            shape.time,
            shape.kv_heads,
            shape.head_dim,
            slots_per_layer=SLOTS_PER_LAYER,
            dtype=self.dtype,
            device=self.device,
        )
        handle, x = stream.start(), self.x
        for layer in range(shape.layers):
            q, k, v = self._inputs(layer, slice(3))
            k, v, handle = stream.write(handle, layer, 0, k, v)
            out, handle = stream.attend(handle, layer, q, k, v)
            x = torch.add(x, out, alpha=0.5)
            if layer + 1 < shape.layers:
                _, _, handle = stream.write(handle, layer, 1, *self._inputs(layer, slice(3, 5)))
        return stream.finish(handle, x)


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Depth work of one step at the 700M shape: the difference of two stacks by events, and by kernel (profiler)."""
    stack = Stack(Shape(), shared=False)
    with_depth, plain = (timing.milliseconds(partial(stack.step, depth=depth), most=9) for depth in (True, False))
    say(f"stack with depth {with_depth:.1f} ms, without {plain:.1f} ms, difference {with_depth - plain:.1f} ms")
    kernels = difference(*(_profile(stack, depth) for depth in (True, False)))
    return {"shape": asdict(Shape()), "with_depth_ms": with_depth, "plain_ms": plain, "kernels": kernels}


def difference(with_depth: dict[str, list[float]], plain: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What each kernel takes with depth beyond what it takes without, most first: name, calls, ms, whether of depth.

    In: kernel name -> [calls, ms] of a step of each stack. Kernels of little difference are one line, "others".
    """
    depth_names = depth_kernel_names()
    rows: list[dict[str, Any]] = []
    for name in sorted({*with_depth, *plain}):
        (calls, ms), (plain_calls, plain_ms) = with_depth.get(name, [0, 0.0]), plain.get(name, [0, 0.0])
        rows.append({"name": name, "calls": calls - plain_calls, "ms": ms - plain_ms, "depth": name in depth_names})
    total = sum(abs(row["ms"]) for row in rows)
    listed = [row for row in rows if row["depth"] or abs(row["ms"]) >= LISTED_SHARE * total]
    others = [row for row in rows if row not in listed]
    listed.sort(key=lambda row: -row["ms"])
    if others:
        sums: dict[str, Any] = {key: sum(row[key] for row in others) for key in ("calls", "ms")}
        listed.append({"name": "others", **sums, "depth": False})
    return listed


def depth_kernel_names() -> set[str]:
    """Names of the Triton kernels over slots: those that `moda.kernels.depth` launches."""
    import inspect

    from triton.runtime import JITFunction

    from moda.kernels import depth

    modules = [depth, *(m for m in vars(depth).values() if inspect.ismodule(m) and m.__name__.startswith("moda."))]
    return {f.__name__ for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}


def _profile(stack: Stack, depth: bool) -> dict[str, list[float]]:
    """Kernel (or copy) name -> [calls, ms] of one step."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    stack.step(depth=depth)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        stack.step(depth=depth)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            entry = found.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += event.time_range.elapsed_us() / 1e3
    return found


def measure_memory(say: Callable[[str], None]) -> dict[str, Any]:
    """Peak memory of stacks with and without depth beyond their inputs, bytes, and a line through those with depth."""
    rows: list[dict[str, Any]] = []
    failed = []
    for batch in MEMORY_BATCHES:
        for layers in MEMORY_LAYERS:
            shape = Shape(layers=layers, batch=batch)
            try:
                peaks = [_peak(shape, depth) for depth in (True, False)]
            except torch.OutOfMemoryError as error:
                failed.append(f"{layers} layers of {batch} sequences: {baselines.one_line(error)}.")
                timing.free()
                continue
            sizes = {"slots": shape.slot_bytes, "retained": shape.retained_bytes}
            rows.append({"layers": layers, "batch": batch, "peak": peaks[0], "plain": peaks[1], **sizes})
        say(f"{batch} sequences: " + ", ".join(f"{r['peak'] / 1e9:.2f} GB" for r in rows if r["batch"] == batch))
    return {"time": Shape().time, "rows": rows, "fits": fits(rows), "failed": failed}


def fits(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """A straight line through the peak with depth over layers, by batch: slope and intercept in bytes, and r²."""
    found = []
    for batch in sorted({row["batch"] for row in rows}):
        points = [(row["layers"], row["peak"]) for row in rows if row["batch"] == batch]
        if len(points) < 3:
            continue
        layers, peak = np.array(points, np.float64).T
        slope, intercept = np.polyfit(layers, peak, 1)
        spread = ((peak - peak.mean()) ** 2).sum()
        r2 = 1 - ((peak - slope * layers - intercept) ** 2).sum() / spread if spread else 1.0
        found.append({"batch": batch, "slope": float(slope), "intercept": float(intercept), "r2": float(r2)})
    return found


def _peak(shape: Shape, depth: bool) -> int:
    """Most bytes allocated at one time during a step, beyond the inputs."""
    stack = Stack(shape, shared=True)
    stack.step(depth=depth)  # kernels are compiled and workspaces are there
    timing.free()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stack.step(depth=depth)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del stack
    timing.free()
    return peak
