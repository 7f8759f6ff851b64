"""The parts of a decoder layer: RMSNorm, rotary embedding, SwiGLU, projections to keys and values (OLMo 2).

In: activations [batch, time, hidden_size] in the compute dtype. Out: the same dtype; norms and rotations run in fp32
(float64 stays float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels, norm_rotary, swiglu
from models.config import ModelConfig
from models.kernels import at_least_fp32

Rotary = tuple[Tensor, Tensor]  # cos, sin: [batch or 1, time, 1, head_dim / 2], fp32


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32; the weight is multiplied before the cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last axis is `size`; same shape and dtype back."""
        weight = at_least_fp32(self.weight)
        return F.rms_norm(at_least_fp32(x), weight.shape, weight, self.eps).to(x.dtype)


class HeadRMSNorm(nn.Module):
    """x / rms(x) over the last axis, without weights: the value norm, over each head of V."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., head_dim]; same shape and dtype back."""
        return F.rms_norm(at_least_fp32(x), x.shape[-1:], None, self.eps).to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """cos and sin of position * theta^(-2i / head_dim), for positions [batch or 1, time] of any integer dtype."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, :, None, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding, rotate-half layout: pairs are (i, i + head_dim / 2). x [batch, time, heads, head_dim]."""
    cos, sin = rotary
    first, second = at_least_fp32(x).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x); `gate_up_proj` holds w1 above w3."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, hidden_size] to the same."""
        first, last = self.gate_up_proj, self.down_proj
        return swiglu.swiglu(x, first.weight, last.weight, first.bias, last.bias)


class HeadNorms(nn.Module):
    """What happens to projected keys and values: QK-norm over the full width, split into heads, RoPE; value norm.

    Every key that a softmax sees goes through one of these, so that sequence and slot keys are alike: the query and the
    slot keys of a token share its position, the rotations cancel, and the score of a slot is free of position.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.num_kv_heads * config.head_dim
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.v_norm = HeadRMSNorm(config.norm_eps) if config.value_norm else nn.Identity()
        self.heads = (config.num_kv_heads, config.head_dim)

    def fused(
        self, product: Tensor, q_norm: nn.Module | None, rotary: Rotary, place: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """q, k, v of the product of a fused projection in one pass, None where no kernel does that.

        `q_norm` is that of the queries, None for a product without any. `place`: of the depth slot for k and v.
        """
        if not isinstance(self.k_norm, RMSNorm) or not kernels.available(product.device, product.dtype):
            return None
        q_weight = q_norm.weight if isinstance(q_norm, RMSNorm) else None
        k_weight, eps, head_dim = self.k_norm.weight, self.k_norm.eps, self.heads[1]
        if isinstance(self.v_norm, HeadRMSNorm):
            place = None  # its result is for the slot, not what goes into it
        q, k, v = norm_rotary.norm_rotary(product, q_weight, k_weight, *rotary, head_dim, eps, place)
        return q, k, self.v_norm(v)

    def forward(self, k: Tensor, v: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """k, v [batch, time, kv_heads * head_dim] to [batch, time, kv_heads, head_dim]."""
        k = rotate(self.k_norm(k).unflatten(-1, self.heads), rotary)
        # Without a norm v is a part of the product that made it: a copy, so that the product is not kept for it.
        return k, self.v_norm(v.unflatten(-1, self.heads)).contiguous()


class SlotProjection(nn.Module):
    """A light linear projection to the keys and values of a depth slot (Table 3: "Extra FFN KV Proj.", "Extra Attn KV
    Proj."), with norms of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kv_proj = nn.Linear(config.hidden_size, 2 * config.num_kv_heads * config.head_dim, bias=config.bias)
        self.norms = HeadNorms(config)

    def forward(self, x: Tensor, rotary: Rotary, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [batch, time, hidden_size] to k, v [batch, time, kv_heads, head_dim]; `place`: of a slot that they fit."""
        product = self.kv_proj(x)
        if (fused := self.norms.fused(product, None, rotary, place)) is not None:
            return fused[1:]
        return self.norms(*product.chunk(2, -1), rotary)


class QKVProjection(nn.Module):
    """Queries, keys and values of an attention layer; `qkv_proj` holds w_q above w_k above w_v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.widths = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        self.heads = (config.num_heads, config.head_dim)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.bias)
        self.q_norm = RMSNorm(self.widths[0], config.norm_eps) if config.qk_norm else nn.Identity()
        self.norms = HeadNorms(config)

    def forward(self, x: Tensor, rotary: Rotary, place: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, time, hidden_size] to q, k, v [batch, time, heads or kv_heads, head_dim].

        `place`: of a depth slot that k and v are put in, if they can.
        """
        product = self.qkv_proj(x)
        if (fused := self.norms.fused(product, self.q_norm, rotary, place)) is not None:
            return fused
        q, k, v = product.split(self.widths, -1)
        return rotate(self.q_norm(q).unflatten(-1, self.heads), rotary), *self.norms(k, v, rotary)
