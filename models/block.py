"""Decoder blocks: attention and SwiGLU around a residual stream, with and without depth.

In: x [batch, time, hidden_size], rotary tables and, with depth, the stream and its handle. Out: fresh tensors of the
same shapes. A block knows nothing of parallelism, compilation or checkpointing: `models.parallelize` applies them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import moda
from models.config import ModelConfig
from models.layers import QKVProjection, RMSNorm, Rotary, SlotProjection, SwiGLU

# Where the norm of a branch stands: what enters the branch, and how its output joins the residual stream.
NORM_PLACEMENTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "pre": (lambda norm, x: norm(x), lambda norm, x, branch: x + branch),
    "reordered": (lambda norm, x: x, lambda norm, x, branch: x + norm(branch)),
    "post": (lambda norm, x: x, lambda norm, x, branch: norm(x + branch)),
}


class Block(nn.Module):
    """A layer of the baseline: causal attention over the sequence, then SwiGLU (OLMo 2, section 2.1).

    `attention_backend` is that of `moda.attention`.
    """

    attention_backend = "auto"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = QKVProjection(config)
        self.out_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.bias)
        self.ffn = SwiGLU(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.enter, self.join = NORM_PLACEMENTS[config.norm]

    def forward(self, x: Tensor, rotary: Rotary, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [batch, time, hidden_size] to the same; `cu_seqlens` as in `moda.attention`."""
        q, k, v = self.before_attention(x, rotary)
        out = moda.attention(q, k, v, cu_seqlens=cu_seqlens, backend=self.attention_backend)
        return self.after_attention(x, out)

    def before_attention(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, ...]:
        """q, k, v [batch, time, heads or kv_heads, head_dim] of x [batch, time, hidden_size]."""
        return self.attention(self.enter(self.attention_norm, x), rotary)

    def after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output, from its input x and attention's output [batch, time, num_heads, head_dim]."""
        h = self.join(self.attention_norm, x, self.out_proj(out.flatten(2)))
        return self.join(self.ffn_norm, h, self.ffn(self.enter(self.ffn_norm, h)))


class DepthBlock(Block):
    """A layer of MoDA: attention also reads the slots of earlier layers, and leaves its own K and V for later ones.

    Slot 0 is attention's (its own K and V, or a projection of its input); slot 1, if any, a projection of the FFN's
    input.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        self.layer = layer
        self.attention_slot = SlotProjection(config) if config.writes_attention_projection(layer) else None
        self.ffn_slot = SlotProjection(config) if config.writes_ffn_slot(layer) else None

    def forward(  # type: ignore[override]
        self, x: Tensor, handle: Tensor, stream: moda.DepthStream, rotary: Rotary, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [batch, time, hidden_size] and the stream's handle to the same."""
        q, k, v, *slot = self.before_attention(x, rotary, stream.place(handle, self.layer, 0))
        if slot:
            _, _, handle = stream.write(handle, self.layer, 0, *slot)
        else:
            k, v, handle = stream.write(handle, self.layer, 0, k, v)
        out, handle = stream.attend(handle, self.layer, q, k, v, cu_seqlens=cu_seqlens, backend=self.attention_backend)
        place = None if self.ffn_slot is None else stream.place(handle, self.layer, 1)
        x, *slot = self.after_attention(x, out, rotary, place)
        if slot:
            _, _, handle = stream.write(handle, self.layer, 1, *slot)
        return x, handle

    def before_attention(self, x: Tensor, rotary: Rotary, place: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """q, k, v as in `Block`, and with a projection of attention's input to a slot its k, v; `place`: the slot's."""
        attention_input = self.enter(self.attention_norm, x)
        if self.attention_slot is None:
            return self.attention(attention_input, rotary, place)
        return *self.attention(attention_input, rotary), *self.attention_slot(attention_input, rotary, place)

    def after_attention(  # type: ignore[override]
        self, x: Tensor, out: Tensor, rotary: Rotary, place: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The layer's output as in `Block`, and with a projection of the FFN's input to a slot its k, v."""
        h = self.join(self.attention_norm, x, self.out_proj(out.flatten(2)))
        ffn_input = self.enter(self.ffn_norm, h)
        slot = () if self.ffn_slot is None else self.ffn_slot(ffn_input, rotary, place)
        return self.join(self.ffn_norm, h, self.ffn(ffn_input)), *slot
