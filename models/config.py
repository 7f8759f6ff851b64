"""Shape and switches of a decoder: the `model` group of a run's configuration.

In: fields typed by a user. Out: a validated `ModelConfig`; every error names the field, its value and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

VOCAB_MULTIPLE = 128  # embedding rows are padded to this, so that the output product has aligned shapes
# Far beyond what can be trained: a slip, refused before anything is built or estimated for it.
MOST_LAYERS, LARGEST_SIZE = 4096, 2**24
NORMS = ("reordered", "pre", "post")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
ATTENTION_BACKENDS = ("auto", "joined", "fused", "reference")  # of moda.attention


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, its value and the remedy in one sentence."""


@dataclass
class ModelConfig:
    """An OLMo 2 decoder (arXiv 2501.00656) with the depth attention of MoDA (arXiv 2603.15619) as switches."""

    name: str = "model"  # label in logs and reports
    num_layers: int = 36  # decoder blocks
    hidden_size: int = 1024  # width of the residual stream
    num_heads: int = 16  # query heads
    num_kv_heads: int = 8  # key/value heads; query head h reads kv head h // (num_heads / num_kv_heads)
    head_dim: int = 64  # width of one head
    intermediate_size: int = 4096  # hidden width of SwiGLU
    vocab_size: int | None = 100278  # ids of the tokenizer; null takes it from the data, rounded up to 128
    tie_embeddings: bool = True  # output matrix = input embedding
    bias: bool = False  # biases on every linear layer
    norm: str = "reordered"  # reordered (OLMo 2): x + norm(f(x)); pre: x + f(norm(x)); post: norm(x + f(x))
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    qk_norm: bool = True  # RMSNorm over the full projected width of queries and of keys, before RoPE
    value_norm: bool = False  # RMSNorm without weights over each head of V, for sequence and slots alike
    rope_theta: float = 500_000.0  # base of the rotary frequencies
    init_std: float = 0.02  # truncated normal, cut at three standard deviations
    z_loss: float = 1e-5  # weight of mean(logsumexp(logits)^2)
    depth_kv: bool = False  # layers read what earlier layers' attention wrote at the same token
    ffn_kv_proj: bool = False  # the FFN's input, projected, is one more depth slot of each layer
    ffn_kv_last_layer: bool = False  # the last layer has the (never read) FFN projection too, as in the paper's Table 6
    attn_kv_proj: bool = False  # attention writes a projection of its input to its slot, instead of its own K and V
    depth_recent_layers: int | None = None  # read only this many layers back (null: all); the paper's section 6.2
    depth_first_layers: int = 0  # with depth_recent_layers: read the first layers as well

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size=null has no value yet: it is taken from the data when a run starts.")
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def slots_per_layer(self) -> int:
        """Depth slots each layer writes: 0 (no depth), 1 (attention) or 2 (attention and FFN)."""
        return int(self.depth_kv) + int(self.ffn_kv_proj)

    def writes_ffn_slot(self, layer: int) -> bool:
        """Whether `layer` projects its FFN input to a depth slot (the last one is never read)."""
        return self.ffn_kv_proj and (layer < self.num_layers - 1 or self.ffn_kv_last_layer)

    def writes_attention_projection(self, layer: int) -> bool:
        """Whether `layer` has a separate projection for attention's depth slot (Table 3, row 5)."""
        return self.attn_kv_proj and layer < self.num_layers - 1

    def validate(self) -> None:
        """Raise `ConfigError` for the first field whose value cannot make a model."""
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            largest = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            self._require(1 <= getattr(self, name) <= largest, name, f"use an integer from 1 to {largest:,}")
        # Beyond these, fp32 makes zeros or no numbers of what they are used for.
        for name, least, most in (("norm_eps", 1e-30, 1.0), ("rope_theta", 1.0, 1e30), ("init_std", 1e-30, 1e3)):
            self._require(least <= getattr(self, name) <= most, name, f"use a number from {least:g} to {most:g}")
        self._require(0 <= self.z_loss < math.inf, "z_loss", "use 0 (off) or a positive weight such as 1e-5")
        vocab_fits = self.vocab_size is None or 2 <= self.vocab_size <= LARGEST_SIZE
        self._require(vocab_fits, "vocab_size", f"use null or an integer from 2 to {LARGEST_SIZE:,}")
        self._require(self.norm in NORMS, "norm", choices(NORMS))
        self._require(
            self.head_dim % 2 == 0,
            "head_dim",
            f"rotary embedding turns pairs, so use an even number such as {self.head_dim + 1}",
        )
        divisors = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - self.num_kv_heads))
        self._require(
            self.num_kv_heads in divisors,
            "num_kv_heads",
            f"model.num_heads={self.num_heads} must be divisible by it, so use for example {nearest}",
        )
        for name in ("ffn_kv_proj", "attn_kv_proj"):
            self._require(
                self.depth_kv or not getattr(self, name),
                name,
                f"it needs model.depth_kv=true, so add that or set model.{name}=false",
            )
        self._require(
            self.depth_recent_layers is None or self.depth_recent_layers >= 1,
            "depth_recent_layers",
            "use null (all layers) or at least 1",
        )
        self._require(
            self.depth_kv or self.depth_recent_layers is None,
            "depth_recent_layers",
            "it needs model.depth_kv=true, so add that or set model.depth_recent_layers=null",
        )
        self._require(self.depth_first_layers >= 0, "depth_first_layers", "use 0 or more")
        self._require(
            self.depth_first_layers == 0 or self.depth_recent_layers is not None,
            "depth_first_layers",
            "with model.depth_recent_layers=null all layers are read already, so set that too or use 0",
        )

    def _require(self, condition: bool, name: str, remedy: str) -> None:
        require(condition, f"model.{name}", getattr(self, name), remedy)


def require(condition: bool, key: str, value: Any, remedy: str) -> None:
    """Raise `ConfigError` "KEY=VALUE cannot be used: REMEDY." unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={shown(value)} cannot be used: {remedy}.")


def choices(words: Iterable[str]) -> str:
    """The remedy for a word that is none of `words`."""
    return f"choose one of {', '.join(words)}"


def shown(value: Any) -> str:
    """A value as the command line and the configuration files write it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
