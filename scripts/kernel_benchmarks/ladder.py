"""The paper's Table 7: layouts of the depth keys and values, step by step, forward and backward.

    naive        the definition in plain PyTorch
    flat         slots as one axis of T*L rows behind the sequence, token-major; every query looks at all of it, masked
    chunk-aware  the same axis; a chunk of C queries looks at its own C*L rows
    group-aware  the G queries of a kv head are rows of a chunk, which then holds C/G tokens and looks at C/G*L rows
    moda         `moda.attention`: slots as they are stored, no masked-out work

These are steps of an argument, not a product. The three layouts between run in FlexAttention, whose block masks say
what a chunk of queries looks at and whose mask function decides the rest; slots are laid out before the timing, and
their gradients stay in that layout, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import moda
from moda import reference
from scripts.kernel_benchmarks import baselines, paper, timing

STEPS = ("naive", "flat", "chunk-aware", "group-aware", "moda")
CHUNK = 128  # rows of queries, and of keys, in a block of the mask
MAX_ERROR = 3e-2  # relative norm, against 1e-2 of plain PyTorch in bf16: beyond it a layout is wrong

Attention = Callable[..., Any]


def visited(step: str, time: int, group: int, slots: int, chunk: int) -> Tensor:
    """Which blocks of keys each block of query rows looks at, bool [query blocks, key blocks]; keys: sequence, depth.

    `chunk` rows a block; `time` is a multiple of it, so that no block holds both sequence and depth.
    """
    tokens = chunk // group if step == "group-aware" else chunk  # of a block of query rows
    if time % chunk or chunk % group:
        raise ValueError(f"time={time} must be a multiple of chunk={chunk}, and that of group={group}.")
    first = torch.arange(0, time, tokens)[:, None]  # token of the first row of a block
    sequence = torch.arange(0, time, chunk)[None] < first + tokens
    if step == "flat":
        depth = torch.ones(time // tokens, time * slots // chunk, dtype=torch.bool)
    else:
        start = torch.arange(0, time * slots, chunk)[None]
        depth = (start < (first + tokens) * slots) & (start + chunk > first * slots)
    return torch.cat((sequence, depth), 1)


def block_mask(step: str, time: int, group: int, slots: int, chunk: int, device: str) -> BlockMask:
    """FlexAttention's form of `visited`, with the rule for single pairs of query row and key."""
    rows_a_token = group if step == "group-aware" else 1

    def allowed(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        token = row // rows_a_token
        return torch.where(key < time, key <= token, (key - time) // slots == token)

    looks = visited(step, time, group, slots, chunk)
    tokens = chunk // rows_a_token
    first, last = torch.arange(0, time, tokens)[:, None], torch.arange(chunk - 1, time, chunk)[None]
    whole = torch.zeros_like(looks)
    whole[:, : time // chunk] = last <= first  # below the diagonal nothing is masked
    masked, full = (_as_lists(blocks.to(device)) for blocks in (looks & ~whole, whole))
    return BlockMask.from_kv_blocks(*masked, *full, BLOCK_SIZE=chunk, mask_mod=allowed)


def _as_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of true blocks of each row, and the indices of all, true ones first: [1, 1, rows(, columns)], int32."""
    counts = blocks.sum(1, dtype=torch.int32)
    order = torch.argsort((~blocks).to(torch.int8), dim=1, stable=True).to(torch.int32)
    return counts[None, None], order[None, None].contiguous()


def lay_out(q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q as it is; keys and values [batch, kv_heads, time + time * slots, head_dim]: the sequence, then the tokens'."""

    def joined(sequence: Tensor, depth: Tensor) -> Tensor:
        tokens = depth.permute(1, 3, 2, 0, 4).flatten(2, 3)
        return torch.cat((sequence.transpose(1, 2), tokens), 2).contiguous()

    return q, joined(k, depth_k), joined(v, depth_v)


def flat_attention(step: str, attention: Attention, mask: BlockMask, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of a layout, by FlexAttention, compiled or not. Returns [batch, time, query_heads, head_dim]."""
    if step == "group-aware":
        kv_heads = keys.shape[1]
        rows = q.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)  # [batch, kv_heads, time * group, head_dim]
        out = attention(rows, keys, values, block_mask=mask)
        return out.unflatten(2, (q.shape[1], -1)).transpose(1, 2).flatten(2, 3)
    return attention(q.transpose(1, 2), keys, values, block_mask=mask, enable_gqa=True).transpose(1, 2)


def prepare(step: str, inputs: list[Tensor], attention: Attention, chunk: int) -> tuple[Attention, tuple[Tensor, ...]]:
    """A step's function and its inputs in the step's layout; `inputs` are those of `moda.attention`."""
    if step == "naive":
        return lambda *x: reference.definition(*x)[0], tuple(inputs)
    if step == "moda":
        return lambda *x: moda.attention(*x), tuple(inputs)
    q, k, *_, depth_v = inputs
    mask = block_mask(step, q.shape[1], q.shape[2] // k.shape[2], len(depth_v), chunk, q.device.type)
    return lambda *x: flat_attention(step, attention, mask, *x), lay_out(*inputs)


def error(step: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Largest relative error (norms) of the output and gradients of a step, against the definition in its layout."""
    if step not in ("naive", "moda"):
        want = (want[0], *lay_out(*want[1:]))
    return max(((g.to(w.dtype) - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Every step at the shape of Table 7, checked against the definition in fp32 and timed; B = 1, bf16."""
    time, group, slots = paper.TABLE_7_TIME, paper.TABLE_7_GROUP, paper.TABLE_7_SLOTS
    random = partial(timing.random, torch.Generator("cuda").manual_seed(0))
    q, do = (random(1, time, group * paper.KV_HEADS, paper.HEAD_DIM) for _ in range(2))
    k, v = (random(1, time, paper.KV_HEADS, paper.HEAD_DIM) for _ in range(2))
    inputs = [q, k, v, *(random(slots, *k.shape) for _ in range(2))]
    want = baselines.through_autograd(lambda *x: reference.definition(*x)[0], [x.float() for x in inputs], do.float())()
    compiled = torch.compile(flex_attention, dynamic=False)
    rows: list[dict[str, Any]] = []
    for step in STEPS:
        row: dict[str, Any] = {"step": step}
        try:
            function, laid_out = prepare(step, inputs, compiled, CHUNK)
            run = baselines.through_autograd(function, laid_out, do)
            row["error"] = error(step, run(), want)
            if not row["error"] <= MAX_ERROR:
                raise ValueError(f"its results are wrong, relative error {row['error']:.2g}")
            row["ms"] = timing.milliseconds(run)
            say(f"{step}: {row['ms']:.3f} ms")
            del run, function, laid_out
        except Exception as problem:  # one layout that cannot run must not hide the others
            row["failed"] = baselines.one_line(problem)
            say(f"{step} failed: {row['failed']}")
        timing.free()
        rows.append(row)
    return {"rows": rows}
