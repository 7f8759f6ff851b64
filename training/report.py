"""All runs below a folder, side by side: a table of what differs and how well it did, and a picture of the loss curves.

In: a folder with run directories (`config.yaml`, `metrics.jsonl`, `summary.json` once a run has ended). Out:
`report.md` and `report.png` in that folder, and the table as aligned text.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from data.shards import write_atomically
from training.curves import COLORS, FAINT, STYLE, Series, count_ticks, limit_losses, new_figure, save, smooth
from training.curves import validation_domains as domains_of
from training.metrics import Record, format_count, read_metrics

# Where a run lives and how it is watched or kept does not change what it computes.
IGNORED_GROUPS = ("run", "logging", "checkpoint")
IGNORED_KEYS = ("data.prepare",)
MAX_LABEL_KEYS = 4  # with more differing keys a legend names runs by their folder


class ReportError(ValueError):
    """A folder that no report can be made of; the message says why in one sentence."""


@dataclass(frozen=True)
class Run:
    """What a run directory holds, read once."""

    name: str  # folder relative to the report's folder
    config: dict[str, Any]  # dotted key -> value
    records: list[Record]
    summary: dict[str, Any] | None  # None: the run goes on, or was killed
    differing: dict[str, Any] = field(default_factory=dict)  # the part of config in which the runs differ

    @property
    def position(self) -> tuple[int, int]:
        """The last step made, and the tokens seen by then: as the summary says, else those of the last record, or 0.

        Every `logging.every`th step is recorded. A summary that is further away tells of an earlier start: the run goes
        on, from a checkpoint before it or beyond it.
        """
        last: Mapping[str, Any] = self.records[-1] if self.records else {"step": 0, "tokens": 0}
        step, tokens = last["step"], last["tokens"]
        summary = self.summary or {}
        stopped_at = summary.get("stopped_at", step)
        if 0 <= stopped_at - step < int(self.config.get("logging.every") or 1):
            return stopped_at, summary.get("tokens", tokens)
        return step, tokens

    @property
    def steps(self) -> int:
        """The last step made (0 when there is none)."""
        return self.position[0]

    @property
    def tokens(self) -> int:
        """Tokens seen by that step."""
        return self.position[1]

    @property
    def planned_steps(self) -> int:
        """`training.steps` of the configuration, or the last step made where it does not say."""
        return int(self.config.get("training.steps") or self.steps)

    @property
    def finished(self) -> bool:
        """Whether the run ended, at its planned last step."""
        return self.summary is not None and self.steps >= self.planned_steps

    def last(self, key: str) -> tuple[float, int]:
        """The last finite value of `key` and its step; (nan, 0) when there is none."""
        series = Series.of(self.records, key)
        return (float(series.values[-1]), int(series.steps[-1])) if len(series) else (math.nan, 0)

    @property
    def mean_loss(self) -> float:
        """Last mean validation loss, NaN when never evaluated."""
        return self.last("validation/mean/loss")[0]

    @property
    def train_loss(self) -> float:
        """Last training loss, NaN when never recorded."""
        return self.last("train/loss")[0]

    @property
    def tokens_per_second(self) -> float:
        """Median throughput, NaN when never recorded."""
        series = Series.of(self.records, "throughput/tokens_per_second")
        return float(np.median(series.values)) if len(series) else math.nan

    @property
    def label(self) -> str:
        """What sets this run apart, for a legend."""
        if not self.differing or len(self.differing) > MAX_LABEL_KEYS:
            return self.name
        return ", ".join(f"{key.rsplit('.', 1)[-1]}={_show(value)}" for key, value in self.differing.items())


@dataclass(frozen=True)
class Report:
    """The files of a report and its table as aligned text."""

    text: str
    markdown: Path
    picture: Path


def write_report(folder: str | Path, warn: Callable[[str], None] = warnings.warn) -> Report:
    """Read all runs below `folder`, write `report.md` and `report.png` there.

    `warn` gets one sentence for each damaged line or run that is skipped. Raises ReportError when no run is found.
    """
    folder = Path(folder)
    runs = load_runs(folder, warn)
    table = _Table(runs)
    text = table.as_text()
    picture = draw_report(runs, folder / "report.png")
    markdown = folder / "report.md"
    page = f"# Runs in {folder.resolve().name}\n\n{table.as_markdown()}\n![loss curves]({picture.name})\n"
    write_atomically(markdown, page.encode())
    return Report(text, markdown, picture)


def find_runs(folder: Path) -> Iterator[Path]:
    """Run directories at or below `folder`, in order of name; what lies inside a run is not searched."""
    for path, folders, files in os.walk(folder):
        if {"config.yaml", "metrics.jsonl"} <= set(files):
            folders.clear()
            yield Path(path)
        else:
            folders.sort()


def load_runs(folder: Path, warn: Callable[[str], None] = warnings.warn) -> list[Run]:
    """All readable runs, the lowest mean validation loss first, `differing` filled in. Raises ReportError for none."""
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder: give the folder of a run, of several runs, or of a sweep.")
    runs = []
    for path in find_runs(folder):
        try:
            runs.append(_load_run(path, folder, warn))
        except Exception as error:  # a foreign or half-written file must not hide the other runs
            warn(f"{path} was skipped, it cannot be read ({' '.join(str(error).split())}).")
    if not runs:
        raise ReportError(f"{folder} holds no run: a run is a folder with config.yaml and metrics.jsonl.")
    keys = _differing_keys([run.config for run in runs])
    runs = [Run(r.name, r.config, r.records, r.summary, {key: r.config.get(key) for key in keys}) for r in runs]
    return sorted(runs, key=lambda run: (_missing_last(run.mean_loss), _missing_last(run.train_loss), run.name))


def draw_report(runs: Sequence[Run], path: Path) -> Path:
    """Loss over tokens of all runs, and their last losses as dots; validation where any run has it, else training."""
    from matplotlib import rc_context

    key, title = "validation/mean/loss", "Validation loss, mean of domains"
    if all(math.isnan(run.mean_loss) for run in runs):
        key, title = "train/loss", "Training loss"
    lines = [Series.of(run.records, key) for run in runs]
    with rc_context(STYLE):
        figure = new_figure(14, max(5.5, 2.2 + 0.3 * len(runs)))
        curves, dots = figure.subplots(1, 2, width_ratios=(3, 2))
        curves.set_title(title)
        curves.set_xlabel("tokens")
        dots.set_title("Last value")
        rows = range(len(runs))
        for row, run, line in zip(rows, runs, lines, strict=True):
            color, dashes = COLORS[row % len(COLORS)], ("-", "--", ":", "-.")[row // len(COLORS) % 4]
            if not len(line):
                continue
            values = line.values if key.startswith("validation") else smooth(line.values)
            marker = "o" if len(line) <= 40 else None
            curves.plot(line.tokens, values, dashes, color=color, linewidth=1.6, marker=marker, markersize=3.5)
            dots.plot(
                [values[-1]], [row], "o", color=color, markersize=8, markerfacecolor=None if run.finished else "white"
            )
            dots.annotate(
                f"{values[-1]:.4f}", (values[-1], row), xytext=(9, 0), textcoords="offset points", va="center"
            )
        limit_losses(curves, lines)
        count_ticks(curves.xaxis)
        dots.set_yticks(rows, [run.label + ("" if run.finished else "  (unfinished)") for run in runs])
        dots.set_ylim(len(runs) - 0.4, -0.6)
        dots.margins(x=0.25)
        dots.grid(axis="y", color=FAINT, linestyle=":")
        dots.spines["left"].set_visible(False)
        dots.tick_params(axis="y", length=0, labelsize=9)
        for row, tick in enumerate(dots.get_yticklabels()):
            tick.set_color(COLORS[row % len(COLORS)])
        return save(figure, path)


class _Table:
    """Rows of cells: strings, with the best of a column marked."""

    def __init__(self, runs: Sequence[Run]) -> None:
        domains = domains_of([record for run in runs for record in run.records])
        self.numbers = {"steps", "tokens", "train loss", "validation", "Δ best", "tokens/s", *domains}
        self.compared = len(runs) > 1
        best = runs[0].mean_loss  # sorted by it
        self.rows = [self._row(run, domains, best) for run in runs]
        self.columns = [column for column in self.rows[0] if any(row[column] for row in self.rows)]
        self.bold = set()
        for column, domain in {"validation": "mean", **{domain: domain for domain in domains}}.items():
            losses = [run.last(f"validation/{domain}/loss")[0] for run in runs]
            lowest = min(losses, key=_missing_last)
            self.bold |= {(i, column) for i, loss in enumerate(losses) if self.compared and loss == lowest}
        self.unfinished = any(not run.finished for run in runs)

    def _row(self, run: Run, domains: Sequence[str], best: float) -> dict[str, str]:
        steps = f"{run.steps:,}" if run.finished else f"{run.steps:,} of {run.planned_steps:,} *"
        row = {"run": run.name}
        row |= {key: _show(value) for key, value in run.differing.items()}
        row |= {"steps": steps, "tokens": format_count(run.tokens), "train loss": _show_loss(run.train_loss)}
        row |= {"validation": self._last(run, "mean"), "Δ best": ""}
        if self.compared and not math.isnan(run.mean_loss - best):
            row["Δ best"] = f"{run.mean_loss - best:+.4f}" if run.mean_loss != best else "0"
        row |= {domain: self._last(run, domain) for domain in domains}
        row["tokens/s"] = "" if math.isnan(run.tokens_per_second) else format_count(run.tokens_per_second)
        return row

    @staticmethod
    def _last(run: Run, domain: str) -> str:
        value, step = run.last(f"validation/{domain}/loss")
        if math.isnan(value):
            return ""
        return _show_loss(value) + ("" if step == run.steps else f" (step {step:,})")

    @property
    def note(self) -> str:
        """What the star means, where there is one."""
        return "* the run goes on, was stopped or was killed before its last planned step\n" if self.unfinished else ""

    def as_text(self) -> str:
        """Columns aligned with spaces, numbers to the right."""
        lines = [{column: column for column in self.columns}, *self.rows]
        widths = {column: max(len(line[column]) for line in lines) for column in self.columns}
        align = {column: ">" if column in self.numbers else "<" for column in self.columns}
        text = ("  ".join(f"{line[c]:{align[c]}{widths[c]}}" for c in self.columns).rstrip() + "\n" for line in lines)
        return "".join(text) + (f"\n{self.note}" if self.note else "")

    def as_markdown(self) -> str:
        """A Markdown table; the lowest loss of each column is bold."""
        rule = ["---:" if column in self.numbers else "---" for column in self.columns]
        lines = [[_escape(column) for column in self.columns], rule]
        for i, row in enumerate(self.rows):
            cells = ((column, _escape(row[column])) for column in self.columns)
            lines.append([f"**{cell}**" if (i, column) in self.bold else cell for column, cell in cells])
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        note = f"\n{_escape(self.note)}" if self.note else ""
        return table + note


def _load_run(path: Path, folder: Path, warn: Callable[[str], None]) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=True)
    if not isinstance(config, dict):
        raise ValueError("config.yaml is not a mapping")
    try:
        summary = json.loads((path / "summary.json").read_text())
    except FileNotFoundError:
        summary = None
    name = str(path.relative_to(folder)) if path != folder else path.resolve().name
    return Run(name, dict(_flatten(config)), read_metrics(path / "metrics.jsonl", warn), summary)


def _flatten(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all configurations, in the order they are written."""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    keys = [key for key in keys if key.split(".")[0] not in IGNORED_GROUPS and key not in IGNORED_KEYS]
    return [key for key in keys if len({_show(_comparable(key, config.get(key))) for config in configs}) > 1]


def _comparable(key: str, value: Any) -> Any:
    """Data of one name is the same data wherever it lies."""
    return Path(value).name if key == "data.path" and isinstance(value, str) else value


def _show(value: Any) -> str:
    """A value as it is typed in a configuration."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show_loss(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _missing_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")
