"""Measures the kernels of the menu over a grid of shapes and writes the table that `moda.sequence` chooses by.

In: a CUDA device, with the optional packages installed that are to be in the table. Out: `sequence_table.json`.

bf16 and fp16, 16 or more query heads, about 32768 tokens a call. Each (dtype, head_dim, group) is a process of its own:
packages that build kernels at the first call (flash-attn-4, some seconds each) do so side by side, and one at a time
measures. Times are of the GPU alone: a pause on the device lets the host queue all calls before the first one starts.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.synchronize import Lock
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from moda.sequence import TABLE, Line
from moda.sequence_kernels import MENU, Call, SequenceKernel

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128)
GROUPS = (1, 2, 4, 8, 16, 32)
TIMES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = 32768  # a call
QUERY_HEADS = 16  # at least: a group has them all
DOCUMENT = 700  # tokens, on average, where there are documents
PAUSE = 6_000_000  # clock cycles of the device, some 3 ms: the time to queue the calls
BUDGET = 0.03  # seconds of one kernel's repetitions
COMMAND = "python scripts/benchmark_kernels.py --tune"

_measuring: Lock | None = None  # held by the process that measures


def tune(
    device: torch.device | str = "cuda",
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    groups: tuple[int, ...] = GROUPS,
    times: tuple[int, ...] = TIMES,
    workers: int | None = None,
    report: Callable[[str], None] = print,
) -> dict:
    """Times of every kernel that can take a shape, forward and backward, as the content of a table.

    A kernel that fails is reported and left out from there on. Raises RuntimeError without a CUDA device.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"Kernels are measured on a CUDA device, and {device} is none: run this on the GPU to tune.")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    began = time.monotonic()
    jobs = list(itertools.product(dtypes, head_dims, groups))
    workers = min(len(jobs), workers or max(1, min(8, (os.cpu_count() or 1) // 2)))
    context = multiprocessing.get_context("spawn")
    lines: list[Line] = []
    # A process for each job: what a failing kernel leaves behind on the device ends with it.
    with ProcessPoolExecutor(workers, context, _start, (context.Lock(),), max_tasks_per_child=1) as pool:
        running = {pool.submit(_measure_shapes, str(device), *job, times): job for job in jobs}
        for done in as_completed(running):
            name = "{}, head_dim {}, group {}".format(*running[done])
            try:
                measured, failures = done.result()
            except Exception as error:  # whatever a vendor's kernel does, the other shapes are to be measured
                measured, failures = [], [f"{type(error).__name__}: {error}"]
            lines += measured
            for failure in failures:
                report(f"{name}: {failure}")
            report(f"{name}: {len(measured)} lines, {time.monotonic() - began:.0f} s")
    return {"about": _about(device), "lines": [line._asdict() for line in lines]}


def write_table(table: dict, path: Path = TABLE) -> None:
    """Write a table, one line of it a line; lines of other architectures that stand there are kept."""
    fresh = {line["architecture"] for line in table["lines"]}
    standing = json.loads(path.read_text()) if path.exists() else {"about": {}, "lines": []}
    about = standing["about"] | table["about"]
    lines = [line for line in standing["lines"] if line["architecture"] not in fresh] + table["lines"]
    lines.sort(key=lambda line: [line[axis] for axis in Line._fields[:6]])
    rows = ",\n".join(json.dumps(line) for line in lines)
    path.write_text(f'{{"about": {json.dumps(about, indent=1)},\n"lines": [\n{rows}\n]}}\n')


def summary(table: dict) -> str:
    """The fastest kernels of a table as Markdown: a row for each shape, forward / backward by time."""
    times = sorted({line["time"] for line in table["lines"]})
    rows: dict[tuple, dict[int, str]] = {}
    for line in table["lines"]:
        best = [min(line[kind], key=line[kind].get, default="none") for kind in ("forward", "backward")]
        shape = (line["dtype"], line["head_dim"], line["group"], line["documents"])
        rows.setdefault(shape, {})[line["time"]] = " / ".join(best)
    header = ["dtype", "head_dim", "group", "documents", *map(str, times)]
    body = [[*map(str, shape), *(row.get(t, "") for t in times)] for shape, row in rows.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *body])


def _about(device: torch.device) -> dict:
    """Where the lines of an architecture come from."""
    versions = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    for package in ("flash-attn-4", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        f"sm{major}{minor}": {
            "device": torch.cuda.get_device_name(device),
            "versions": versions,
            "date": datetime.date.today().isoformat(),
            "command": COMMAND,
            "times": f"milliseconds, medians, about {TOKENS} tokens, {QUERY_HEADS} or {max(GROUPS)} query heads",
        }
    }


def _start(lock: Lock) -> None:
    global _measuring
    _measuring = lock


def _measure_shapes(
    device: str, dtype: torch.dtype, head_dim: int, group: int, times: tuple[int, ...]
) -> tuple[list[Line], list[str]]:
    """The lines of one dtype, head_dim and group, and what failed."""
    assert _measuring is not None
    lines: list[Line] = []
    failures: list[str] = []
    torch.cuda.set_device(device)
    for documents in (False, True):
        small = Problem(device, dtype, head_dim, group, min(times), documents, tokens=2 * min(times))
        kernels = {name: kernel for name, kernel in MENU.items() if kernel.unusable(small.call()) is None}
        small.measure(kernels, failures, _untimed)  # builds what is built at the first call, beside who measures
        for length in times:
            with _measuring:
                lines.append(Problem(device, dtype, head_dim, group, length, documents).measure(kernels, failures))
                torch.cuda.empty_cache()
    return lines, failures


def _untimed(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    return 0.0


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU, after one call to warm up, over 3 to 9 calls."""
    run()
    first = _timed(run, 1)[0]
    return median(_timed(run, int(min(9, max(3, 1000 * BUDGET / first)))))


def _timed(run: Callable[[], object], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda._sleep(PAUSE)
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


class Problem:
    """Inputs of one shape, of a fixed seed, for the forward and the backward of any kernel."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        head_dim: int,
        group: int,
        time: int,
        documents: bool,
        tokens: int = TOKENS,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        batch, kv_heads = max(1, tokens // time), max(1, QUERY_HEADS // group)
        queries, keys = (batch, time, kv_heads * group, head_dim), (batch, time, kv_heads, head_dim)
        self.q, self.do, self.k, self.v = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype)
            for shape in (queries, queries, keys, keys)
        )
        self.cu_seqlens: Tensor | None = None
        if documents:
            total = batch * time
            count = max(1, total // DOCUMENT)
            ends = torch.randint(0, total, (count,), generator=generator, device=device).sort().values
            self.cu_seqlens = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), total)))

    def call(self) -> Call:
        return Call.of(self.q, self.k, self.cu_seqlens)

    def runs(self, kernel: SequenceKernel) -> dict[str, Callable[[], object]]:
        """The kernel's forward, and its backward from what its forward gives."""
        scale = self.q.shape[3] ** -0.5
        o, lse = kernel.forward(self.q, self.k, self.v, scale, self.cu_seqlens)
        return {
            "forward": lambda: kernel.forward(self.q, self.k, self.v, scale, self.cu_seqlens),
            "backward": lambda: kernel.backward(self.do, self.q, self.k, self.v, o, lse, scale, self.cu_seqlens),
        }

    def measure(
        self,
        kernels: dict[str, SequenceKernel],
        failures: list[str],
        clock: Callable[[Callable[[], object]], float] = milliseconds,
    ) -> Line:
        """Times of those kernels that can take this problem, fastest first. What fails is told, and removed."""
        call = self.call()
        times: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        for name, kernel in list(kernels.items()):
            if kernel.unusable(call) is None:
                try:
                    measured = {kind: round(clock(run), 4) for kind, run in self.runs(kernel).items()}
                except Exception as error:  # a vendor's kernel may fail in any way; the others are to be measured
                    failures.append(f"{name} is left out from {call} on, {type(error).__name__}: {error}")
                    del kernels[name]
                    continue
                for kind, ms in measured.items():
                    times[kind][name] = ms
        fastest_first = [dict(sorted(of_kind.items(), key=lambda item: item[1])) for of_kind in times.values()]
        dtype = str(call.dtype).removeprefix("torch.")
        return Line(call.architecture, dtype, call.documents, call.head_dim, call.group, call.time, *fastest_first)
