"""Products with SwiGLU inside, of the optional package quack-kernels (flash-attn-4 brings it), on Hopper GPUs.

In: activations, weights, gradients, bf16 or fp16. Out: what the products around silu(gate) * up give, forward and
backward. The product of gate and up has its columns *interleaved* here, gate 0, up 0, gate 1, ..., so that a tile of it
holds both of a column; the weight is read as it lies.

Tiles are the fastest of 16, or within 1 %, for 32,768 tokens of the 700M and 1.5B models on an H200
(docs/benchmarks.md); kernels are built at the first call, in seconds, and kept on disk. A counter hands the tiles out:
NCCL's kernels hold some multiprocessors at times, and tiles dealt beforehand would wait for those. The sums run in a
fixed order, wherever a tile is done: the same inputs, the same bits.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from moda.packages import Package

HOPPER = 9  # compute capability that the tiles were timed on
ALIGNMENT = 16  # bytes that a tensor starts at a multiple of; in columns of 2 bytes, twice what the loads need
_TILES = "tile_M tile_N cluster_M cluster_N pingpong is_dynamic_persistent"
FORWARD = Package(
    "quack.gemm_act", {"gemm_act": f"A B D C PostAct tile_count_semaphore activation {_TILES} concat_layout"}
)
BACKWARD = Package("quack.gemm_dact", {"gemm_dact": f"A B Out PreAct PostAct tile_count_semaphore activation {_TILES}"})


def available(x: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the products of x [rows, in_features] with these weights, and this bias of the first, are done here.

    Forward and backward ask with what is the same in both: sizes, dtypes and devices.
    """
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == gate_up.dtype == down.dtype
        and bias is None
        and len(x) > 0
        and not any(size % ALIGNMENT for size in (*gate_up.shape, *down.shape))
        and _installed(x.device, x.dtype)
    )


@cache
def _installed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the package's kernels can be had: those that are built here to find out are the ones used later."""
    if torch.cuda.get_device_capability(device)[0] != HOPPER or FORWARD.missing() or BACKWARD.missing():
        return False
    x = torch.zeros(ALIGNMENT, ALIGNMENT, dtype=dtype, device=device)
    try:
        product, _ = forward(x, torch.cat((x, x)))
        backward(x, x, product)
    except Exception as error:  # of a compiler, or of a version that means something else by these parameters
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"An optional kernel is installed and not used: quack-kernels fails ({reason}).", stacklevel=2)
        return False
    return True


def forward(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The interleaved product x gate_upᵀ [rows, 2 * intermediate_size], and silu(gate) * up of it."""
    product = x.new_empty(len(x), len(gate_up))
    hidden = x.new_empty(len(x), len(gate_up) // 2)
    with torch.cuda.device_of(x):
        FORWARD.call(
            "gemm_act",
            A=_aligned(x)[None],
            B=_aligned(gate_up.contiguous())[None],
            D=product[None],
            C=None,
            PostAct=hidden[None],
            tile_count_semaphore=_counter(product),
            activation="swiglu",
            tile_M=128,
            tile_N=192,
            cluster_M=2,
            cluster_N=1,
            pingpong=True,
            is_dynamic_persistent=True,
            concat_layout=("B",),
        )
    return product, hidden


def backward(dout: Tensor, down: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the interleaved product, from that of the layer's output, and silu(gate) * up once more."""
    dproduct, hidden = torch.empty_like(product), product.new_empty(len(product), down.shape[1])
    with torch.cuda.device_of(dout):
        BACKWARD.call(
            "gemm_dact",
            A=_aligned(dout)[None],
            B=_aligned(down.contiguous()).t()[None],
            Out=dproduct[None],
            PreAct=product[None],
            PostAct=hidden[None],
            tile_count_semaphore=_counter(product),
            activation="swiglu",
            tile_M=128,
            tile_N=128,
            cluster_M=1,
            cluster_N=2,
            pingpong=True,
            is_dynamic_persistent=True,
        )
    return dproduct, hidden


def interleaved(weight: Tensor) -> Tensor:
    """A weight of gate above up with its rows in the order of the product's columns."""
    return torch.stack(weight.chunk(2), 1).flatten(0, 1)


def side_by_side(weight: Tensor) -> Tensor:
    """The inverse of `interleaved`."""
    result, pairs = torch.empty_like(weight), weight.view(len(weight) // 2, -1)
    # Four times as fast as a copy of every second row.
    torch.split_with_sizes_copy(pairs, [weight.shape[1]] * 2, 1, out=result.chunk(2))
    return result


def _counter(x: Tensor) -> Tensor:
    """Of tiles, for one call: on another stream a second could count at the same time."""
    return x.new_zeros(1, dtype=torch.int32)


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % ALIGNMENT else x
