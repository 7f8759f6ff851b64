"""The language model: embedding, blocks, final norm, output product, loss.

In: token ids [batch, time]. Out: logits, or the training loss in its two terms. One class serves the OLMo 2 baseline
and MoDA; the configuration says which blocks it has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda
from models.block import Block, DepthBlock
from models.config import ModelConfig
from models.cross_entropy import Loss, linear_cross_entropy
from models.kernels import at_least_fp32
from models.layers import RMSNorm, rotary_tables


class Decoder(nn.Module):
    """A decoder-only transformer of `config`. `models.initialization` gives it its weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            DepthBlock(config, layer) if config.depth_kv else Block(config) for layer in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        )

    def forward(self, ids: Tensor, targets: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor | Loss:
        """Logits of every position, or with `targets` the loss.

        Args:
            ids: token ids [batch, time], integers.
            targets: the id that follows each position, [batch, time]; a negative one is ignored.
            cu_seqlens: document boundaries as in `moda.attention`; positions restart at each.

        Returns:
            logits [batch, time, padded_vocab_size], fp32 (float64 for a float64 model), or `Loss` with `targets`.
        """
        hidden = self.hidden(ids, cu_seqlens)
        if targets is None:
            return at_least_fp32(F.linear(hidden, self.output_weight))
        return linear_cross_entropy(hidden.flatten(0, 1), self.output_weight, targets.reshape(-1), self.config.z_loss)

    def hidden(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """What enters the output product: [batch, time, hidden_size], after the final norm."""
        config = self.config
        x = self.embedding(ids)
        rotary = rotary_tables(_positions(ids, cu_seqlens), config.head_dim, config.rope_theta)
        if not config.depth_kv:
            for block in self.blocks:
                x = block(x, rotary, cu_seqlens)
            return self.final_norm(x)
        stream = moda.DepthStream(
            config.num_layers,
            ids.shape[0],
            ids.shape[1],
            config.num_kv_heads,
            config.head_dim,
            slots_per_layer=config.slots_per_layer,
            dtype=x.dtype,
            device=x.device,
            recent_layers=config.depth_recent_layers,
            first_layers=config.depth_first_layers,
        )
        handle = stream.start()
        for block in self.blocks:
            x, handle = block(x, handle, stream, rotary, cu_seqlens)
        return self.final_norm(stream.finish(handle, x))

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the output product: [padded_vocab_size, hidden_size]."""
        return self.embedding.weight if self.head is None else self.head.weight


def _positions(ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Position of every token in its row, or in its document: [batch or 1, time]."""
    batch, time = ids.shape
    position = torch.arange(time, device=ids.device)[None]
    if cu_seqlens is None:
        return position
    flat = torch.arange(batch * time, device=ids.device)
    begins = cu_seqlens[torch.searchsorted(cu_seqlens.to(flat.dtype), flat, right=True) - 1].view(batch, time)
    row = torch.arange(batch, device=ids.device)[:, None] * time  # a row begins a document too
    return position + row - torch.maximum(begins, row)
