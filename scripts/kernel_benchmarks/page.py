"""The generated section of a documentation page: between two comments, and nothing outside them is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data.shards import write_atomically
from scripts.kernel_benchmarks import tables
from scripts.kernel_benchmarks.goals import goals

BEGIN = "<!-- kernels: begin, written by scripts/benchmark_kernels.py -->"
END = "<!-- kernels: end -->"


class PageError(ValueError):
    """A page that cannot take the section; the message says why in one sentence."""


def section(results: dict[str, Any], picture: str | None) -> str:
    """All parts of the results under their titles; `picture`: its path as the page names it."""
    blocks = ["\n".join(f"    {command}" for command in results["commands"]), tables.machine(results["environment"])]
    if picture:
        blocks.append(f"![Time beyond FA2-Triton by row of Table 2; peak memory over layers]({picture})")
    for name, part in results["parts"].items():
        blocks += [f"### {tables.TITLES[name]}", tables.render(name, part)]
    if goals(results["parts"]):
        blocks += [f"### {tables.TITLES['goals']}", tables.render_goals(results["parts"])]
    blocks += [f"{tables.TITLES[name]} was not measured: {reason}." for name, reason in results["failures"].items()]
    return "\n\n".join(blocks)


def check(page: Path) -> None:
    """Raise PageError unless the page has the two comments, each once, in order."""
    if not page.is_file():
        raise PageError(f"{page} does not exist: run this from the repository, or leave --docs away.")
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PageError(f"{page} must hold the lines {BEGIN!r} and {END!r} once each, in this order.")


def replace(page: Path, results: dict[str, Any], picture: Path | None) -> None:
    """Write the section into the page. Raises PageError as `check`."""
    check(page)
    text = page.read_text(encoding="utf-8")
    name = None if picture is None else Path(os.path.relpath(picture, page.parent)).as_posix()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_atomically(page, f"{before}{BEGIN}\n\n{section(results, name)}\n\n{END}{after}".encode())
