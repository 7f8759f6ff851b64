"""Where the time of a profiled step goes: device kernels of a chrome trace by kind and by name.

In: a trace that `training.profiling` or torch.profiler wrote. Out: times in milliseconds, Markdown, a picture.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.shards import write_atomically
from training.curves import COLORS, STYLE

DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of events that occupy the device

# Kinds of kernels by name; the first that fits counts.
KINDS = [
    ("communication", r"nccl"),
    ("sequence attention", r"sdpa|fmha|flash|cudnn.*attention"),
    ("depth forward", r"^forward_(vector|tensor)"),
    ("depth backward, queries", r"^backward_(vector|tensor)"),
    ("depth backward, slots", r"^slots_(vector|tensor)"),
    ("softmax of the loss", r"^_rows"),
    ("QK-norm and RoPE", r"^norm_rotary"),
    ("SwiGLU", r"^swiglu"),
    ("products with SwiGLU", r"quack.*Gated"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitKreduce"),
    ("optimizer and clipping", r"adam|multi_tensor_apply|lpnorm|foreach"),
    ("compiled element-wise", r"^triton_"),
    ("copies of weights and gradients", r"split_with_sizes|chunk_cat|CatArray"),
    ("embedding", r"embedding|indexing_backward|index_select|radix|Radix|krn_partial"),
    ("copies and fills", r"Memcpy|Memset|copy|fill|Fill"),
]
OTHER = "other"
SHOWN = 25  # kernels of the table


@dataclass
class Profile:
    """Device time of a trace, ms."""

    span: float  # from the first kernel's begin to the last one's end
    busy: float  # of it, with some kernel running
    kernels: dict[str, tuple[int, float]]  # name: calls, time

    def kinds(self) -> dict[str, float]:
        """Time of each kind, longest first."""
        total: dict[str, float] = defaultdict(float)
        for name, (_, time) in self.kernels.items():
            total[kind(name)] += time
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def kind(name: str) -> str:
    """The kind of a kernel."""
    return next((word for word, pattern in KINDS if re.search(pattern, name)), OTHER)


def read(path: Path) -> Profile:
    """Raises ValueError, in one sentence, for what is no trace of a device."""
    try:
        content = path.read_bytes()
        events = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["traceEvents"]
        device = [event for event in events if event.get("ph") == "X" and event.get("cat") in DEVICE]
        times = [(event["name"], event["ts"] / 1e3, event["dur"] / 1e3) for event in device]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a trace ({error!r}): give a step-N-rank-R.json.gz.") from None
    kernels: dict[str, tuple[int, float]] = {}
    spans = []
    for name, begin, duration in times:
        calls, time = kernels.get(name, (0, 0.0))
        kernels[name] = (calls + 1, time + duration)
        spans.append((begin, begin + duration))
    if not spans:
        raise ValueError(f"{path} holds no kernels of a GPU: profile a run on one.")
    return Profile(max(end for _, end in spans) - min(begin for begin, _ in spans), _covered(spans), kernels)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def table(profiles: dict[str, Profile]) -> str:
    """Kinds side by side, and the longest kernels of each profile."""
    kinds = {word: None for profile in profiles.values() for word in profile.kinds()}
    lines = [f"| ms | {' | '.join(profiles)} |", "|---" * (len(profiles) + 1) + "|"]
    times = {name: profile.kinds() for name, profile in profiles.items()}
    lines += [f"| {word} | {' | '.join(f'{times[name].get(word, 0):.1f}' for name in profiles)} |" for word in kinds]
    lines.append(f"| device busy | {' | '.join(f'{profile.busy:.1f}' for profile in profiles.values())} |")
    lines.append(f"| first to last kernel | {' | '.join(f'{profile.span:.1f}' for profile in profiles.values())} |")
    for name, profile in profiles.items():
        lines += ["", f"**{name}**, longest kernels", "", "| ms | calls | kind | kernel |", "|---|---|---|---|"]
        longest = sorted(profile.kernels.items(), key=lambda item: -item[1][1])[:SHOWN]
        lines += [f"| {time:.2f} | {calls} | {kind(kernel)} | `{kernel[:90]}` |" for kernel, (calls, time) in longest]
    return "\n".join(lines)


def draw(profiles: dict[str, Profile], path: Path) -> None:
    """One bar a profile, split by kind, idle time at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds: dict[str, Any] = {word: None for profile in profiles.values() for word in profile.kinds()}
    narrow = 0.02 * max(profile.span for profile in profiles.values())  # no room for a number
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.9 * len(profiles)), layout="constrained")
        left = dict.fromkeys(profiles, 0.0)
        for index, word in enumerate([*kinds, "idle"]):
            widths = [
                profile.span - profile.busy if word == "idle" else profile.kinds().get(word, 0.0)
                for profile in profiles.values()
            ]
            color = "#e8e8e8" if word == "idle" else COLORS[index % len(COLORS)]
            hatch = "//" if word != "idle" and index >= len(COLORS) else None
            bars = axes.barh(list(profiles), widths, left=list(left.values()), color=color, hatch=hatch, label=word)
            labels = [f"{width:.0f}" if width > narrow else "" for width in widths]
            ink = "#222222" if word == "idle" else "white"
            axes.bar_label(bars, labels, label_type="center", fontsize=8, color=ink)
            left = {name: left[name] + width for name, width in zip(profiles, widths, strict=True)}
        axes.invert_yaxis()
        axes.set_xlabel("ms of device time in one step")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, format="png")
        pyplot.close(figure)
    write_atomically(path, buffer.getvalue())
