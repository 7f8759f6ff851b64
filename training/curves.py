"""The curves of one run as a picture: losses, learning rate and gradient norm, throughput.

In: a run directory with `metrics.jsonl`. Out: `curves.png` in it. `Series`, `smooth` and the style are shared with
`training.report`, which draws many runs. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from data.shards import write_atomically
from training.metrics import Record, format_count, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLORS = ("#3366cc", "#dc6b2f", "#2a9d6f", "#b5478c", "#c9a227", "#5b8fb9", "#8c564b", "#d1495b", "#6a4c93", "#4d4d4d")
INK, FAINT = "#222222", "#d9d9d9"
STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ebebeb",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Series:
    """The finite values of one key: `steps`, `tokens`, `values`, all [records]."""

    steps: np.ndarray  # int64
    tokens: np.ndarray  # int64
    values: np.ndarray  # float64

    @classmethod
    def of(cls, records: Sequence[Record], key: str) -> Series:
        """The records that hold a finite value of `key`, in order (possibly none)."""
        rows = [(r["step"], r["tokens"], r[key]) for r in records if key in r and np.isfinite(r[key])]
        steps, tokens, values = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(np.array(steps, np.int64), np.array(tokens, np.int64), np.array(values, np.float64))

    def __len__(self) -> int:
        return len(self.values)


def validation_domains(records: Sequence[Record]) -> list[str]:
    """Domains with a validation loss in any record, sorted; `mean` is not one."""
    keys = {key for record in records for key in record}
    losses = (key.split("/")[1] for key in keys if key.startswith("validation/") and key.endswith("/loss"))
    return sorted(domain for domain in losses if domain != "mean")


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average [n] -> [n] over a thirtieth of the values; at the end, over the half that lies before."""
    half = len(values) // 60
    index = np.arange(len(values))
    before = np.minimum(half, index)
    after = np.minimum(before, len(values) - 1 - index)  # symmetric at the start, where the loss falls steeply
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + after + 1] - total[index - before]) / (before + after + 1)


def run_title(run_dir: Path) -> str:
    """`run.name` of the run's `config.yaml`, or the folder's name where there is none."""
    try:
        name = OmegaConf.select(OmegaConf.load(run_dir / "config.yaml"), "run.name")
    except Exception:  # a picture needs no configuration, whatever is wrong with it
        name = None
    return str(name or run_dir.resolve().name)


def draw_curves(run_dir: str | Path, warn: Callable[[str], None] = warnings.warn) -> Path:
    """Draw `curves.png` of a run and return its path; the old picture stands until the new one is whole.

    `warn` gets one sentence for each damaged line, which is skipped.
    Raises OSError when there is no `metrics.jsonl`, ValueError when it holds no record yet.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / "metrics.jsonl", warn)
    if not records:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} holds no record yet: there is nothing to draw.")

    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = new_figure(13, 8)
        loss, domains, learning, speed = figure.subplots(2, 2).flat
        _draw_loss(loss, records)
        _draw_domains(domains, records)
        _draw_learning(learning, records)
        _draw_throughput(speed, records)
        last = records[-1]
        extent = f"{last['step']:,} steps, {format_count(last['tokens'])} tokens"
        figure.suptitle(run_title(run_dir), x=0.015, ha="left", fontsize=15, fontweight="bold")
        figure.text(0.985, 0.972, extent, ha="right", va="top", color="#666666")
        return save(figure, run_dir / "curves.png")


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` × `height` inches that needs no display and no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG in one atomic replacement."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(path, content.getvalue())
    return path


def count_ticks(axis: Axis) -> None:
    """Whole numbers at the ticks, with a unit: 500, 10 k, 2.5 M."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def show(value: float, _position: int) -> str:
        number, _, unit = format_count(value).partition(" ")
        return f"{float(number):g} {unit}".rstrip()

    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(show))


FEW_POINTS = 8


def limit_losses(axes: Axes, lines: Sequence[Series], share: float = 0.04) -> None:
    """Let a loss axis begin below the first fall, where that takes a few steps and would flatten all that follows.

    The top is then the highest value after the first `share` of each line's tokens, so a later spike is still seen. A
    line of few points is a short run, whose first fall is what there is to see.
    """
    lines = [line for line in lines if len(line)]
    if not lines or min(map(len, lines)) < FEW_POINTS:
        return
    shown = [line.values[line.tokens >= share * line.tokens[-1]] for line in lines]
    low, high = min(v.min() for v in shown), max(v.max() for v in shown)
    whole = max(line.values.max() for line in lines)
    if whole - low < 1.5 * (high - low):
        high = whole
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _draw_loss(axes: Axes, records: Sequence[Record]) -> None:
    train, validation = Series.of(records, "train/loss"), Series.of(records, "validation/mean/loss")
    axes.set_title("Loss")
    axes.set_xlabel("step")
    if len(train):
        line = smooth(train.values)
        if len(train) >= 100:
            axes.plot(train.steps, train.values, color=COLORS[0], alpha=0.3, linewidth=0.8)
        marker = "o" if len(train) == 1 else None
        axes.plot(train.steps, line, color=COLORS[0], linewidth=1.8, marker=marker, label=f"training {line[-1]:.3f}")
    if len(validation):
        label = f"validation, mean of domains {validation.values[-1]:.3f}"
        style: dict[str, Any] = {"marker": "o", "markersize": 5, "markeredgecolor": "white", "linewidth": 1.2}
        axes.plot(validation.steps, validation.values, color=COLORS[1], label=label, **style)
    limit_losses(axes, [train, validation])
    _finish(axes, records)
    _add_token_axis(axes, records)


def _draw_domains(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("Validation loss by domain")
    axes.set_xlabel("step")
    lines = {domain: Series.of(records, f"validation/{domain}/loss") for domain in validation_domains(records)}
    lines = {domain: line for domain, line in lines.items() if len(line)}
    for i, (domain, line) in enumerate(sorted(lines.items(), key=lambda item: item[1].values[-1])):
        style: dict[str, Any] = {
            "marker": "o",
            "markersize": 3.5,
            "linewidth": 1.4,
            "linestyle": ("-", "--", ":")[i // len(COLORS) % 3],
        }
        axes.plot(
            line.steps, line.values, color=COLORS[i % len(COLORS)], label=f"{domain} {line.values[-1]:.3f}", **style
        )
    limit_losses(axes, list(lines.values()))
    _finish(axes, records, columns=1 + (len(lines) > 6))
    _add_token_axis(axes, records)


def _draw_learning(axes: Axes, records: Sequence[Record]) -> None:
    rate, norm = Series.of(records, "train/lr"), Series.of(records, "train/grad_norm")
    axes.set_title("Learning rate and gradient norm")
    axes.set_xlabel("step")
    if len(norm):
        axes.plot(
            norm.steps, norm.values, color=COLORS[2], linewidth=1.0, alpha=0.55, marker="o" if len(norm) == 1 else None
        )
        axes.set_ylim(0, 1.1 * max(np.quantile(norm.values, 0.99), 1e-9))  # one spike must not hide the rest
        axes.set_ylabel("gradient norm", color=COLORS[2])
    if len(rate):
        right = axes.twinx()
        right.plot(rate.steps, rate.values, color=COLORS[3], linewidth=1.8, marker="o" if len(rate) == 1 else None)
        right.set_ylim(0, 1.1 * max(rate.values.max(), 1e-12))
        right.set_ylabel("learning rate", color=COLORS[3])
        right.spines["right"].set_visible(True)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        right.grid(False)
    _finish(axes, records, empty=not len(norm) and not len(rate))


def _draw_throughput(axes: Axes, records: Sequence[Record]) -> None:
    speed, mfu = Series.of(records, "throughput/tokens_per_second"), Series.of(records, "throughput/mfu")
    axes.set_title("Throughput")
    axes.set_xlabel("step")
    if len(speed):
        label = f"median {format_count(float(np.median(speed.values)))} tokens/s"
        if len(mfu):
            label += f", MFU {100 * float(np.median(mfu.values)):.1f} %"
        axes.plot(
            speed.steps,
            speed.values,
            color=COLORS[5],
            linewidth=1.4,
            marker="o" if len(speed) == 1 else None,
            label=label,
        )
        axes.set_ylim(0, 1.15 * max(speed.values.max(), 1e-9))
        axes.set_ylabel("tokens/s")
        count_ticks(axes.yaxis)
    _finish(axes, records, location="lower right")


def _finish(
    axes: Axes, records: Sequence[Record], *, columns: int = 1, location: Any = "upper right", empty: bool | None = None
) -> None:
    """Legend, the same step range on every panel, and a word where a panel has nothing to show."""
    first, last = records[0]["step"], records[-1]["step"]
    pad = 0.02 * (last - first) or 1.0
    axes.set_xlim(first - pad, last + pad)
    count_ticks(axes.xaxis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=location, ncols=columns)
    elif not axes.lines if empty is None else empty:
        axes.text(0.5, 0.5, "none recorded", transform=axes.transAxes, ha="center", va="center", color="#999999")
        axes.set_yticks([])
        axes.grid(False)


def _add_token_axis(axes: Axes, records: Sequence[Record]) -> None:
    steps = np.array([r["step"] for r in records], np.float64)
    tokens = np.array([r["tokens"] for r in records], np.float64)
    if tokens[-1] <= 0 or steps[-1] <= 0:
        return
    per_step = tokens[-1] / steps[-1]  # the batch is one size through a run
    top = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    count_ticks(top.xaxis)
    top.spines["top"].set_visible(False)
    top.tick_params(length=0, labelsize=9)
    axes.set_title("tokens", loc="right", fontsize=9, fontweight="normal", color="#666666")
