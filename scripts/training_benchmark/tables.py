"""Results of the training benchmark as Markdown."""

from __future__ import annotations

from typing import Any

HEADINGS = (
    "row",
    "GPUs × micro-batch × T",
    "tokens/s",
    "per GPU",
    "MFU, full-square / causal",
    "÷ OLMo2",
    "peak memory (estimate)",
    "wait for data",
    "start to first step (cold / warm, else caches as found)",
    "steps",
    "commit",
)


def merge(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results, later ones last, as one for each machine with its versions, that of the newest measurement first.

    Within one the commands are those of all parts, and a row is its last measurement. The failure of a row that has a
    result is left out; that of one on a machine that measured nothing, too, once some machine has a result.
    """
    groups: dict[str, dict[str, Any]] = {}
    for part in parts:
        environment = part["environment"]
        group = groups.setdefault(machine(environment), {"commands": [], "environment": {}, "rows": {}, "failures": {}})
        group["commands"] += part["commands"]
        group["environment"] = max(group["environment"], environment, key=_time)
        group["rows"] |= {name: {"commit": environment["commit"]} | row for name, row in part["rows"].items()}
        group["failures"] |= part["failures"]
    for group in groups.values():
        measured = group["rows"] if group["environment"] else {name for g in groups.values() for name in g["rows"]}
        group["failures"] = {name: why for name, why in group["failures"].items() if name not in measured}
    merged = [group for group in groups.values() if group["rows"] or group["failures"]]
    return sorted(merged, key=lambda group: _time(group["environment"]), reverse=True)


def render(groups: list[dict[str, Any]]) -> str:
    """For each of what `merge` returns: commands, machine and the table; rows that failed follow with the reason."""
    return "\n\n".join(_section(group) for group in groups) or machine({})


def _section(results: dict[str, Any]) -> str:
    environment, rows = results["environment"], results["rows"]
    lines = ["\n".join(f"    {command}" for command in results["commands"])]
    lines.append(f"{machine(environment)} {environment['time'][:10]}." if environment else machine(environment))
    if rows:
        table = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
        lines.append("\n".join(table + [_row(name, row, rows) for name, row in rows.items()]))
    if results["failures"]:
        lines.append("\n".join(f"- `{name}`: {reason}" for name, reason in results["failures"].items()))
    return "\n\n".join(lines)


def machine(environment: dict[str, Any]) -> str:
    """One sentence: device and versions."""
    if not environment:
        return "No row has a result."
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return f"{environment['device']}, {packages}, Python {environment['python']}."


def _time(environment: dict[str, Any]) -> str:
    return environment["time"] if environment else ""


def baseline_of(name: str, rows: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the OLMo2 model that a MoDA row is compared with: the same name otherwise."""
    return rows.get(name.replace("moda_", "olmo2_", 1)) if name.startswith("moda_") else None


def _row(name: str, row: dict[str, Any], rows: dict[str, Any]) -> str:
    baseline = baseline_of(name, rows)
    ratio = f"{row['tokens_per_second'] / baseline['tokens_per_second']:.3f}" if baseline else ""
    if baseline and "peak_bytes" in row and "peak_bytes" in baseline:
        ratio += f" (memory {row['peak_bytes'] / baseline['peak_bytes']:.2f})"
    peak = f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "–"
    cold = f"{row['cold_start_seconds']:.0f} s / " if "cold_start_seconds" in row else ""
    shares = (f"{100 * row[key]:.1f} %" if key in row else "–" for key in ("mfu", "mfu_causal"))
    cells = [
        f"`{name}`",
        f"{row['ranks']} × {row['micro_batch_size']} × {row['sequence_length']}",
        f"{row['tokens_per_second'] / 1e3:.1f} k",
        f"{row['tokens_per_second_per_gpu'] / 1e3:.1f} k",
        " / ".join(shares),
        ratio,
        f"{peak} GB ({row['estimated_bytes'] / 1e9:.1f} GB)",
        f"{100 * row['data_wait_share']:.2f} %",
        f"{cold}{row['start_to_first_step_seconds']:.0f} s",
        str(row["steps"]),
        _commit(row["commit"]),
    ]
    return f"| {' | '.join(cells)} |"


def _commit(commit: dict[str, Any] | None) -> str:
    """The first digits of its hash, with a + where files differed from it."""
    return f"{commit['hash'][:8]}{'+' if commit['modified'] else ''}" if commit else "–"
