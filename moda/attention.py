"""The public operator: joint attention over a sequence and over given depth slots, with dense gradients for all inputs.

In: queries, keys, values and, optionally, depth keys and values. Out: the attention output, and its log-sum-exp on
request. Arguments are checked here; the arithmetic is a backend's (`moda.joined`, `moda.fused` or `moda.reference`).
"""

from __future__ import annotations

import sys
from numbers import Rational, Real
from typing import Literal, overload

import torch
from torch import Tensor

from moda import operators
from moda.backends import choose_backend, reasons_against
from moda.first_order import refuse_tangents

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of all but cu_seqlens
DTYPE_NAMES = "torch.bfloat16, torch.float16, torch.float32 or torch.float64"
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal grouped-query attention where a token also reads its own depth slots, in one softmax (paper, section 3).

    Args:
        q: queries [batch, time, query_heads, head_dim]; bf16, fp16, fp32 or fp64, and all others with it.
        k, v: keys and values [batch, time, kv_heads, head_dim]; query head h reads kv head
            h // (query_heads / kv_heads). Their time may be longer than that of q: the queries are then those of the
            last tokens (decoding with a cache).
        depth_k, depth_v: depth keys and values [slots, batch, time, kv_heads, head_dim], read at the query's own
            position only. Both or neither; zero slots are allowed.
        scale: factor of the scores; head_dim ** -0.5 when None.
        cu_seqlens: cumulative document lengths over the flattened batch * time tokens, integers from 0 to batch * time;
            a token sees its own document only. The end of a row ends a document too.
        backend: "joined" (a vendor's sequence kernel and Triton kernels over the slots: CUDA, bf16 or fp16), "fused"
            (Triton over both: CUDA, fp32 too), "reference" (plain PyTorch, anywhere), or "auto", the first of these
            that is exact for the call; `explain` says which and why.
        return_lse: return the log-sum-exp of the joint scores too.

    Returns:
        out [batch, time, query_heads, head_dim] in the dtype of q; with `return_lse`, (out, lse) with lse in fp32,
        natural logarithm, [batch, time, query_heads], not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, scale is not finite in fp32, or the backend does not
            exist or cannot do this.
        TypeError: an argument is no tensor, scale no number, or backend no string.
        RuntimeError: an input carries a tangent: there are no forward-mode derivatives.
    """
    check_sequence(q, k, v, cu_seqlens)
    _check_depth(q, k, depth_k, depth_v)
    check_backend(backend)
    refuse_tangents(q, k, v, depth_k, depth_v)
    out, lse = operators.attention(q, k, v, depth_k, depth_v, scale_of(q, scale), cu_seqlens, backend)
    return (out, lse.detach().float()) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor | None = None,
    depth_v: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> str:
    """Which backend a call of `attention` with these arguments takes, with which kernels, and why not a faster one.

    Nothing is computed; `scale` and `return_lse` change nothing. Raises what `attention` would for the same arguments.
    """
    check_sequence(q, k, v, cu_seqlens)
    _check_depth(q, k, depth_k, depth_v)
    check_backend(backend)
    scale_of(q, scale)
    refuse_tangents(q, k, v, depth_k, depth_v)
    operators.check_documents(q, cu_seqlens)
    chosen = choose_backend(backend, q, k, cu_seqlens)
    lines = [f"{chosen.__name__.rpartition('.')[2]}: {chosen.explain(q, k, cu_seqlens)}"]
    return "\n".join(lines + (reasons_against(q, k, cu_seqlens) if backend == "auto" else []))


def check_sequence(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError, with the shapes in it, unless q, k, v and cu_seqlens fit together; TypeError for no tensors.

    The values of cu_seqlens are left to `operators.check_documents`.
    """
    check_tensors(q=q, k=k, v=v)
    if cu_seqlens is not None:
        check_tensors(cu_seqlens=cu_seqlens)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q, k and v must have the axes [batch, time, heads, head_dim], got {shapes}.")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[1] > k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k and v must have one shape, batch and head_dim of q, and at least as many tokens as q, got {shapes}."
        )
    if q.numel() == 0 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"The query heads must be a positive multiple of the kv heads, no axis empty, got {shapes}.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:  # narrower ones have scales, which nobody gives here
        raise ValueError(
            f"q, k and v must have one dtype, {DTYPE_NAMES}, got {q.dtype}, {k.dtype}, {v.dtype}; {shapes}: convert "
            "them with to()."
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}; {shapes}.")
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in _INTEGERS
    ):
        raise ValueError(
            "cu_seqlens must hold integers [documents + 1] from 0 to batch * time, "
            f"got shape {tuple(cu_seqlens.shape)}, dtype {cu_seqlens.dtype}."
        )
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"cu_seqlens needs as many queries as keys, got {shapes}.")
    if cu_seqlens is not None and cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be on the device of q, {q.device}, got {tuple(cu_seqlens.shape)} on {cu_seqlens.device}."
        )


def check_tensors(**arguments: object) -> None:
    """Raise TypeError, with the argument's name in it, for what is no tensor, ValueError for one that is not dense."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            how = "torch.stack, if it holds tensors, or " if isinstance(argument, list | tuple) else ""
            kind = type(argument).__name__
            raise TypeError(f"{name} must be a tensor, got {kind}: convert it with {how}torch.as_tensor.")
        if argument.layout is not torch.strided or argument.is_nested:
            raise ValueError(f"{name} must be a dense tensor, got layout {argument.layout}: convert or pad it.")


def check_backend(backend: object) -> None:
    """Raise TypeError unless backend is a string: the operator's own error would speak of schemas."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name such as 'auto', got {type(backend).__name__}.")


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the scores, head_dim ** -0.5 for None.

    Raises TypeError for what is no real number, ValueError for one that no float, or no fp32, holds; code
    that is being compiled leaves the latter to the operator.
    """
    if scale is None:
        return q.shape[-1] ** -0.5
    if not isinstance(scale, (float, int, torch.SymFloat, torch.SymInt, Real)):
        raise TypeError(
            f"scale must be a number, as it gets no gradient, got {type(scale).__name__}: to learn a scale, multiply q."
        )
    if isinstance(scale, Rational) and abs(scale) > sys.float_info.max:
        raise ValueError("scale is a number that no float can hold: use one of the size of head_dim ** -0.5.")
    if not torch.compiler.is_compiling():
        operators.check_scale(scale)
        scale = float(scale)  # Triton takes no other number
    return scale


def _check_depth(q: Tensor, k: Tensor, depth_k: Tensor | None, depth_v: Tensor | None) -> None:
    if depth_k is None or depth_v is None:
        if depth_k is not depth_v:
            given = {name: x for name, x in (("depth_k", depth_k), ("depth_v", depth_v)) if x is not None}
            check_tensors(**given)
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
            raise ValueError(f"depth_k and depth_v are given together or not at all, got {shapes} alone.")
        return
    check_tensors(depth_k=depth_k, depth_v=depth_v)
    if depth_k.dim() != 5 or depth_k.shape != depth_v.shape or depth_k.shape[1:] != (*q.shape[:2], *k.shape[2:]):
        raise ValueError(
            "depth_k and depth_v must both be [slots, batch, time, kv_heads, head_dim], with batch and time of q and "
            f"heads of k, got depth_k {tuple(depth_k.shape)}, depth_v {tuple(depth_v.shape)}, q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}."
        )
    if not depth_k.dtype == depth_v.dtype == k.dtype or not depth_k.device == depth_v.device == k.device:
        raise ValueError(
            "depth_k and depth_v must have the dtype and device of k, "
            f"got depth_k {tuple(depth_k.shape)} {depth_k.dtype} {depth_k.device}, depth_v {tuple(depth_v.shape)} "
            f"{depth_v.dtype} {depth_v.device}, k {tuple(k.shape)} {k.dtype} {k.device}."
        )
