"""Results of the training benchmark as Markdown."""

from __future__ import annotations

from typing import Any


def render(results: dict[str, Any]) -> str:
    """Command, machine and the table; rows that failed follow with the reason."""
    rows = results["rows"]
    lines = [
        "\n".join(f"    {command}" for command in results["commands"]),
        machine(results["environment"]),
        "| row | GPUs × micro-batch × T | tokens/s | per GPU | MFU | ÷ OLMo2 | peak memory (estimate) | wait for data "
        "| start to first step, cold / warm |\n|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(_row(name, row, rows) for name, row in rows.items()),
    ]
    if results["failures"]:
        lines.append("\n".join(f"- `{name}`: {reason}" for name, reason in results["failures"].items()))
    return "\n\n".join(lines)


def machine(environment: dict[str, Any]) -> str:
    """One sentence: device, versions, commit, date."""
    if not environment:
        return "No row has a result."
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return f"{environment['device']}, {packages}, Python {environment['python']}, {environment['time'][:10]}."


def baseline_of(name: str, rows: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the OLMo2 model that a MoDA row is compared with: the same name otherwise."""
    return rows.get(name.replace("moda_", "olmo2_", 1)) if name.startswith("moda_") else None


def _row(name: str, row: dict[str, Any], rows: dict[str, Any]) -> str:
    baseline = baseline_of(name, rows)
    ratio = f"{row['tokens_per_second'] / baseline['tokens_per_second']:.3f}" if baseline else ""
    if baseline and "peak_bytes" in row and "peak_bytes" in baseline:
        ratio += f" (memory {row['peak_bytes'] / baseline['peak_bytes']:.2f})"
    peak = f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "–"
    cold = f"{row['cold_start_seconds']:.0f}" if "cold_start_seconds" in row else "–"
    cells = [
        f"`{name}`",
        f"{row['ranks']} × {row['micro_batch_size']} × {row['sequence_length']}",
        f"{row['tokens_per_second'] / 1e3:.1f} k",
        f"{row['tokens_per_second_per_gpu'] / 1e3:.1f} k",
        f"{100 * row['mfu']:.1f} %" if "mfu" in row else "–",
        ratio,
        f"{peak} GB ({row['estimated_bytes'] / 1e9:.1f} GB)",
        f"{100 * row['data_wait_share']:.2f} %",
        f"{cold} s / {row['start_to_first_step_seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"
