"""The depth part of the attention as Triton kernels: forward, backward to the queries, backward to the slots.

Registered operators that write to their arguments: no autograd, no allocation. They do what the functions of the same
names in `moda.reference` do. Shapes are fixed by the callers, so that what does not fit is an assertion.

Layout. Tokens are contiguous [batch, time, heads, head_dim]; slots are slices of buffers [slots, batch, time, heads,
head_dim] whose first axis may have any stride. lse is fp32, or of fp32 inputs also fp64, [batch, time, query_heads]
with any strides, so that a sequence kernel's own buffer serves, transposed, in place. delta (fp32) and what readers
leave of lse are contiguous in a token. Readers' queries and gradients are found by their addresses, on the device.
dtypes: bf16, fp16, fp32, one for all but statistics; sums run in fp32 registers in a fixed order, so that the same
inputs give the same bits.

A configuration is looked up, never measured (`configuration`); the kernels are in `depth_query` and `depth_slots`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor

from moda.kernels import MAX_GROUP, depth_query, depth_slots

ALIGNMENT = 16  # bytes; what a reader's tensors start at a multiple of
MAX_SLOT_BLOCK = 16  # slots that a program of the pull holds: rows of one tensor-core product


class Configuration(NamedTuple):
    """How a kernel is launched."""

    tensor: int  # 1: tensor-core products, 0: plain vector arithmetic
    block: int  # rows a program (vector); slots, or queries of readers, a product (tensor)
    warps: int
    stages: int  # loads in flight, in iterations
    rows: int = 1  # rows a product (tensor, backward to the queries)


# By kernel, the first line that fits: largest group, largest head_dim (padded to a power of two), configuration. The
# lines for groups 2, 8 and 32 of head_dim 64, and 2 of 128, and of the gradients for 4 and 16 too, are the fastest of
# those timed on an H200. Vectors are slow for a group of 4 (measured: 3.0 ms over 64 slots of 16384 tokens, where
# tensor cores need 1.7 for a group of 8).
HALF: dict[str, list[tuple[int, int, Configuration]]] = {
    "forward": [
        (4, 32, Configuration(0, 32, 4, 3)),
        (2, 64, Configuration(0, 32, 4, 3)),
        (8, 64, Configuration(1, 32, 1, 2)),
        (4, 128, Configuration(0, 8, 2, 3)),
        (32, 64, Configuration(1, 16, 1, 2)),
        (32, 128, Configuration(1, 32, 4, 2)),
        (MAX_GROUP, 128, Configuration(1, 32, 8, 2)),
    ],
    "query": [
        (4, 32, Configuration(0, 32, 4, 3)),
        (2, 64, Configuration(0, 16, 4, 4)),
        (8, 64, Configuration(1, 16, 1, 2)),
        (4, 128, Configuration(0, 8, 4, 4)),
        (32, 64, Configuration(1, 16, 2, 3)),
        (32, 128, Configuration(1, 32, 4, 2)),
        (MAX_GROUP, 128, Configuration(1, 32, 8, 2)),
    ],
    "gradients": [
        (4, 32, Configuration(0, 32, 4, 3)),
        (2, 64, Configuration(1, 8, 4, 3, rows=8)),
        (4, 64, Configuration(1, 8, 4, 3, rows=4)),
        (16, 64, Configuration(1, 8, 1, 3, rows=2)),
        (32, 64, Configuration(1, 16, 1, 4)),
        (4, 128, Configuration(0, 8, 4, 4)),
        (32, 128, Configuration(1, 32, 4, 2)),
        (MAX_GROUP, 128, Configuration(1, 32, 8, 2)),
    ],
    "slots": [  # of one layer
        (4, 64, Configuration(0, 8, 2, 3)),
        (8, 128, Configuration(1, 16, 1, 2)),
        (32, 64, Configuration(1, 64, 1, 2)),
        (MAX_GROUP, 64, Configuration(1, 32, 2, 3)),
        (MAX_GROUP, 128, Configuration(1, 32, 4, 2)),
    ],
    "block": [  # slots of several layers
        (8, 128, Configuration(1, 16, 1, 2)),
        (MAX_GROUP, 64, Configuration(1, 32, 2, 3)),
        (MAX_GROUP, 128, Configuration(1, 32, 4, 2)),
    ],
}
# fp32 has no tensor-core product of full precision: products are plain arithmetic, where vectors would not fit.
FULL: dict[str, list[tuple[int, int, Configuration]]] = {
    kernel: [
        (4, 64, Configuration(0, 8, 4, 2)),
        (4, 128, Configuration(0, 4, 4, 2)),
        (16, 64, Configuration(1, 16, 4, 1)),
        (MAX_GROUP, 128, Configuration(1, 16, 8, 1)),
    ]
    for kernel in ("forward", "query", "gradients")
}
FULL["slots"] = FULL["block"] = [
    (4, 64, Configuration(0, 8, 4, 1)),
    (4, 128, Configuration(0, 4, 4, 1)),
    (MAX_GROUP, 128, Configuration(1, 16, 4, 1)),
]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the fused kernels store lse in, for inputs of a dtype; see `moda.kernels.precision`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


@cache
def configuration(kernel: str, head_dim: int, group: int, dtype: torch.dtype) -> Configuration:
    """How to launch a kernel for a shape and dtype: "forward", "query", "gradients" (of queries and slots), or, pulled,
    "slots" and "block"."""
    table = FULL if dtype == torch.float32 else HALF
    return next(config for groups, dims, config in table[kernel] if group <= groups and head_dim <= dims)


def _watched() -> bool:
    """Whether a tracer, a mode (fake tensors, a counter of operations) or the like wants to see operators."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _registered(*mutates_args: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as an operator of its name that writes to some of its arguments.

    The operator has no default values, the returned function fills them in: a dispatcher leaves defaults out, and torch
    2.11 then does not find what the operator writes to. Where nobody watches operators the function is called without
    one, which would take the host longer than the launch of its kernel.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        schema = torch.library.infer_schema(function, mutates_args=mutates_args).replace("=None", "")
        operator = torch.library.custom_op(
            f"moda::{function.__name__}", function, mutates_args=mutates_args, schema=schema
        )

        @wraps(function)
        def call(first: Tensor, *args: object, **kwargs: object) -> None:
            if type(first) is Tensor and first.device.type != "meta" and not _watched():
                function(first, *args, **kwargs)
                return
            bound = signature.bind(first, *args, **kwargs)
            bound.apply_defaults()
            operator(*bound.args)

        return call

    return register


@_registered("o", "lse")
def depth_forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    config: Sequence[int] | None = None,
) -> None:
    """Carry the softmax state (o, lse) on over the slots, in place.

    q, o [batch, time, query_heads, head_dim]; keys, values [slots, batch, time, kv_heads, head_dim]; lse as above.
    """
    rows, group = _check(q, keys, values, lse, o)
    slots, _, time, kv_heads, head_dim = keys.shape
    if slots == 0:
        return
    launch = _launch(config, "forward", head_dim, group, q.dtype)
    assert launch.rows == 1
    kernel, programs, padded = _by_row(launch, depth_query.forward_vector, depth_query.forward_tensor, rows, group)
    with torch.cuda.device_of(q):
        kernel[(programs,)](
            q,
            keys,
            values,
            o,
            lse,
            rows,
            slots,
            keys.stride(0),
            time,
            kv_heads,
            *lse.stride(),
            scale,
            G=group,
            D=head_dim,
            GP=padded,
            DP=_power_of_two(head_dim),
            BLOCK=launch.block,
            STAGES=launch.stages,
            num_warps=launch.warps,
        )


@_registered("delta", "dq", "address", "reader_lse", "dk", "dv")
def depth_backward_query(
    do: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    scale: float,
    o: Tensor | None = None,
    address: Tensor | None = None,
    reader_lse: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    config: Sequence[int] | None = None,
) -> None:
    """Add to dq what the slots give, sum_j ds_j k_j * scale, in place; on request, in the same pass, also:

    - with `o`, compute delta = rowsum(do * o) and write it, instead of reading it;
    - with `address` int64 [2] and `reader_lse` (both), write there the addresses of q and do, which must then outlive
      the pull, and a copy of lse;
    - with `dk`, `dv` [slots, batch, time, kv_heads, head_dim], write there the gradients that this one reader gives.

    do, q, o, dq [batch, time, query_heads, head_dim] (dq may also be fp32); keys, values [slots, batch, time, kv_heads,
    head_dim], zero slots allowed; lse the joint one, any strides; delta and reader_lse contiguous.
    """
    rows, group = _check(q, keys, values, lse, do, *_given(o))
    slots, _, time, kv_heads, head_dim = keys.shape
    _check_tokens(_given(dq), q.shape, (q.dtype, torch.float32), q.device)
    _check_tokens(_given(delta), lse.shape, (torch.float32,), q.device)
    _check_tokens(_given(reader_lse), lse.shape, (lse.dtype,), q.device)
    _check_stacked(_given(dk, dv), keys.shape, (q.dtype, torch.float32), q.device)
    assert (address is None) == (reader_lse is None)
    if address is not None:
        _check_addresses(address[None], q.device)
        assert q.data_ptr() % ALIGNMENT == do.data_ptr() % ALIGNMENT == 0
    assert (dk is None) == (dv is None)
    launch = _launch(config, "query" if dk is None else "gradients", head_dim, group, q.dtype)
    kernel, programs, padded = _by_row(launch, depth_query.backward_vector, depth_query.backward_tensor, rows, group)
    with torch.cuda.device_of(q):
        kernel[(programs,)](
            do,
            q,
            q if o is None else o,
            keys,
            values,
            lse,
            delta,
            dq,
            keys if dk is None else dk,
            values if dv is None else dv,
            lse if address is None else address,
            lse if reader_lse is None else reader_lse,
            rows,
            slots,
            keys.stride(0),
            0 if dk is None else dk.stride(0),
            time,
            kv_heads,
            *lse.stride(),
            scale,
            G=group,
            D=head_dim,
            GP=padded,
            DP=_power_of_two(head_dim),
            BLOCK=launch.block,
            STAGES=launch.stages,
            DELTA_FROM_O=o is not None,
            LEAVE=address is not None,
            SLOT_GRADIENTS=dk is not None,
            **({"ROWS": launch.rows} if launch.tensor else {}),
            num_warps=launch.warps,
        )


@_registered("dk", "dv")
def depth_backward_slots(
    addresses: Tensor,
    lse: Tensor,
    delta: Tensor,
    first: int,
    last: int,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    partial_dk: Tensor | None = None,
    partial_dv: Tensor | None = None,
    config: Sequence[int] | None = None,
) -> None:
    """Write to dk, dv the gradients of some slots: the sum over the readers first..last-1, and partial sums if given.

    Readers: addresses int64 [readers, 2] of their q and do, contiguous [batch, time, query_heads, head_dim] in the
    dtype of k, alive, starting at multiples of 16 bytes; lse, delta [readers, batch, time, query_heads]. Slots: k, v,
    dk, dv [slots, batch, time, kv_heads, head_dim], those of one layer, or of several that have these readers in common
    (a blocked pull, whose fp32 sums are later given as partial ones). Each program holds up to 16 slots and reads the
    readers once for all of them. dk, dv have the dtype of k, or fp32. `partial_dk`, `partial_dv`, fp32 in the shape of
    k, may not share memory with dk, dv.
    """
    slots, batch, time, kv_heads, head_dim = k.shape
    readers, query_heads = lse.shape[0], lse.shape[-1]
    rows, group = _check_rows(batch * time * kv_heads, query_heads, kv_heads, head_dim, k.dtype)
    _check_addresses(addresses, k.device)
    assert addresses.shape[0] == readers
    _check_stacked([k, v], k.shape, (k.dtype,), k.device)
    _check_stacked([delta], (readers, batch, time, query_heads), (torch.float32,), k.device)
    _check_stacked([lse], delta.shape, (torch.float32, lse_dtype(k.dtype)), k.device)
    assert lse.stride(0) == delta.stride(0) or readers < 2
    _check_stacked([dk, dv], k.shape, (k.dtype, torch.float32), k.device)
    _check_stacked(_given(partial_dk, partial_dv), k.shape, (torch.float32,), k.device)
    assert 0 <= first <= last <= readers
    assert slots > 0
    assert dk.dtype == dv.dtype
    assert (partial_dk is None) == (partial_dv is None)
    launch = _launch(config, "slots" if slots <= 2 else "block", head_dim, group, k.dtype)
    assert launch.rows == 1
    block = min(MAX_SLOT_BLOCK, _power_of_two(slots))
    if launch.tensor:
        kernel, programs, block = depth_slots.slots_tensor, rows, MAX_SLOT_BLOCK
    else:
        kernel, programs = depth_slots.slots_vector, -(-rows // launch.block)
    with torch.cuda.device_of(k):
        kernel[(programs, -(-slots // block))](
            addresses,
            lse,
            delta,
            k,
            v,
            dk,
            dv,
            dk if partial_dk is None else partial_dk,
            dv if partial_dv is None else partial_dv,
            first,
            last,
            rows,
            slots,
            lse.stride(0),
            k.stride(0),
            dk.stride(0),
            0 if partial_dk is None else partial_dk.stride(0),
            scale,
            G=group,
            D=head_dim,
            DP=_power_of_two(head_dim),
            SLOTS=block,
            BLOCK=launch.block,
            STAGES=launch.stages,
            PARTIAL=partial_dk is not None,
            num_warps=launch.warps,
        )


def _launch(config: Sequence[int] | None, kernel: str, head_dim: int, group: int, dtype: torch.dtype) -> Configuration:
    return configuration(kernel, head_dim, group, dtype) if config is None else Configuration(*config)


def _by_row(launch: Configuration, vector, tensor, rows: int, group: int):
    """The kernel of a configuration, its number of programs, and the group as it is padded there."""
    if launch.tensor:
        return tensor, -(-rows // launch.rows), max(16 // launch.rows, _power_of_two(group))
    return vector, -(-rows // launch.block), _power_of_two(group)


def _check(q: Tensor, keys: Tensor, values: Tensor, lse: Tensor, *like_q: Tensor) -> tuple[int, int]:
    """Assert that queries, slots and lse fit together; returns the numbers of rows and of queries a row."""
    batch, time, query_heads, head_dim = q.shape
    kv_heads = keys.shape[3]
    rows, group = _check_rows(batch * time * kv_heads, query_heads, kv_heads, head_dim, q.dtype)
    assert lse.shape == q.shape[:3]
    assert lse.dtype in (torch.float32, lse_dtype(q.dtype))
    assert lse.device == q.device
    _check_tokens([q, *like_q], q.shape, (q.dtype,), q.device)
    _check_stacked([keys, values], (keys.shape[0], batch, time, kv_heads, head_dim), (q.dtype,), q.device)
    return rows, group


def _check_rows(rows: int, query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    group = query_heads // kv_heads
    assert dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert head_dim % 16 == 0
    assert 16 <= head_dim <= 128
    assert query_heads == group * kv_heads
    assert 1 <= group <= MAX_GROUP
    assert 0 < rows < 2**31
    return rows, group


def _check_addresses(addresses: Tensor, device: torch.device) -> None:
    assert addresses.dtype == torch.int64
    assert addresses.shape[1:] == (2,)
    assert addresses.device == device
    assert addresses.is_contiguous()


def _check_tokens(
    tensors: list[Tensor], shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Assert that contiguous tensors of tokens have this shape and device, and one of the dtypes."""
    for tensor in tensors:
        assert tensor.shape == shape
        assert tensor.dtype in dtypes
        assert tensor.device == device
        assert tensor.is_contiguous()


def addressable(x: Tensor) -> Tensor:
    """x as a reader's tensors have to lie, contiguous and from a multiple of ALIGNMENT on: itself, or a copy."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _check_stacked(
    tensors: list[Tensor], shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Assert the same of tensors of slots or readers, which have one stride along their first axis, of any size."""
    for tensor in tensors:
        assert tensor.shape == shape
        assert tensor.stride(0) == tensors[0].stride(0) or shape[0] < 2
        if shape[0]:
            _check_tokens([tensor[0]], shape[1:], dtypes, device)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _power_of_two(n: int) -> int:
    """The next one; Triton's own function takes the host as long as an operator."""
    return 1 << (n - 1).bit_length()
