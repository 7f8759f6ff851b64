"""The parts of `scripts/benchmark_kernels.py` on small sizes: each runs, and what it times is what it says."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from moda import reference
from scripts.kernel_benchmarks import baselines, depth, joint, ladder, overlap, session, stream, timing


@pytest.mark.parametrize("kernel", depth.KERNELS)
def test_depth_kernels_run_at_every_group(kernel):
    for group in (2, 8, 32):
        assert 0 < timing.milliseconds(depth.prepare(kernel, depth.Problem(256, group, slots=3)), most=5) < 50


def test_a_copy_has_a_plausible_speed():
    assert 1e11 < timing.copy_speed() < 2e13


def test_both_parts_at_the_same_time_give_what_they_give_in_turn():
    sides, failed = overlap._sides()
    assert {"two streams", "high priority"} <= sides.keys(), failed
    for sequence, of_slots in overlap.prepare(512, 2, 3).values():
        want = [x.clone() for x in overlap._in_turn(sequence, of_slots)]
        for name, side in sides.items():
            got = overlap._at_once(sequence, of_slots, *side)
            torch.testing.assert_close(got, tuple(want), msg=lambda text, name=name: f"{name}: {text}")


def test_attempts_to_overlap_are_timed_forward_and_backward():
    (row,) = overlap.measure(lambda _: None, cases=((512, 2, 3),))["rows"]
    assert all(0 < ms < 50 for direction in ("forward", "backward") for ms in row[direction].values())


def test_sequence_kernels_that_are_found_are_timed():
    kernels, left_out = baselines.find(None)
    assert {"cuDNN", "flash (PyTorch)", baselines.AUTO} <= {kernel.name for kernel in kernels}, left_out
    row = joint.JointBenchmark().measure(512, 2, 3, lambda _: None)
    assert not row["failed"]
    assert all(0 < ms < 50 for column in ("moda", "sequence") for ms in row[column].values())


@pytest.mark.parametrize("step", ladder.STEPS)
def test_layouts_of_the_ladder_equal_the_definition_forward_and_backward(step):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    q, do, k, v = random(1, 256, 16, 64), random(1, 256, 16, 64), random(1, 256, 2, 64), random(1, 256, 2, 64)
    inputs = [q, k, v, random(4, *k.shape), random(4, *k.shape)]
    function, laid_out = ladder.prepare(step, inputs, torch.compile(flex_attention, dynamic=False), ladder.CHUNK)
    got = baselines.through_autograd(function, laid_out, do)()
    doubles = [x.double() for x in inputs]
    want = baselines.through_autograd(lambda *x: reference.definition(*x)[0], doubles, do.double())()
    assert ladder.error(step, got, want) < ladder.MAX_ERROR


def test_profile_of_a_stack_finds_the_depth_kernels():
    stack = stream.Stack(stream.Shape(3, 1, 256, 4, 2, 64), shared=False)
    rows = stream.difference(*(stream._profile(stack, with_depth) for with_depth in (True, False)))
    assert sum(row["calls"] for row in rows if row["depth"]) >= 6
    assert all(row["ms"] > 0 for row in rows if row["depth"])


def test_peak_memory_covers_slots_and_retained_tensors():
    shape = stream.Shape(layers=6, batch=1, time=4096)
    peak, plain = (stream._peak(shape, with_depth) for with_depth in (True, False))
    assert peak > shape.slot_bytes + shape.retained_bytes / 2
    assert peak > plain


def test_a_session_writes_what_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "PROBLEMS", (depth.Problem(256, 2, slots=3),))
    results = session.run(["depth"], tmp_path, "command")
    assert not results["failures"]
    assert session.read(session.results_path(tmp_path)) == results
    assert results["environment"]["device"] == torch.cuda.get_device_name()
