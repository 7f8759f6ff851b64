"""What the device waits for in a run: gaps between its kernels, each counted for what the host was at meanwhile.

In: a chrome trace of the device's work, and when (Unix time) the host was at what. Out: seconds by cause, Markdown.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from scripts.training_benchmark.trace import DEVICE

Span = tuple[float, float]  # begin and end, Unix time in seconds

LEAST = 10e-6  # seconds of a gap that counts: kernels in a row begin 1 to 2 µs after each other
LONG_COPY = 1e-3  # seconds: a copy to the host that takes longer is that of a checkpoint
# A gap counts whole for the first of these that it meets. All but data leave a device that has nothing to do: they last
# until the host has queued the next step.
CAUSES = ("evaluation", "checkpoint", "metrics", "data")
STEPS = "within steps"


@dataclass
class Waits:
    """Gaps of a device, in seconds."""

    seconds: dict[str, float]  # by cause
    inside_evaluations: float  # of `seconds`, not the way into them and out
    window: float  # from the begin of the first step that counts to the end of the last


def device_spans(trace: Path) -> tuple[list[Span], list[Span]]:
    """What computes, in order of its begin, and the long copies to the host, which run beside it."""
    content = json.loads(trace.read_bytes())
    base = content["baseTimeNanoseconds"] / 1e9
    computing: list[Span] = []
    copies: list[Span] = []
    for event in content["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in DEVICE:
            span = (base + event["ts"] / 1e6, base + (event["ts"] + event["dur"]) / 1e6)
            to_host = event["name"].startswith("Memcpy DtoH") and span[1] - span[0] > LONG_COPY
            (copies if to_host else computing).append(span)
    return sorted(computing), copies


def gaps(computing: list[Span], window: Span) -> list[Span]:
    """Where nothing computes inside the window; `computing` is in order of its begin."""
    found, reached = [], window[0]
    for begin, end in [*computing, (window[1], window[1])]:
        if min(begin, window[1]) - reached > LEAST:
            found.append((reached, min(begin, window[1])))
        reached = max(reached, end)
    return found


def account(
    computing: list[Span], copies: list[Span], host: dict[str, list[Span]], queued: list[float], window: Span
) -> Waits:
    """Each gap for its cause.

    Args:
        computing: in order of its begin.
        copies: of checkpoints, to the host.
        host: by cause, when the host was at it.
        queued: when the host had queued each step.
        window: which gaps count.
    """
    meets = {cause: [(begin, _next(queued, end)) for begin, end in host.get(cause, [])] for cause in CAUSES}
    meets["data"] = host.get("data", [])
    meets["checkpoint"] += copies
    seconds: dict[str, float] = defaultdict(float)
    inside = 0.0
    for gap in gaps(computing, window):
        cause = next((c for c in CAUSES if any(_meet(gap, span) for span in meets[c])), STEPS)
        seconds[cause] += gap[1] - gap[0]
        if any(begin < gap[0] and gap[1] < end for begin, end in host.get("evaluation", [])):
            inside += gap[1] - gap[0]
    return Waits(dict(seconds), inside, window[1] - window[0])


def table(waits: Waits, times: dict[str, int], every: dict[str, int], step_seconds: float) -> str:
    """Markdown: for each cause how often it came in the window, and its share of a step when it comes `every` steps."""
    lines = ["| the device waits for | times | ms each | every | share of a step |", "|---|---|---|---|---|"]
    shares = 0.0
    for cause in (*CAUSES, STEPS):
        seconds = waits.seconds.get(cause, 0.0) - (waits.inside_evaluations if cause == "evaluation" else 0.0)
        each = seconds / times[cause] if times[cause] else 0.0
        share = each / every[cause] / step_seconds
        shares += share if cause != STEPS else 0.0
        interval = "step" if every[cause] == 1 else f"{every[cause]:,} steps"
        lines.append(f"| {cause} | {times[cause]} | {each * 1e3:.2f} | {interval} | {share:.3%} |")
    lines.append(f"| **all but those within steps** | | | | **{shares:.3%}** |")
    return "\n".join(lines)


def _next(times: list[float], after: float) -> float:
    return min((time for time in times if time > after), default=after)


def _meet(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]
