"""Attempts to take less than the two parts of `joined` take one after the other: both at the same time.

Kernels over the sequence are held by arithmetic, those over the slots by memory, so that each leaves idle what the
other needs. Tried with the cases whose goal lies below what both take in turn, forward and backward apart; the depth
part has an output, lse and dq of its own, and what merging them would cost is left out, in the attempts' favour.

in turn          as `moda.joined` runs them
two streams      the depth kernel in a stream of its own
high priority    in one whose blocks are the first to get a place that falls free
N SMs            in a green context, CUDA's partition of multiprocessors: it keeps to N of them
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.kernel_benchmarks import baselines, paper, timing

CASES = (
    (4096, 8, 64),
    (8192, 8, 64),
    (16384, 2, 64),
    (16384, 4, 64),
    (16384, 8, 64),
    (16384, 8, 128),
    (16384, 8, 256),
)
SHARES = (32, 48, 64, 96)  # multiprocessors of a green context; an H200 has 132
IN_TURN = "in turn"
BUDGET_MS, MOST = 1500, 20  # of a case's measurement
Call = Callable[[], tuple[Tensor, ...]]


def measure(say: Callable[[str], None], cases: tuple[tuple[int, int, int], ...] = CASES) -> dict[str, Any]:
    """Medians in ms of every attempt, in turns, by case and direction; `failed` says what a machine cannot do."""
    sides, failed = _sides()
    rows = []
    for time, group, slots in cases:
        row: dict[str, Any] = {"time": time, "group": group, "slots": slots}
        for direction, (sequence, depth) in prepare(time, group, slots).items():
            attempts: dict[str, Call] = {IN_TURN: partial(_in_turn, sequence, depth)}
            attempts |= {name: partial(_at_once, sequence, depth, *side) for name, side in sides.items()}
            taken = timing.milliseconds_in_turns(*attempts.values(), budget_ms=BUDGET_MS, most=MOST)
            row[direction] = dict(zip(attempts, taken, strict=True))
        rows.append(row)
        best = {name: f"{min(row[name].values()):.3f} of {row[name][IN_TURN]:.3f}" for name in ("forward", "backward")}
        say(f"T={time} G={group} L={slots}, fastest of in turn, ms: {best}")
        timing.free()
    return {"rows": rows, "failed": failed}


def prepare(time: int, group: int, slots: int) -> dict[str, tuple[Call, Call]]:
    """By direction, the kernels over the sequence and the depth kernel of `moda.joined`, which share no output.

    B = 1, bf16, 8 kv heads of 64, on the present CUDA device. Each returns what it made, except what it adds to.
    """
    from moda import sequence
    from moda.kernels import depth

    generator = torch.Generator("cuda").manual_seed(0)
    random = partial(timing.random, generator)
    kv_shape = (1, time, paper.KV_HEADS, paper.HEAD_DIM)
    q, do = (random(1, time, paper.KV_HEADS * group, paper.HEAD_DIM) for _ in range(2))
    k, v = random(*kv_shape), random(*kv_shape)
    keys, values = random(slots, *kv_shape), random(slots, *kv_shape)
    scale = paper.HEAD_DIM**-0.5
    o, lse = sequence.forward(q, k, v, scale, None)
    depth.depth_forward(q, keys, values, o, lse, scale)
    own_o, own_lse, own_dq = o.clone(), lse.clone(), torch.zeros_like(q)
    delta, dk, dv = lse.new_empty(lse.shape), torch.empty_like(keys), torch.empty_like(values)

    def depth_forward() -> tuple[Tensor, ...]:
        depth.depth_forward(q, keys, values, own_o, own_lse, scale)
        return ()

    def depth_backward() -> tuple[Tensor, ...]:
        depth.depth_backward_query(do, q, keys, values, lse, delta, own_dq, scale, o=o, dk=dk, dv=dv)
        return dk, dv

    return {
        "forward": (lambda: sequence.forward(q, k, v, scale, None), depth_forward),
        "backward": (lambda: sequence.backward(do, q, k, v, o, lse, scale, None), depth_backward),
    }


def _sides() -> tuple[dict[str, tuple[torch.cuda.Stream, Any]], dict[str, str]]:
    """Where the depth kernel may run: (stream, context or None) by name; and why others are not there."""
    sides: dict[str, tuple[torch.cuda.Stream, Any]] = {
        "two streams": (torch.cuda.Stream(), None),
        "high priority": (torch.cuda.Stream(priority=-1), None),
    }
    failed = {}
    for count in SHARES:
        name = f"{count} SMs"
        try:
            from torch.cuda.green_contexts import GreenContext

            context = GreenContext.create(num_sms=count, device_id=torch.cuda.current_device())
            with _partition(context):
                torch.zeros(1, device="cuda")
            sides[name] = torch.cuda.Stream(), context
        except Exception as error:  # an older driver or PyTorch: the other attempts go on
            failed[name] = baselines.one_line(error)
    return sides, failed


@contextlib.contextmanager
def _partition(context: Any) -> Iterator[None]:
    """Run on the multiprocessors of a green context, after and before the present stream's other work."""
    if context is None:
        yield
        return
    context.set_context()
    try:
        yield
    finally:
        context.pop_context()


def _in_turn(sequence: Call, depth: Call) -> tuple[Tensor, ...]:
    return *sequence(), *depth()


def _at_once(sequence: Call, depth: Call, stream: torch.cuda.Stream, context: Any) -> tuple[Tensor, ...]:
    present = torch.cuda.current_stream()
    stream.wait_stream(present)
    with torch.cuda.stream(stream), _partition(context):
        of_slots = depth()
    of_sequence = sequence()
    present.wait_stream(stream)
    return *of_sequence, *of_slots
