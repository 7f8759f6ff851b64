"""The output layer and its loss in one: cross-entropy and z-loss of a linear map, without ever holding all logits.

In: hidden states [tokens, hidden_size], the output matrix [vocabulary, hidden_size], targets [tokens]. Out: the two
terms of the loss. Logits exist for a chunk of tokens at a time. Where gradients are wanted they are computed in the
forward, while a chunk's logits are at hand: three matrix products in all, no recomputation; the gradient of the output
matrix is summed over chunks in fp32.

Precision: a logit is accumulated in fp32 and rounded once to the dtype of `hidden` (bf16 in training on a GPU, as in
OLMo 2's own code); softmax, log-sum-exp and both losses are fp32 from there on (float64 for float64). The gradient of a
logit is rounded to the dtype of `hidden`, as autograd does for a product in that dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moda import kernels
from moda.first_order import first_order
from models.kernels import at_least_fp32

CHUNK_BYTES = 2**30  # of logits, at most: large products run at full speed, the buffer is small beside activations
LEAST_TOKENS = 128  # of a chunk


class Loss(NamedTuple):
    """Means over all targets that are not ignored, fp32 scalars (float64 for float64), in nats."""

    cross_entropy: Tensor
    z_loss: Tensor  # weighted: model.z_loss * mean(logsumexp(logits)^2)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float) -> Loss:
    """Loss of the logits `hidden @ weight.T`: mean(lse - logit[target]) and z_weight * mean(lse^2) (OLMo 2, section 3).

    Args:
        hidden: [tokens, hidden_size], floating point.
        weight: [vocabulary, hidden_size] in the dtype of `hidden`.
        targets: [tokens], integers; a negative one is ignored. Without any other, both terms are 0.
        z_weight: weight of the z-loss.

    Gradients are exact for any use of the two terms; they cost nothing beyond the forward where both get the same
    factor, as their sum does, and a second pass over the chunks elsewhere. First order only: under create_graph=True
    the backward raises RuntimeError.
    """
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return Loss(*_LinearCrossEntropy.apply(hidden, weight, targets, z_weight, wanted))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of the sum of both terms in the forward; its backward scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_weight, wanted):
        ctx.set_materialize_grads(False)
        counted = targets >= 0
        share = 1 / counted.sum().clamp_min(1).to(torch.promote_types(hidden.dtype, torch.float32))  # of one target
        factors = torch.stack((share, 2 * z_weight * share))
        lse, chosen, dhidden, dweight = _over_chunks(hidden, weight, targets, factors, wanted)
        ctx.save_for_backward(hidden, weight, targets, factors, dhidden, dweight)
        ctx.wanted = wanted
        lse = lse * counted
        return ((lse - chosen) * share).sum(), z_weight * (lse.square() * share).sum()

    @staticmethod
    @first_order
    def backward(ctx, d_cross_entropy, d_z_loss):
        hidden, weight, targets, factors, dhidden, dweight = ctx.saved_tensors
        scale = d_cross_entropy
        if d_cross_entropy is None or d_z_loss is None or d_cross_entropy.data_ptr() != d_z_loss.data_ptr():
            # Not the gradients of one sum: whether the factors agree is known on the device only.
            zero = torch.zeros_like(factors[0])
            scales = torch.stack([zero if d is None else d for d in (d_cross_entropy, d_z_loss)])
            _, _, dhidden, dweight = _over_chunks(hidden, weight, targets, factors * scales, ctx.wanted)
            scale = torch.ones_like(zero)
        gradients = [
            None if total is None else torch.mul(total, scale, out=torch.empty_like(total, dtype=own.dtype))
            for total, own in ((dhidden, hidden), (dweight, weight))
        ]
        return *gradients, None, None, None


def _over_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Log-sum-exp and target's logit of every token (0 where ignored), and the gradients of hidden and weight.

    `factors` are those of the gradient of a logit, f_0 (p - [target]) + f_1 lse p with softmax p; `wanted` says which
    of the two gradients are computed.
    """
    tokens, vocabulary = len(hidden), len(weight)
    size = chunk_tokens(tokens, vocabulary, hidden.dtype)
    logits = torch.empty(size, vocabulary, dtype=hidden.dtype, device=hidden.device)
    lse, chosen = (torch.empty(tokens, dtype=factors.dtype, device=hidden.device) for _ in range(2))
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = torch.zeros_like(weight, dtype=factors.dtype) if wanted[1] else None
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        rows = torch.mm(hidden[part], weight.T, out=logits[: part.stop - start])
        _softmax_rows(rows, targets[part], factors, lse[part], chosen[part], any(wanted))
        if dhidden is not None:
            torch.mm(rows, weight, out=dhidden[part])
        if dweight is not None:
            _add_product(dweight, rows.T, hidden[part])
    return lse, chosen, dhidden, dweight


def chunk_tokens(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, but for the last: a power of two, for which products never have an unlucky shape."""
    most = max(LEAST_TOKENS, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    return max(1, min(tokens, 1 << most.bit_length() - 1))


def _softmax_rows(
    logits: Tensor, targets: Tensor, factors: Tensor, lse: Tensor, chosen: Tensor, with_gradient: bool
) -> None:
    """Fill lse and chosen, and with gradients put the gradient of `logits` [rows, vocabulary] in its place."""
    if logits.dtype != torch.float64 and kernels.available(logits.device):
        from models.cross_entropy_kernel import softmax_rows

        softmax_rows(logits, targets, factors, lse, chosen, with_gradient)
        return
    wide = at_least_fp32(logits)
    counted, target = targets >= 0, targets.clamp_min(0)[:, None]
    torch.logsumexp(wide, -1, out=lse)
    torch.mul(wide.gather(1, target).squeeze(1), counted, out=chosen)
    if with_gradient:
        probabilities = (wide - lse[:, None]).exp()
        probabilities *= ((factors[0] + factors[1] * lse) * counted)[:, None]
        logits.copy_(probabilities.scatter_add_(1, target, -(factors[0] * counted)[:, None]))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, the products and the sum in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif not a.is_cuda:  # elsewhere there is no product whose result is wider than its factors
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
