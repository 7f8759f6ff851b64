"""The measured rows at a glance: tokens a second and GPU, by kind of GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.curves import COLORS, STYLE, new_figure, save

WIDTH, ROW_HEIGHT, MARGIN = 11.0, 0.26, 1.2  # inches
BASELINE = "olmo2"  # what the names of its rows begin with


def draw(groups: list[dict[str, Any]], path: Path) -> Path | None:
    """Write a PNG of what `tables.merge` returns, None without rows; of a row measured more than once, the newest."""
    from matplotlib import rc_context

    devices: dict[str, dict[str, float]] = {}
    for group in groups:  # the newest first
        rows = devices.setdefault(group["environment"].get("device", ""), {})
        for name, row in group["rows"].items():
            rows.setdefault(name, row["tokens_per_second_per_gpu"] / 1e3)
    devices = {device: dict(sorted(rows.items(), key=_place)) for device, rows in devices.items() if rows}
    if not devices:
        return None
    with rc_context(STYLE):
        most = max(map(len, devices.values()))
        figure = new_figure(WIDTH, MARGIN + ROW_HEIGHT * most)
        for axes, (device, rows) in zip(
            figure.subplots(1, len(devices), squeeze=False)[0], devices.items(), strict=True
        ):
            colors = [COLORS[not name.startswith(BASELINE)] for name in rows]
            bars = axes.barh(list(rows), list(rows.values()), color=colors)
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
            axes.set_ylim(most - 0.4, -0.6)  # bars of one height, the first above
            axes.margins(x=0.14)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("thousand tokens a second and GPU")
            axes.set_title(device)
        return save(figure, path)


def _place(row: tuple[str, float]) -> tuple[str, bool]:
    """Rows of one shape side by side, the baseline first."""
    model, _, shape = row[0].partition("/")
    return f"{model.partition('_')[2]}/{shape}", not model.startswith(BASELINE)
