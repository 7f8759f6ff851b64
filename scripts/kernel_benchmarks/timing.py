"""Time on the device: medians of CUDA events, the copy speed, random inputs, and what the measurements ran on."""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from training.versions import installed

PACKAGES = ("torch", "triton", "flash-linear-attention", "fla-core", "flash-attn-4", "flash-attn")
CYCLES_PER_MS = 2_000_000  # of the device, about; a slower clock sleeps longer
MOST_HIDDEN_MS = 50.0  # of host time before a call: more is that of a kernel that is being built
MAX_ROTATION = 8
COPY_BYTES = 2**31
CLEARING_SECONDS = 0.5  # after memory was given back


def milliseconds(*calls: Callable[[], object], budget_ms: float = 250, most: int = 25) -> float:
    """Median time of a call on the present CUDA device, in ms; several calls are taken in turn (`rotation`).

    Time of the device: the host queues a call while the device sleeps, as it would in a long queue or a CUDA graph.
    What the host takes is `host_milliseconds`. Warms up, then repeats for about `budget_ms`: at least 5 times, at most
    `most` times.
    """
    hidden = _warmed_up(calls)
    once = _elapsed(calls, 1, hidden)[0]
    repeats = min(most, max(5, math.ceil(budget_ms / max(once, 1e-3))))
    return statistics.median(_elapsed(calls, repeats, hidden))


def milliseconds_in_turns(*calls: Callable[[], object], budget_ms: float = 4000, most: int = 50) -> list[float]:
    """Median time of each of several calls, as `milliseconds` takes it, in turns: under the same clocks and power."""
    hidden = _warmed_up(calls)
    once = sum(_elapsed(calls, len(calls), hidden))
    repeats = min(most, max(5, math.ceil(budget_ms / max(once, 1e-3))))
    taken = _elapsed(calls, repeats * len(calls), hidden)
    return [statistics.median(taken[index :: len(calls)]) for index in range(len(calls))]


def _warmed_up(calls: tuple[Callable[[], object], ...]) -> float:
    """Milliseconds of the host's time to hide before each of the calls, all of which have run."""
    for index in range(max(2, len(calls))):
        calls[index % len(calls)]()
    return min(MOST_HIDDEN_MS, 1.5 * host_milliseconds(*calls) + 0.1)


def host_milliseconds(*calls: Callable[[], object], repeats: int = 5) -> float:
    """Median time that the host takes to queue a call on an idle device, in ms."""
    taken = []
    for index in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        calls[index % len(calls)]()
        taken.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(taken)


def _elapsed(calls: tuple[Callable[[], object], ...], repeats: int, hidden_ms: float) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for index, (begin, end) in enumerate(events):
        torch.cuda._sleep(int(hidden_ms * CYCLES_PER_MS))
        begin.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def rotation(nbytes: int, cache_bytes: int) -> int:
    """How many sets of inputs of `nbytes` to take in turn, so that none is still in a cache of `cache_bytes`."""
    return min(MAX_ROTATION, math.ceil(2 * cache_bytes / nbytes)) if nbytes < 2 * cache_bytes else 1


def cache_bytes() -> int:
    """Size of the device's L2 cache."""
    return torch.cuda.get_device_properties().L2_cache_size


def copy_speed() -> float:
    """Bytes a second that a plain device-to-device copy moves, reads and writes both counted."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / milliseconds(lambda: target.copy_(source)) * 1e3


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """An input of a measurement: normal, bf16, on the present CUDA device, where `generator` is."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)


def free() -> None:
    """Give memory that nothing refers to back to the device, and wait until that has cleared it.

    Clearing takes bandwidth: after 32 GB a copy runs at 3.8 TB/s for 4.25.
    """
    gc.collect()
    torch.cuda.empty_cache()
    time.sleep(CLEARING_SECONDS)


def environment() -> dict[str, Any]:
    """Device, versions and date (UTC) of a measurement."""
    return {
        "device": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.get_device_properties().total_memory,
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
