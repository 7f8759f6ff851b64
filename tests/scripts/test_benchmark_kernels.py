"""`scripts/benchmark_kernels.py` without a GPU: what is measured, how it is shown, and that nothing is lost."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import moda
from moda import reference
from scripts import benchmark_kernels
from scripts.kernel_benchmarks import (
    baselines,
    depth,
    goals,
    joint,
    ladder,
    overlap,
    page,
    paper,
    picture,
    session,
    stream,
    tables,
    timing,
)

SCRIPT = Path(benchmark_kernels.__file__)
TINY_LADDER = {"time": 16, "group": 4, "slots": 3, "chunk": 8}

BEGIN, END = page.SECTION.begin, page.SECTION.end


def joint_row(time, group, slots, auto=8.0):
    row = {"time": time, "group": group, "slots": slots, "moda": {"auto": auto, "joined": auto + 0.5}}
    return (
        row
        | {"fa2_triton": {"flash-linear-attention": 10.0}, "sequence": {"cuDNN": 5.0}, "failed": {}}
        | {
            "depth_floor_ms": 0.5,
            "host": {"auto": 0.8},
        }
    )


def overlap_row(time, group, slots):
    row = {"time": time, "group": group, "slots": slots}
    times = {"in turn": 2.0, "two streams": 1.9, "32 SMs": 1.8}
    return row | {"forward": times | {"32 SMs": 2.1, "two streams": 2.2}, "backward": times}


def some_results():
    """Results of every part, with one kernel that ran out of memory."""
    rows = [joint_row(*case, auto=6.0 + index / 8) for index, case in enumerate(joint.ROWS)]
    rows[4]["failed"]["flash (PyTorch)"] = "out of memory"
    noted = {"left_out": ["flash-attn-4 was left out: not installed."], "remarks": []}
    kernels = {name: {"ms": 1.0, "bytes": 10**9, "speed": 4.1e12} for name in depth.KERNELS}
    shape = stream.Shape()
    memory = [
        {"layers": n, "batch": 8, "peak": n * 300 * 10**6 + 5 * 10**8, "plain": n * 10**8}
        | {"slots": n * 134 * 10**6, "retained": n * 134 * 10**6}
        for n in stream.MEMORY_LAYERS
    ]
    listed = [{"name": "backward_vector", "calls": 35, "ms": 22.0, "depth": True}]
    listed += [{"name": "copy_kernel", "calls": 142, "ms": 7.5, "depth": False}]
    return {
        "commands": ["python scripts/benchmark_kernels.py"],
        "environment": {"device": "A GPU", "packages": {"torch": "2.11.0"}, "cuda": "13.0", "cudnn": 91000}
        | {"python": "3.12.3", "date": "2026-01-01"},
        "parts": {
            "table2": {"rows": rows, **noted},
            "over-sequence": {"rows": [joint_row(*case) for case in joint.OVER_SEQUENCE], **noted},
            "depth": {
                "copy": 4.27e12,
                "rows": [{**p._asdict(), "readers": p.readers, "kernels": kernels} for p in depth.PROBLEMS],
            },
            "overlap": {"rows": [overlap_row(*case) for case in overlap.CASES], "failed": {"96 SMs": "no such thing"}},
            "stream": {"shape": vars(shape), "with_depth_ms": 180.0, "plain_ms": 110.0, "kernels": listed},
            "memory": {"time": 4096, "rows": memory, "fits": stream.fits(memory), "failed": []},
            "ladder": {"rows": [{"step": step, "ms": 2.0, "error": 1e-3} for step in ladder.STEPS]},
        },
        "failures": {},
        "seconds": dict.fromkeys(session.PARTS, 1.0),
    }


def test_rows_are_those_of_table_2_of_the_paper():
    assert (
        *((time, 8, 64) for time in (4096, 8192, 16384, 32768, 65536)),
        *((16384, group, 64) for group in (2, 4, 16, 32)),
        *((16384, 8, slots) for slots in (128, 256)),
    ) == joint.ROWS
    printed = [25.86, 18.99, 8.59, 4.38, 2.73, 27.07, 15.76, 4.57, 2.84, 15.57, 30.52]  # (MoDA - FA2) / MoDA, %
    assert [100 * (1 - 1 / row.ratio) for row in paper.TABLE_2] == pytest.approx(printed, abs=0.006)


def test_bytes_of_the_depth_kernels_are_those_of_their_tensors():
    problem = depth.Problem(tokens=6, group=3, slots=5, pulled=2, kv_heads=2, head_dim=16)

    def size(dtype, *shape):
        return torch.empty(shape, dtype=dtype).nbytes

    q = size(torch.bfloat16, 6, 6, 16)
    slots, pulled = (size(torch.bfloat16, number, 6, 2, 16) for number in (5, 2))
    lse = size(torch.float32, 6, 6)
    assert depth.bytes_moved("forward", problem) == q + 2 * slots + 2 * (q + lse)  # o, lse are read and written
    assert depth.bytes_moved("gradients", problem) == 3 * q + lse + 2 * slots + 2 * q + lse + 2 * slots
    assert depth.bytes_moved("query", problem) == 3 * q + lse + 2 * slots + 2 * q + 2 * lse
    assert depth.bytes_moved("pull", problem) == problem.readers * 2 * (q + lse) + 2 * pulled + 2 * pulled
    block, sums = (size(dtype, 16, 6, 2, 16) for dtype in (torch.bfloat16, torch.float32))
    assert depth.bytes_moved("block", problem) == problem.readers * 2 * (q + lse) + 2 * block + 2 * sums
    with pytest.raises(ValueError, match="'push' is none of forward"):
        depth.bytes_moved("push", problem)


def test_readers_of_a_pull_are_bounded_by_memory():
    assert depth.Problem(16384, 2).readers == depth.MAX_READERS
    large = depth.Problem(32768, 32)
    assert 1 < large.readers < depth.MAX_READERS
    assert large.readers * 2 * large.query_bytes <= depth.READER_BYTES


def test_inputs_that_fit_the_cache_are_rotated():
    assert timing.rotation(10, 50) == 8
    assert timing.rotation(30, 50) == 4
    assert timing.rotation(100, 50) == 1


@pytest.mark.parametrize("step", ladder.STEPS)
def test_layouts_of_the_ladder_equal_the_definition(step):
    torch.manual_seed(0)
    q = torch.randn(2, TINY_LADDER["time"], 8, 16)
    k, v = torch.randn(2, 2, TINY_LADDER["time"], 2, 16)
    inputs = [q, k, v, *torch.randn(2, TINY_LADDER["slots"], *k.shape)]
    function, laid_out = ladder.prepare(step, inputs, flex_attention, TINY_LADDER["chunk"])
    torch.testing.assert_close(function(*laid_out), reference.definition(*inputs)[0])


@pytest.mark.parametrize("step", ladder.STEPS[1:4])
def test_block_masks_cover_every_allowed_pair_and_full_blocks_hold_nothing_else(step):
    mask = ladder.block_mask(step, **TINY_LADDER, device="cpu")
    time, group, slots, chunk = TINY_LADDER.values()
    rows = time * group if step == "group-aware" else time
    row, key = torch.arange(rows)[:, None], torch.arange(time + time * slots)[None]
    zero = torch.zeros((), dtype=torch.long)
    pairs = mask.mask_mod(zero, zero, row, key).view(rows // chunk, chunk, -1, chunk).transpose(1, 2).flatten(2)
    partial, full = (
        listed_blocks(mask.kv_num_blocks, mask.kv_indices),
        listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    assert torch.equal(partial | full, ladder.visited(step, **TINY_LADDER))
    assert not (partial & full).any()
    assert pairs[full].all()
    assert not pairs[~(partial | full)].any()
    assert pairs.sum(-1)[:, time // chunk :].sum() == rows * slots


def listed_blocks(counts, indices):
    blocks = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        blocks[row, columns[:count].long()] = True
    return blocks


def test_each_step_of_the_ladder_looks_at_fewer_pairs():
    time, group, slots, chunk = 256, 8, 16, 64

    def depth_pairs(step):  # a query head
        looks = ladder.visited(step, time, group, slots, chunk)[:, time // chunk :]
        return int(looks.sum()) * chunk * chunk / (group if step == "group-aware" else 1)

    assert depth_pairs("flat") == time * time * slots
    assert depth_pairs("chunk-aware") == time * chunk * slots
    assert depth_pairs("group-aware") == time * chunk // group * slots


def test_stack_with_depth_equals_the_definition():
    stack = stream.Stack(stream.Shape(3, 2, 5, 4, 2, 16), device="cpu", dtype=torch.float64, shared=False)
    got = stack.step(depth=True)
    x, pairs = stack.x, []
    for q, k, v, second_k, second_v in stack.layers:
        slots = [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]
        x = x + 0.5 * reference.definition(q, k, v, *slots)[0]
        pairs += [(k, v), (second_k, second_v)]
    want = torch.autograd.grad(x, stack.leaves, stack.dx, allow_unused=True)
    assert [g is None for g in got] == [w is None for w in want]
    for g, w in zip(got, want, strict=True):
        if g is not None:
            torch.testing.assert_close(g, w)


def test_shared_inputs_give_every_layer_tensors_of_its_own():
    stack = stream.Stack(stream.Shape(3, 1, 4, 2, 1, 16), device="cpu", dtype=torch.float32, shared=True)
    assert len(stack.leaves) == 5
    tensors = [x for layer in range(3) for x in stack._inputs(layer, slice(5))]
    assert len({x.data_ptr() for x in tensors}) == 15
    assert all(g is not None for g in stack.step(depth=True))


def test_difference_of_two_stacks_names_the_depth_kernels_and_sums_up_the_small(monkeypatch):
    monkeypatch.setattr(stream, "depth_kernel_names", lambda: {"pull"})
    rows = stream.difference(
        {"pull": [35, 20.0], "copy": [100, 9.0], "flash": [36, 50.0], "tiny": [3, 0.01]},
        {"flash": [36, 49.9], "copy": [10, 1.0]},
    )
    assert [(row["name"], row["calls"], row["depth"]) for row in rows] == [
        ("pull", 35, True),
        ("copy", 90, False),
        ("others", 3, False),
    ]
    assert sum(row["ms"] for row in rows) == pytest.approx(28.11)


def test_depth_kernels_are_known_by_name():
    names = stream.depth_kernel_names()
    assert {"forward_vector", "backward_tensor", "slots_tensor"} <= names


def test_line_through_peaks():
    rows = [{"layers": n, "batch": 2, "peak": 7 * n + 100} for n in (12, 24, 36)] + [
        {"layers": 12, "batch": 4, "peak": 1}
    ]
    (fit,) = stream.fits(rows)
    assert (fit["batch"], fit["slope"], fit["intercept"], fit["r2"]) == pytest.approx((2, 7, 100, 1))


def test_baseline_that_computes_something_else_is_caught():
    right = baselines.SequenceKernel("right", lambda *x: baselines.through_autograd(moda.attention, x[:3], x[3]))
    wrong = baselines.SequenceKernel(
        "wrong", lambda *x: baselines.through_autograd(lambda q, k, v: moda.attention(q, k, v, scale=0.2), x[:3], x[3])
    )
    assert baselines.check(right, "cpu") < baselines.MAX_ERROR < baselines.check(wrong, "cpu")


def test_one_kernel_that_fails_does_not_hide_the_others(monkeypatch):
    def fails(time, group, *_):
        raise RuntimeError("out of memory. Tried to\nallocate")

    monkeypatch.setattr(joint.baselines, "find", lambda _: ([baselines.SequenceKernel("K", fails)], []))
    monkeypatch.setattr(joint.JointBenchmark, "_moda", lambda *_: lambda: None)
    monkeypatch.setattr(joint.timing, "milliseconds", lambda *calls: 2.0)
    monkeypatch.setattr(joint.timing, "host_milliseconds", lambda *calls: 0.3)
    monkeypatch.setattr(joint.timing, "copy_speed", lambda: 4e12)
    monkeypatch.setattr(joint.JointBenchmark, "_inputs", staticmethod(lambda *_: (1, 2)))
    monkeypatch.setattr(joint.timing, "cache_bytes", lambda: 1)
    said = []
    row = joint.JointBenchmark().measure(64, 2, 1, said.append)
    assert row["moda"]["auto"] == 2.0
    assert row["host"]["auto"] == 0.3
    assert row["depth_floor_ms"] == pytest.approx(1e3 * (8 * 131072 + 6 * 65536 + 4 * 4096) / 4e12)
    assert row["sequence"] == {}
    assert row["failed"]["K"] == "out of memory. Tried to"
    assert len(said) == 1


def test_what_depth_costs_is_the_difference_of_two_calls_in_turns(monkeypatch):
    queued = []

    def elapsed(calls, repeats, hidden):
        queued.extend(calls[index % len(calls)]() for index in range(repeats))
        return [{"auto": 9.0, "fast": 7.0}[name] for name in queued[-repeats:]]

    kernels = [
        baselines.SequenceKernel("fast", lambda *_: lambda: "fast"),
        baselines.SequenceKernel("slow", lambda *_: lambda: "slow"),
    ]
    benchmark = joint.JointBenchmark()
    monkeypatch.setattr(joint, "OVER_SEQUENCE", [(16384, 8, 64)])
    monkeypatch.setattr(joint.baselines, "find", lambda _: (kernels, []))
    monkeypatch.setattr(joint.JointBenchmark, "_moda", lambda *_: lambda: "auto")
    monkeypatch.setattr(joint.JointBenchmark, "_inputs", staticmethod(lambda *_: ()))
    monkeypatch.setattr(joint.timing, "host_milliseconds", lambda *calls, **_: 0.1)
    monkeypatch.setattr(joint.timing, "_elapsed", elapsed)
    row = joint_row(16384, 8, 64) | {"moda": {"auto": 1.0, "fused": 2.0}, "sequence": {"slow": 4.0, "fast": 3.0}}
    monkeypatch.setattr(benchmark, "measure", lambda *_: row)
    (shown,) = benchmark.over_sequence(print)["rows"]
    assert (shown["moda"], shown["sequence"]) == ({"auto": 9.0}, {"fast": 7.0})
    assert queued[-6:] == ["auto", "fast"] * 3
    alone = joint_row(16384, 8, 64) | {"sequence": {}}
    monkeypatch.setattr(benchmark, "measure", lambda *_: alone)
    assert benchmark.over_sequence(print)["rows"] == [alone]


def test_tables_show_figures_ratios_and_failures():
    parts = some_results()["parts"]
    shown = tables.render("table2", parts["table2"])
    first = next(line for line in shown.splitlines() if line.startswith("| 4096 | 8 | 64 |"))
    assert first.split(" | ")[3:] == ["10.0", "6.000", "6.500", "0.60", "1.35", "5.000", "+20.0 % |"]
    assert "T=65536, G=8, L=64, flash (PyTorch) failed: out of memory." in shown
    assert "flash-attn-4 was left out: not installed." in shown
    assert "| 16384 | 8 | 64 | cuDNN 5.000 | 8.000 | +3.000 | +60.0 % | 0.500 | +10.0 % | 0.800 |" in tables.render(
        "over-sequence", parts["over-sequence"]
    )
    assert "1.000 ms, 4.10 TB/s (96 %), 32 readers" in tables.render("depth", parts["depth"])
    overlapped = tables.render("overlap", parts["overlap"])
    assert "| 4096 | 8 | 64 | forward | 2.000 | 2.200 | 2.100 | nothing |" in overlapped
    assert "| 4096 | 8 | 64 | backward | 2.000 | 1.900 | 1.800 | 0.200 ms, 10.0 %, 32 SMs |" in overlapped
    assert "96 SMs was left out: no such thing." in overlapped
    assert "**70.0 ms** of depth. By the profiler: 22.0 ms in the depth kernels, 7.5 ms more" in tables.render(
        "stream", parts["stream"]
    )
    assert "8 sequences: 300.0 MB a layer, +500 MB (r² = 1.00000)" in tables.render("memory", parts["memory"])
    assert "| plain PyTorch | 2.000 | 1.0 × | 2128.9 |" in tables.render("ladder", parts["ladder"])


def test_a_row_without_any_baseline_is_still_shown():
    row = joint_row(4096, 8, 64) | {"fa2_triton": {}, "sequence": {}, "moda": {}}
    for name in ("table2", "over-sequence"):
        shown = tables.render(name, {"rows": [row], "left_out": [], "remarks": []})
        assert "| 4096 | 8 | 64 |" in shown
    assert goals.goals({"table2": {"rows": [row]}, "over-sequence": {"rows": [row]}}) == []


def test_goals_are_met_below_or_above_their_limit():
    parts = some_results()["parts"]
    found = {goal.what: goal for goal in goals.goals(parts)}
    assert found["auto ÷ FA2-Triton, T=4096, G=8, L=64"].met
    assert found["auto ÷ FA2-Triton, T=16384, G=8, L=256"].limit == 0.80
    assert found["auto ÷ FA2-Triton, T=16384, G=8, L=256"].floor == pytest.approx((5.0 + 0.5) / 10.0)
    assert not found["auto over the fastest sequence attention, T=65536, G=8, L=64"].met
    assert found["forward, 16384 tokens, G=2"].met
    assert not found["depth work of a 700M step"].met
    assert found["peak ÷ (slots + q, do), 36 layers, 8 sequences"].measured == pytest.approx(11.3 / 9.648)
    fused = copy.deepcopy(parts["table2"])
    fused["rows"][2]["moda"]["fused"] = 12.0
    fused["rows"][2]["sequence"][baselines.FUSED] = 10.0
    found = {goal.what: goal.measured for goal in goals.goals({"table2": fused})}
    assert found["extra of fused over itself without slots, T=16384, G=8, L=64"] == pytest.approx(20)
    assert found["speed of fused ÷ FA2-Triton, T=16384, G=8, L=0"] == 1.0


def test_section_of_the_page_is_replaced_and_nothing_else(tmp_path):
    results, file = some_results(), tmp_path / "docs" / "benchmarks.md"
    file.parent.mkdir()
    file.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\n## After\n")
    drawn = picture.draw(results, tmp_path / "docs" / "kernels.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    for _ in range(2):  # a second time replaces what the first has written
        page.replace(file, results, drawn)
        text = file.read_text()
        assert text.startswith(f"# Before\n\n{BEGIN}\n\n    python scripts/benchmark_kernels.py\n\nOne A GPU")
        assert text.endswith(f"\n\n{END}\n\n## After\n")
        assert "old" not in text
        assert "](kernels.png)" in text
        assert [line for line in text.splitlines() if line.startswith("### ")] == [
            f"### {t}" for t in tables.TITLES.values()
        ]


@pytest.mark.parametrize("text", ["no section", f"{END}\n{BEGIN}", BEGIN * 2 + END])
def test_page_without_its_comments_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(benchmark_kernels, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(session, "run", lambda *_: pytest.fail("measured"))
    assert benchmark_kernels.main(["--docs"]) == 2
    assert "must hold the lines" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == text


def test_page_of_the_repository_can_be_written():
    page.SECTION.check(benchmark_kernels.PAGE)


def test_failed_part_is_noted_and_the_others_are_written(tmp_path, monkeypatch, capsys):
    results = some_results()

    def fails(say):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(timing, "environment", lambda: results["environment"])
    monkeypatch.setattr(depth, "measure", fails)
    monkeypatch.setattr(ladder, "measure", lambda say: results["parts"]["ladder"])
    done = session.run(["depth", "ladder"], tmp_path / "new", "command")
    assert done["failures"] == {"depth": "no luck"}
    assert session.read(session.results_path(tmp_path / "new")) == done
    printed = capsys.readouterr().out
    assert "failed, and the next part goes on: RuntimeError: no luck" in printed
    assert tables.render("ladder", results["parts"]["ladder"]) in printed


def test_time_left_follows_the_pace_so_far():
    assert session.time_left(["depth", "stream"], 0, 0) == session.PARTS["depth"] + session.PARTS["stream"]
    assert (
        session.time_left(["depth"], session.PARTS["table2"], 2 * session.PARTS["table2"]) == 2 * session.PARTS["depth"]
    )


def test_runs_of_one_machine_are_merged_and_of_two_refused():
    first, second = some_results(), some_results()
    first["parts"] = {name: first["parts"][name] for name in ("ladder", "depth")}
    second["parts"] = {"depth": {"copy": 1.0, "rows": []}, "table2": second["parts"]["table2"]}
    second["failures"] = {"ladder": "failed"}
    second["environment"]["date"] = "2026-01-02"
    merged = session.merge([first, second])
    assert list(merged["parts"]) == ["table2", "depth"]
    assert merged["parts"]["depth"]["copy"] == 1.0
    assert merged["failures"] == {"ladder": "failed"}
    assert len(merged["commands"]) == 2
    second["environment"]["device"] = "Another GPU"
    with pytest.raises(ValueError, match="different machines"):
        session.merge([first, second])


def test_earlier_results_are_shown_without_a_gpu(tmp_path):
    session.write(some_results(), tmp_path)
    command = [sys.executable, str(SCRIPT), "--from", str(session.results_path(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "## Table 2 of the paper" in done.stdout


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "cannot be read as JSON"), ("[]", "holds no results"), (None, "cannot be read"), ("newer", "unknown part")],
)
def test_file_that_holds_no_results_is_one_sentence(tmp_path, capsys, content, sentence):
    file = tmp_path / "kernels.json"
    if content == "newer":
        content = json.dumps(some_results() | {"parts": {"tables": {}}})
    if content is not None:
        file.write_text(content)
    assert benchmark_kernels.main(["--from", str(file)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("arguments", [[], ["--tune"], ["--only", "depth"]])
def test_without_a_gpu_the_error_is_one_sentence(arguments, capsys):
    assert benchmark_kernels.main(arguments) == 2
    error = capsys.readouterr().err
    assert "need a CUDA device" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tune", "--only", "table2"],
        ["--tune", "--docs"],
        ["--tune", "--tutorial", "x.py"],
        ["--from", "x", "--only", "depth"],
    ],
    ids=str,
)
def test_an_option_that_would_do_nothing_is_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark_kernels.main(arguments)
    assert "does nothing with" in capsys.readouterr().err


def test_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark_kernels.main(["--only", "depth,table3"])
    assert "'table3' is not a part: choose from table2" in capsys.readouterr().err


def test_error_of_a_layout_compares_gradients_in_that_layout():
    torch.manual_seed(0)
    out, dq, dk, dv = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8), torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    want = (out, dq, dk, dv, *torch.randn(2, 3, *dk.shape))
    assert ladder.error("moda", want, want) == 0
    laid_out = (out, *ladder.lay_out(*want[1:]))
    assert ladder.error("flat", laid_out, want) == 0
    assert ladder.error("flat", (*laid_out[:3], 2 * laid_out[3]), want) == pytest.approx(1)
    # key number time + t * slots + j of the flat axis is slot j of token t
    assert torch.equal(laid_out[2][0, :, 4 + 2 * 3 + 1], want[4][1, 0, 2])


def test_command_in_the_results_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        session, "run", lambda names, out, command, tutorial: commands.append(command) or some_results()
    )
    assert benchmark_kernels.main(["--out", str(tmp_path)]) == 0
    tutorial = str(tmp_path / "06-fused-attention.py")
    assert benchmark_kernels.main(["--only", "depth,table2", "--tutorial", tutorial, "--out", str(tmp_path)]) == 0
    assert commands == [
        "python scripts/benchmark_kernels.py",
        "python scripts/benchmark_kernels.py --only table2,depth --tutorial 06-fused-attention.py",
    ]
