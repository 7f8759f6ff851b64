"""The kernels' section of the documentation, from results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scripts.kernel_benchmarks import tables
from scripts.kernel_benchmarks.goals import goals
from scripts.page_section import PageSection

SECTION = PageSection("kernels", "scripts/benchmark_kernels.py")


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


def replace(page: Path, results: dict[str, Any], picture: Path | None) -> None:
    """Write the section into the page. Raises PageError as `PageSection.check`."""
    name = None if picture is None else Path(os.path.relpath(picture, page.parent)).as_posix()
    SECTION.replace(page, section(results, name))
