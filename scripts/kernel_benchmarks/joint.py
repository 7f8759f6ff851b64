"""Forward and backward of `moda.attention`, all five gradients, beside attention over the sequence alone.

`table2` goes through the rows of the paper's Table 2, `over_sequence` asks what depth costs on top of the fastest exact
sequence attention of the machine. B = 1, bf16, 8 kv heads of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moda
from moda.backends import BACKENDS
from scripts.kernel_benchmarks import baselines, depth, paper, timing

ROWS = tuple((row.time, row.group, row.slots) for row in paper.TABLE_2)
OVER_SEQUENCE = ((16384, 8, 64), (65536, 8, 64), (4096, 2, 72))
TIMED_BACKENDS = ("auto", "joined", "fused")


def nbytes(time: int, group: int, slots: int) -> int:
    """Bytes of the inputs, outputs and gradients of a case, bf16: what must not lie in a cache from the call before."""
    queries, tokens = time * group * paper.KV_HEADS * paper.HEAD_DIM, time * paper.KV_HEADS * paper.HEAD_DIM
    return 2 * (4 * queries + 4 * tokens * (1 + slots))


@dataclass
class JointBenchmark:
    """Measures cases (T, G, L), each once however many parts ask for it."""

    tutorial: Path | None = None

    def __post_init__(self) -> None:
        self._measured: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._sequence_times: dict[tuple[str, int, int], float] = {}  # which do not depend on the slots
        self._copy_speed: float | None = None
        self._kernels: tuple[list[baselines.SequenceKernel], list[str]] | None = None

    def table2(self, say: Callable[[str], None]) -> dict[str, Any]:
        """All rows of Table 2."""
        return self._part(ROWS, say)

    def over_sequence(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The cases whose extra over the fastest sequence kernel has a limit: the two of them anew, in turns.

        Taken one after the other, at the power limit, their times differ from run to run by more than depth takes.
        """
        part = self._part(OVER_SEQUENCE, say)
        return part | {"rows": [self._in_turns(row) for row in part["rows"]]}

    def _in_turns(self, row: dict[str, Any]) -> dict[str, Any]:
        if not row["sequence"] or "auto" not in row["moda"]:
            return row
        name = min(row["sequence"], key=row["sequence"].get)
        kernel = next(kernel for kernel in self.kernels()[0] if kernel.name == name)
        case = row["time"], row["group"], row["slots"]
        alone = kernel.prepare(*self._inputs(row["time"], row["group"], 0))
        auto, sequence = timing.milliseconds_in_turns(self._moda("auto", *case), alone)
        return row | {"moda": {"auto": auto}, "sequence": {name: sequence}}

    def _part(self, cases: tuple[tuple[int, int, int], ...], say: Callable[[str], None]) -> dict[str, Any]:
        kernels, left_out = self.kernels()
        for sentence in left_out:
            say(sentence)
        rows = [self.measure(*case, say) for case in cases]
        remarks = [f"{kernel.name}: {kernel.remark}." for kernel in kernels if kernel.remark]
        return {"rows": rows, "left_out": left_out, "remarks": remarks}

    def kernels(self) -> tuple[list[baselines.SequenceKernel], list[str]]:
        """`baselines.find`, once."""
        if self._kernels is None:
            self._kernels = baselines.find(self.tutorial)
        return self._kernels

    def measure(self, time: int, group: int, slots: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Times in ms: `moda` by backend, `fa2_triton` and `sequence` by kernel; `failed` says what gave none.

        `host`: of the host, to queue a call of auto. `depth_floor_ms`: what the bytes of the depth part take at the
        speed of a copy, so that the fastest sequence kernel and this are what an implementation can come down to.
        """
        if (case := (time, group, slots)) in self._measured:
            return self._measured[case]
        row: dict[str, Any] = {"time": time, "group": group, "slots": slots}
        row |= {"moda": {}, "fa2_triton": {}, "sequence": {}, "host": {}, "failed": {}}
        problem = depth.Problem(time, group, slots)
        moved = sum(depth.bytes_moved(name, problem) for name in ("forward", "gradients"))
        row["depth_floor_ms"] = 1e3 * moved / self.copy_speed()
        for backend in TIMED_BACKENDS:
            if backend == "auto" or backend in BACKENDS:
                self._time(row, "moda", backend, partial(self._time_moda, backend, time, group, slots))
        for kernel in self.kernels()[0]:
            column = "fa2_triton" if kernel.is_fa2_triton else "sequence"
            self._time(row, column, kernel.name, partial(self._sequence, kernel, time, group))
        self._time(row, "host", "auto", lambda: timing.host_milliseconds(self._moda("auto", time, group, slots)))
        self._measured[case] = row
        fastest = {name: f"{min(row[name].values()):.3f}" for name in ("moda", "fa2_triton", "sequence") if row[name]}
        say(f"T={time} G={group} L={slots}, fastest in ms: {fastest}")
        return row

    def _time(self, row: dict[str, Any], column: str, name: str, measure: Callable[[], float]) -> None:
        try:
            row[column][name] = measure()
        except Exception as error:  # out of memory, or a shape that one kernel does not take: the others go on
            row["failed"][name] = baselines.one_line(error)
        timing.free()

    @staticmethod
    def _inputs(time: int, group: int, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        heads = (group * paper.KV_HEADS, paper.KV_HEADS, paper.KV_HEADS, group * paper.KV_HEADS)
        return [timing.random(generator, 1, time, number, paper.HEAD_DIM) for number in heads]

    def copy_speed(self) -> float:
        """`timing.copy_speed`, once."""
        if self._copy_speed is None:
            self._copy_speed = timing.copy_speed()
            timing.free()
        return self._copy_speed

    def _time_moda(self, backend: str, time: int, group: int, slots: int) -> float:
        return timing.milliseconds(self._moda(backend, time, group, slots))

    def _moda(self, backend: str, time: int, group: int, slots: int) -> baselines.Run:
        q, k, v, do = self._inputs(time, group, 0)
        generator = torch.Generator("cuda").manual_seed(1)
        pair = [timing.random(generator, slots, *k.shape) for _ in range(2)]
        return baselines.through_autograd(lambda *x: moda.attention(*x, backend=backend), (q, k, v, *pair), do)

    def _sequence(self, kernel: baselines.SequenceKernel, time: int, group: int) -> float:
        if (case := (kernel.name, time, group)) not in self._sequence_times:
            sets = timing.rotation(nbytes(time, group, 0), timing.cache_bytes())
            runs = [kernel.prepare(*self._inputs(time, group, seed)) for seed in range(sets)]
            self._sequence_times[case] = timing.milliseconds(*runs)
        return self._sequence_times[case]
