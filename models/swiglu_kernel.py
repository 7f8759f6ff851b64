"""Triton kernels of `models.swiglu`: each element of gate and up is read once each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS, WARPS = (4096, 2048), 8  # columns of a row that a program takes: at the speed of a copy on an H100


@triton.jit
def swiglu_forward(product, out, width, BLOCK: tl.constexpr):
    """product [rows, 2 * width], out [rows, width]."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    at = product + row * 2 * width + c
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + c, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(dhidden, product, dproduct, hidden, width, BLOCK: tl.constexpr):
    """hidden and its gradient [rows, width], product and its gradient [rows, 2 * width]."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    at = row * 2 * width + c
    gate = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(product + at + width, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dhidden + row * width + c, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = grad * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(dproduct + at, dgate.to(dproduct.dtype.element_ty), mask=mask)
    tl.store(dproduct + at + width, (grad * silu).to(dproduct.dtype.element_ty), mask=mask)
    tl.store(hidden + row * width + c, (silu * up).to(hidden.dtype.element_ty), mask=mask)


def forward(product: Tensor) -> Tensor:
    """silu(gate) * up [..., width] of a contiguous product [..., 2 * width]."""
    assert product.shape[-1] % 2 == 0
    out = product.new_empty(*product.shape[:-1], product.shape[-1] // 2)
    _launch(swiglu_forward, product, out, width=out.shape[-1])
    return out


def backward(dhidden: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `product`, and what `forward` gives; both arguments contiguous."""
    dproduct, hidden = torch.empty_like(product), torch.empty_like(dhidden)
    _launch(swiglu_backward, dhidden, product, dproduct, hidden, width=hidden.shape[-1])
    return dproduct, hidden


def _launch(kernel, *tensors: Tensor, width: int) -> None:
    """A program for each block of columns of each row; `tensors` of one device."""
    block = next((block for block in BLOCKS if width % block == 0), 1024)
    rows = tensors[-1].numel() // tensors[-1].shape[-1]
    with torch.cuda.device_of(tensors[0]):
        kernel[(rows, -(-width // block))](*tensors, width, BLOCK=block, num_warps=WARPS)
