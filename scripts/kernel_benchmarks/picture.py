"""The measurements at a glance: depth's extra over FA2-Triton beside the paper's, and memory over layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.kernel_benchmarks import paper
from scripts.kernel_benchmarks.tables import PAPER_RATIOS
from training.curves import COLORS, INK, STYLE, new_figure, save

WIDTH, HEIGHT = 11.0, 4.6  # inches


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """Write a PNG of the parts "table2" and "memory", those that are there; None when neither is."""
    from matplotlib import rc_context

    parts = {name: results["parts"][name] for name in ("table2", "memory") if name in results["parts"]}
    if not parts:
        return None
    with rc_context(STYLE):
        figure = new_figure(WIDTH if len(parts) == 2 else WIDTH / 2 + 1, HEIGHT)
        drawers = {"table2": _draw_ratios, "memory": _draw_memory}
        panels = figure.subplots(1, len(parts), squeeze=False, width_ratios=[1.3, 1][: len(parts)])[0]
        for axes, (name, part) in zip(panels, parts.items(), strict=True):
            drawers[name](axes, part, results["environment"]["device"])
        return save(figure, path)


def _draw_ratios(axes: Any, part: dict[str, Any], device: str) -> None:
    rows = [row for row in part["rows"] if row["fa2_triton"] and "auto" in row["moda"]]
    labels = [f"{row['time'] // 1024}K · {row['group']} · {row['slots']}" for row in rows]
    ours = [100 * (row["moda"]["auto"] / min(row["fa2_triton"].values()) - 1) for row in rows]
    published = [100 * (PAPER_RATIOS[row["time"], row["group"], row["slots"]] - 1) for row in rows]
    height = 0.38
    for offset, values, color, label in (
        (-height / 2, published, COLORS[1], "the paper's kernel (A100)"),
        (height / 2, ours, COLORS[0], f"this project ({device})"),
    ):
        places = [index + offset for index in range(len(rows))]
        axes.barh(places, values, height, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:+.0f} %",
                (value, place),
                xytext=(4 if value >= 0 else -4, 0),
                textcoords="offset points",
                ha="left" if value >= 0 else "right",
                va="center",
                fontsize=8,
            )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(axis="y", visible=False)
    axes.set_ylabel("T · G · L")
    axes.set_xlabel("time beyond FA2-Triton without depth, %")
    axes.set_title(f"Attention with depth, forward + backward (d = {paper.HEAD_DIM})")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _draw_memory(axes: Any, part: dict[str, Any], device: str) -> None:
    for index, batch in enumerate(sorted({row["batch"] for row in part["rows"]})):
        rows = [row for row in part["rows"] if row["batch"] == batch]
        layers = [row["layers"] for row in rows]
        color = COLORS[index % len(COLORS)]
        bound = [(row["slots"] + row["retained"]) / 1e9 for row in rows]
        axes.plot(
            layers, [row["peak"] / 1e9 for row in rows], "o-", color=color, label=f"{batch} × {part['time']} tokens"
        )
        axes.plot(layers, bound, "--", color=color, linewidth=1)
    axes.plot([], [], "--", color=INK, linewidth=1, label="slots + q and do")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({row["layers"] for row in part["rows"]}))
    axes.set_xlabel("layers")
    axes.set_ylabel("peak memory, GB")
    axes.set_title(f"Stack of attention layers with depth\n{device}")
    axes.legend(loc="upper left")
