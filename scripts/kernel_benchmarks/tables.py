"""Measurements as Markdown: one table a part, with the sentences that a reader needs to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scripts.kernel_benchmarks import paper
from scripts.kernel_benchmarks.goals import goals

TITLES = {
    "table2": "Table 2 of the paper: forward and backward",
    "over-sequence": "Over attention without depth",
    "depth": "The depth kernels alone",
    "overlap": "Both parts at the same time",
    "stream": "The depth stream in a step of the 700M model",
    "memory": "Peak memory of a stack of attention layers",
    "ladder": "Table 7 of the paper: layouts of the slots",
    "goals": "Goals",
}
PAPER_RATIOS = {(row.time, row.group, row.slots): row.ratio for row in paper.TABLE_2}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(name: str, part: dict[str, Any]) -> str:
    """A part as Markdown, without its title."""
    renderers: dict[str, Callable[[dict[str, Any]], str]] = {
        "table2": _table2,
        "over-sequence": _over_sequence,
        "depth": _depth,
        "overlap": _overlap,
        "stream": _stream,
        "memory": _memory,
        "ladder": _ladder,
    }
    return renderers[name](part)


def render_goals(parts: dict[str, Any]) -> str:
    """Every goal of the parts that were measured."""
    rows = [
        [
            g.what,
            f"{'≤' if g.at_most else '≥'} {g.limit:g} {g.unit}",
            f"{g.measured:.3g}",
            "yes" if g.met else "**no**",
            "" if g.floor is None else f"{g.floor:.3g}",
        ]
        for g in goals(parts)
    ]
    note = "Floor: the fastest sequence kernel found, and the bytes of the depth part at the speed of a copy."
    return "\n\n".join([note, markdown(["on an H200", "goal", "measured", "met", "floor"], rows)])


def machine(environment: dict[str, Any]) -> str:
    """One sentence: device, versions, date."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"One {environment['device']}, {packages}, CUDA {environment['cuda']}, cuDNN {environment['cudnn']}, "
        f"Python {environment['python']}, {environment['date']}."
    )


def _table2(part: dict[str, Any]) -> str:
    backends = _names(part, "moda")
    fa2, sequence = _names(part, "fa2_triton"), _names(part, "sequence")
    header = ["T", "G", "L", "FA2-Triton, ms", *(f"{name}, ms" for name in backends)]
    header += ["auto ÷ FA2-Triton", "paper", "fastest sequence kernel, ms", "auto over it"]
    header += [f"auto ÷ {name}" for name in fa2] if len(fa2) > 1 else []
    rows = []
    for row in part["rows"]:
        baseline, fastest, auto = _least(row["fa2_triton"]), _least(row["sequence"]), row["moda"].get("auto")
        ratio = PAPER_RATIOS.get((row["time"], row["group"], row["slots"]))
        line = [str(row["time"]), str(row["group"]), str(row["slots"]), _ms(baseline)]
        line += [_ms(row["moda"].get(name)) for name in backends]
        line += [_ratio(auto, baseline), f"{ratio:.2f}" if ratio else "", _ms(fastest), _extra(auto, fastest)]
        line += [_ratio(auto, row["fa2_triton"].get(name)) for name in fa2] if len(fa2) > 1 else []
        rows.append(line)
    note = (
        "B = 1, bf16, 8 kv heads of 64, all five gradients. FA2-Triton is "
        f"{_listed(fa2)}. `paper`: its MoDA ÷ its FA2-Triton, on an A100."
        if fa2
        else "B = 1, bf16, 8 kv heads of 64, all five gradients. No FA2-Triton kernel was found on the machine."
    )
    kernels = markdown(
        ["T", "G", *(f"{name}, ms" for name in [*fa2, *sequence])],
        [
            [
                str(r["time"]),
                str(r["group"]),
                *(_ms({**r["fa2_triton"], **r["sequence"]}.get(n)) for n in [*fa2, *sequence]),
            ]
            for r in part["rows"]
            if r["slots"] == 64
        ],
    )
    own = "Attention over the sequence alone, forward and backward:"
    return "\n\n".join([note, markdown(header, rows), own, kernels, *_sentences(part)])


def _over_sequence(part: dict[str, Any]) -> str:
    rows = []
    for row in part["rows"]:
        fastest, auto = _least(row["sequence"]), row["moda"].get("auto")
        name = min(row["sequence"], key=row["sequence"].get) if row["sequence"] else ""
        more = "" if auto is None or fastest is None else f"{auto - fastest:+.3f}"
        sizes = [str(row["time"]), str(row["group"]), str(row["slots"])]
        rows.append([*sizes, f"{name} {_ms(fastest)}".strip(), _ms(auto), more, _extra(auto, fastest)])
        rows[-1] += [_ms(row["depth_floor_ms"]), _extra(1 + row["depth_floor_ms"] / fastest, 1.0) if fastest else ""]
        rows[-1].append(_ms(row["host"].get("auto")))
    header = ["T", "G", "L", "fastest sequence kernel, ms", "auto, ms", "more, ms", "more"]
    header += ["bytes of the depth part, ms", "that is", "host, ms"]
    return "\n\n".join([markdown(header, rows), *_failures(part)])


def _depth(part: dict[str, Any]) -> str:
    names = list(part["rows"][0]["kernels"]) if part["rows"] else []
    rows = [
        [
            f"{row['tokens'] // 1024} k, {row['group']}, {row['slots']}",
            *(
                f"{found['ms']:.3f} ms, {found['speed'] / 1e12:.2f} TB/s ({100 * found['speed'] / part['copy']:.0f} %)"
                + (f", {row['readers']} readers" if name in ("pull", "block") else "")
                for name, found in row["kernels"].items()
            ),
        ]
        for row in part["rows"]
    ]
    titles = {
        "forward": "forward",
        "gradients": "dq, dense dK and dV",
        "query": "dq of a reader",
        "pull": "pull of 2 slots",
        "block": "pull of 16 slots, fp32",
    }
    note = (
        "8 kv heads of 64; every byte counted (q, o, do, dq, K, V, dK, dV, lse, delta); in brackets the share of a "
        f"plain copy, which runs at {part['copy'] / 1e12:.2f} TB/s."
    )
    return "\n\n".join([note, markdown(["tokens, G, slots", *(titles[name] for name in names)], rows)])


def _overlap(part: dict[str, Any]) -> str:
    names = list(part["rows"][0]["forward"]) if part["rows"] else []
    rows = []
    for row in part["rows"]:
        for direction in ("forward", "backward"):
            times = row[direction]
            fastest, first = min(times, key=times.get), times[names[0]]
            saved = first - times[fastest]
            best = f"{_ms(saved)} ms, {100 * saved / first:.1f} %, {fastest}" if saved > 0 else "nothing"
            sizes = [str(row["time"]), str(row["group"]), str(row["slots"]), direction]
            rows.append([*sizes, *(_ms(times[name]) for name in names), best])
    note = (
        "ms, B = 1, bf16, 8 kv heads of 64. `in turn`: the kernels over the sequence, then the depth kernel, as in "
        "`joined`. Else the depth kernel in a stream of its own, in one of high priority, or in a green context, a "
        "partition of multiprocessors (SMs), with outputs of its own; what merging them would take is left out."
    )
    left_out = [f"{name} was left out: {reason}." for name, reason in part["failed"].items()]
    return "\n\n".join([note, markdown(["T", "G", "L", "", *names, "saved at most"], rows), *left_out])


def _stream(part: dict[str, Any]) -> str:
    extra = part["with_depth_ms"] - part["plain_ms"]
    own = [row for row in part["kernels"] if row["depth"]]
    rest = [row for row in part["kernels"] if not row["depth"]]
    shape = part["shape"]
    note = (
        f"{shape['layers']} layers, {shape['query_heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, "
        f"{shape['batch']} × {shape['time']} tokens, attention only, forward and backward: "
        f"{part['with_depth_ms']:.1f} ms with depth, {part['plain_ms']:.1f} ms without, **{extra:.1f} ms** of depth. "
        f"By the profiler: {sum(r['ms'] for r in own):.1f} ms in the depth kernels, "
        f"{sum(r['ms'] for r in rest):.1f} ms more in all else (copies into slots, additions of gradients)."
    )
    rows = [[f"`{_short(row['name'])}`", str(row["calls"]), f"{row['ms']:.2f}"] for row in part["kernels"]]
    return "\n\n".join([note, markdown(["kernel", "more calls", "more ms"], rows)])


def _memory(part: dict[str, Any]) -> str:
    rows = []
    for row in part["rows"]:
        bound = row["slots"] + row["retained"]
        sizes = (f"{row[name] / 1e9:.2f}" for name in ("peak", "plain", "slots", "retained"))
        rows.append([str(row["layers"]), str(row["batch"]), *sizes, f"{row['peak'] / bound:.2f}"])
    header = [
        "layers",
        "sequences",
        "with depth, GB",
        "without, GB",
        "slots, GB",
        "q and do, GB",
        "with ÷ (slots + q, do)",
    ]
    lines = [
        f"{fit['batch']} sequences: {fit['slope'] / 1e6:.1f} MB a layer, {fit['intercept'] / 1e6:+.0f} MB "
        f"(r² = {fit['r2']:.5f})"
        for fit in part["fits"]
    ]
    note = (
        f"Peak beyond the inputs, attention only, T = {part['time']}, shape of the 700M model. "
        f"Straight lines through the peaks with depth: {'; '.join(lines) or 'too few points'}."
    )
    return "\n\n".join([note, markdown(header, rows), *part["failed"]])


def _ladder(part: dict[str, Any]) -> str:
    titles = {
        "naive": "plain PyTorch",
        "flat": "flash-compatible flat layout",
        "chunk-aware": "chunk-aware",
        "group-aware": "group-aware",
        "moda": "ours",
    }
    times = {row["step"]: row.get("ms") for row in part["rows"]}
    rows = []
    for row in part["rows"]:
        published = paper.TABLE_7.get(row["step"])
        shown = f"failed: {row['failed']}" if "failed" in row else _ms(row["ms"])
        relative = "" if not (row.get("ms") and times.get("moda")) else f"{row['ms'] / times['moda']:.1f} ×"
        rows.append([titles[row["step"]], shown, relative, "" if published is None else f"{published:g}"])
    note = (
        f"T = {paper.TABLE_7_TIME}, G = {paper.TABLE_7_GROUP}, L = {paper.TABLE_7_SLOTS}, 8 kv heads of 64, bf16, "
        "forward and backward. The three layouts between run in FlexAttention, as steps to measure, each checked first."
        " In the flat one every query meets the slots of all tokens, masked; plain PyTorch computes its own alone."
    )
    return "\n\n".join([note, markdown(["layout", "ms", "÷ ours", "paper (A100), ms"], rows)])


def _sentences(part: dict[str, Any]) -> list[str]:
    return [" ".join([*part["remarks"], *part["left_out"]])] * bool(part["remarks"] or part["left_out"]) + _failures(
        part
    )


def _failures(part: dict[str, Any]) -> list[str]:
    return [
        f"T={row['time']}, G={row['group']}, L={row['slots']}, {name} failed: {reason}."
        for row in part["rows"]
        for name, reason in row["failed"].items()
    ]


def _names(part: dict[str, Any], column: str) -> list[str]:
    return list(dict.fromkeys(name for row in part["rows"] for name in row[column]))


def _least(times: dict[str, float]) -> float | None:
    return min(times.values()) if times else None


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value / base:.2f}"


def _extra(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{100 * (value / base - 1):+.1f} %"


def _listed(names: list[str]) -> str:
    return f"{names[0]}, the only one found" if len(names) == 1 else f"the faster of {' and '.join(names)}"


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
