"""silu(gate) * up of the product of a fused projection in one pass over it, forward and backward (OLMo 2, section 2.1).

In: the product, [..., 2 * intermediate_size], gate before up. What `models.layers` says in PyTorch of two products, for
GPUs: there one product of both is faster than two, and so is the gradient of what it is a product of, if the gradients
of gate and up lie side by side, as the product does. The compiler would concatenate them, for which it reads twice what
they are made of: an operator of torch.library, opaque to it, around the Triton kernels of `models.swiglu_kernel`.
Arithmetic is fp32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moda.first_order import first_order
from models.kernels import LIBRARY, registered


def swiglu(product: Tensor) -> Tensor:
    """silu(gate) * up, [..., intermediate_size], contiguous, in the dtype of `product`.

    Args:
        product: [..., 2 * intermediate_size], gate before up.

    For devices and dtypes of which `models.kernels.available` holds. Gradients of the first order only.
    """
    return _swiglu(product)


def _forward(product: Tensor) -> Tensor:
    from models.swiglu_kernel import forward

    return forward(product.contiguous())


def _forward_fake(product):
    return product.new_empty(*product.shape[:-1], product.shape[-1] // 2)


def _backward(dout: Tensor, product: Tensor) -> Tensor:
    from models.swiglu_kernel import backward

    return backward(dout.contiguous(), product.contiguous())


def _backward_fake(dout, product):
    return product.new_empty(product.shape)


_swiglu = registered("swiglu", _forward, _forward_fake)
_swiglu_backward = registered("swiglu_backward", _backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@first_order
def _gradient(ctx, dout):
    return _swiglu_backward(dout, *ctx.saved_tensors)


torch.library.register_autograd("models::swiglu", _gradient, setup_context=_setup_context, lib=LIBRARY)
