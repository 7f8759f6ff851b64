"""Causal attention over a sequence alone, as others have written it: vendor kernels, and FA2 in Triton.

Each kernel takes q [batch, time, query_heads, head_dim], k, v [batch, time, kv_heads, head_dim] and do like q, and
gives a function that runs forward and backward once and returns (o, dq, dk, dv). Packages are looked for where they are
installed, Triton's tutorial in the file that is named; nothing of them is kept here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import moda
from moda import reference

aten = torch.ops.aten
Run = Callable[[], tuple[Tensor, ...]]
AUTO, FUSED = "moda auto, no slots", "moda fused, no slots"
MAX_ERROR = 2e-2  # relative norm: a kernel beyond it computes something else


@dataclass(frozen=True)
class SequenceKernel:
    """A kernel with its name in tables, whether it is FA2 in Triton (the paper's baseline), and what is noteworthy."""

    name: str
    prepare: Callable[[Tensor, Tensor, Tensor, Tensor], Run]
    is_fa2_triton: bool = False
    remark: str = ""


def through_autograd(function: Callable[..., Tensor], inputs: Sequence[Tensor], do: Tensor) -> Run:
    """Forward and backward of `function(*inputs)` through autograd: (o, *gradients of all inputs)."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, do)

    return run


def find(tutorial: Path | None) -> tuple[list[SequenceKernel], list[str]]:
    """The kernels that run here and are right on a small case, and a sentence for each one left out."""
    candidates: list[tuple[str, Callable[[], SequenceKernel]]] = [
        (AUTO, lambda: SequenceKernel(AUTO, partial(_moda, "auto"))),
        (FUSED, lambda: SequenceKernel(FUSED, partial(_moda, "fused"))),
        ("cuDNN", lambda: SequenceKernel("cuDNN", _cudnn)),
        ("flash (PyTorch)", lambda: SequenceKernel("flash (PyTorch)", _flash)),
        ("flash-attn-4", _flash_attn_4),
        ("flash-linear-attention", _flash_linear_attention),
        ("Triton tutorial", lambda: _triton_tutorial(tutorial)),
    ]
    found, left_out = [], []
    for name, make in candidates:
        try:
            kernel = make()
            error = check(kernel, "cuda")
            if not error <= MAX_ERROR:
                raise ValueError(f"its results are wrong on a small case, relative error {error:.2g}")
            found.append(kernel)
        except Exception as error:  # whatever is wrong with one package must not stop the others
            left_out.append(f"{name} was left out: {one_line(error)}.")
    return found, left_out


def check(kernel: SequenceKernel, device: str) -> float:
    """Largest relative error of o, dq, dk, dv (norms) against the definition, on a small case in bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(1, 512, heads, 64, device=device, generator=generator).bfloat16()

    q, k, v, do = random(8), random(4), random(4), random(8)
    got = kernel.prepare(q, k, v, do)()
    want = through_autograd(lambda *x: reference.definition(*x)[0], [x.double() for x in (q, k, v)], do.double())()
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))


def one_line(error: Exception) -> str:
    """First line of what an error says, without a full stop."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(". ")


def _moda(backend: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Run:
    return through_autograd(lambda *x: moda.attention(*x, backend=backend), (q, k, v), do)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Run:
    time, scale = q.shape[1], q.shape[3] ** -0.5
    query, key, value, gradient = (x.transpose(1, 2) for x in (q, k, v, do))

    def run() -> tuple[Tensor, ...]:
        o, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=scale
        )
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            gradient, query, key, value, o, lse, seed, offset, None, None, None, time, time, 0.0, True, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in (o, *gradients))

    return run


def _flash(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Run:
    time, scale = q.shape[1], q.shape[3] ** -0.5
    query, key, value, gradient = (x.transpose(1, 2) for x in (q, k, v, do))

    def run() -> tuple[Tensor, ...]:
        o, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, False, scale=scale
        )
        gradients = aten._scaled_dot_product_flash_attention_backward(
            gradient, query, key, value, o, lse, None, None, time, time, 0.0, True, seed, offset, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in (o, *gradients))

    return run


def _flash_attn_4() -> SequenceKernel:
    interface = _import("flash_attn.cute", "flash-attn-4")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = interface.flash_attn_func(q, k, v, causal=True)
        return result[0] if isinstance(result, tuple) else result

    return SequenceKernel("flash-attn-4", lambda q, k, v, do: through_autograd(attention, (q, k, v), do))


def _flash_linear_attention() -> SequenceKernel:
    attention = _import("fla.ops.attn", "flash-linear-attention").parallel_attn
    return SequenceKernel(
        "flash-linear-attention", lambda q, k, v, do: through_autograd(attention, (q, k, v), do), is_fa2_triton=True
    )


def _triton_tutorial(path: Path | None) -> SequenceKernel:
    if path is None:
        raise ValueError("no file was given with --tutorial (python/tutorials/06-fused-attention.py of Triton)")
    spec = importlib.util.spec_from_file_location("triton_tutorial_fused_attention", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"--tutorial {path} is not a Python file")
    tutorial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorial)
    # Its warp specialisation is for Blackwell; it is on unless it is turned off, in the versions that have it.
    options = (False,) if "warp_specialize" in inspect.signature(tutorial._attention.forward).parameters else ()
    _tune_once(tutorial, options)

    def prepare(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Run:
        group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5

        def heads_first(x: Tensor, repeats: int) -> Tensor:
            return x.half().repeat_interleave(repeats, 2).transpose(1, 2).contiguous()

        leaves = [heads_first(x, repeats).requires_grad_() for x, repeats in ((q, 1), (k, group), (v, group))]
        gradient = heads_first(do, 1)

        def run() -> tuple[Tensor, ...]:
            out = tutorial.attention(*leaves, True, scale, *options)
            dq, dk, dv = (x.transpose(1, 2) for x in torch.autograd.grad(out, leaves, gradient))
            return out.transpose(1, 2), dq, *(x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))

        return run

    return SequenceKernel(
        "Triton tutorial",
        prepare,
        is_fa2_triton=True,
        remark="in fp16, which it is written for; its kv heads are expanded before the timing",
    )


def _tune_once(tutorial: ModuleType, options: tuple[bool, ...]) -> None:
    """Let the tutorial tune itself on one long sequence, and keep what it finds: it would tune anew at every length."""
    from triton.runtime.autotuner import Autotuner

    tuners = [member for member in vars(tutorial).values() if isinstance(member, Autotuner)]
    for tuner in tuners:  # its tiles of 64 queries are never the fastest at these lengths, and take half the time
        tuner.configs = [c for c in tuner.configs if c.kwargs.get("BLOCK_M", 128) >= 128] or tuner.configs
    q = torch.randn(1, 16, 8192, 64, device="cuda", dtype=torch.float16)
    tutorial.attention(q, q, q, True, 0.125, *options)
    for tuner in tuners:
        if best := getattr(tuner, "best_config", None):
            tuner.configs = [best]


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {package} is not installed ({error})") from None
