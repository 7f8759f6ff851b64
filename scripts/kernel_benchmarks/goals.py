"""Limits that the kernels are held to on an H200, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from scripts.kernel_benchmarks.baselines import FUSED


class Goal(NamedTuple):
    """A limit, and a measured figure in the same unit."""

    what: str
    limit: float
    measured: float
    unit: str
    at_most: bool = True  # else at least
    floor: float | None = None  # what the fastest sequence kernel and the bytes of the depth part leave

    @property
    def met(self) -> bool:
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def goals(parts: dict[str, Any]) -> list[Goal]:
    """The goals of all parts that were measured."""
    readers: dict[str, Callable[[dict[str, Any]], Iterator[Goal]]] = {
        "table2": _table2,
        "over-sequence": _over_sequence,
        "depth": _depth,
        "stream": _stream,
        "memory": _memory,
    }
    return [goal for name, read in readers.items() if name in parts for goal in read(parts[name])]


def _table2(part: dict[str, Any]) -> Iterator[Goal]:
    for row in part["rows"]:
        at = f"T={row['time']}, G={row['group']}, L={row['slots']}"
        if row["fa2_triton"] and "auto" in row["moda"]:
            baseline = min(row["fa2_triton"].values())
            ratio, floor = row["moda"]["auto"] / baseline, _floor(row, baseline)
            yield Goal(f"auto ÷ FA2-Triton, {at}", 0.80 if row["slots"] == 256 else 0.78, ratio, "×", floor=floor)
        if row["fa2_triton"] and FUSED in row["sequence"] and row["slots"] == 64:
            ratio = min(row["fa2_triton"].values()) / row["sequence"][FUSED]
            yield Goal(f"speed of fused ÷ FA2-Triton, T={row['time']}, G={row['group']}, L=0", 1.0, ratio, "×", False)
        if "fused" in row["moda"] and FUSED in row["sequence"] and at == "T=16384, G=8, L=64":
            extra = 100 * (row["moda"]["fused"] / row["sequence"][FUSED] - 1)
            yield Goal(f"extra of fused over itself without slots, {at}", 15.0, extra, "%")


def _over_sequence(part: dict[str, Any]) -> Iterator[Goal]:
    limits = {(16384, 8, 64): 12.0, (65536, 8, 64): 3.1}
    for row in part["rows"]:
        if not row["sequence"] or "auto" not in row["moda"]:
            continue
        at, fastest = (row["time"], row["group"], row["slots"]), min(row["sequence"].values())
        name = "auto over the fastest sequence attention, T={}, G={}, L={}".format(*at)
        if at in limits:
            more, floor = 100 * (row["moda"]["auto"] / fastest - 1), 100 * row["depth_floor_ms"] / fastest
            yield Goal(name, limits[at], more, "%", floor=floor)
        elif at == (4096, 2, 72):
            yield Goal(name, 0.50, row["moda"]["auto"] - fastest, "ms", floor=row["depth_floor_ms"])


def _floor(row: dict[str, Any], baseline: float) -> float | None:
    if not row["sequence"]:
        return None
    return (min(row["sequence"].values()) + row["depth_floor_ms"]) / baseline


def _depth(part: dict[str, Any]) -> Iterator[Goal]:
    for row in part["rows"]:
        for kernel, found in row["kernels"].items():
            limit = 4.0 if kernel == "forward" else 3.8
            yield Goal(
                f"{kernel}, {row['tokens']} tokens, G={row['group']}", limit, found["speed"] / 1e12, "TB/s", False
            )


def _stream(part: dict[str, Any]) -> Iterator[Goal]:
    yield Goal("depth work of a 700M step", 66.0, part["with_depth_ms"] - part["plain_ms"], "ms")


def _memory(part: dict[str, Any]) -> Iterator[Goal]:
    for row in part["rows"]:
        if row["layers"] == 36:
            ratio = row["peak"] / (row["slots"] + row["retained"])
            yield Goal(f"peak ÷ (slots + q, do), 36 layers, {row['batch']} sequences", 1.15, ratio, "×")
