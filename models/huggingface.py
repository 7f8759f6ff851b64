"""Weights of an OLMo 2 baseline to and from the form of `transformers.Olmo2ForCausalLM`.

In: a decoder without depth and with reordered norms, and for loading a state dict of that class. Out: an `Olmo2Config`
and a state dict of its names, or the decoder with these weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from models.block import Block
from models.config import ConfigError
from models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import Olmo2Config

BLOCK_NAMES = {
    "out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.norms.k_norm": "self_attn.k_norm",
    "ffn.down_proj": "mlp.down_proj",
    "attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_feedforward_layernorm",
}


def to_hugging_face(model: Decoder, sequence_length: int) -> tuple[Olmo2Config, dict[str, Tensor]]:
    """The configuration and state dict of the `Olmo2ForCausalLM` that computes the same logits.

    Args:
        model: unsharded weights, any dtype (kept).
        sequence_length: positions the model was trained on, `max_position_embeddings` there.

    Raises ConfigError for a model that OLMo 2 cannot express: depth, other norm placements, no QK-norm, value norm,
    biases, or a head width that is not hidden_size / num_heads.
    """
    from transformers import Olmo2Config  # slow to import; only an export needs it

    config = model.config
    required = {"depth_kv": False, "norm": "reordered", "qk_norm": True, "value_norm": False, "bias": False}
    for field, value in required.items():
        if getattr(config, field) != value:
            raise ConfigError(
                f"model.{field}={getattr(config, field)} has no counterpart in Olmo2ForCausalLM: it needs {value}."
            )
    if config.head_dim * config.num_heads != config.hidden_size:
        raise ConfigError(
            f"model.head_dim={config.head_dim} has no counterpart in Olmo2ForCausalLM: it needs the quotient"
            " hidden_size / num_heads."
        )
    # The class's defaults are not OLMo 2's: everything that matters is said.
    hf_config = Olmo2Config(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    state = {name: part.detach().to("cpu", copy=True).contiguous() for name, part in _names(model).items()}
    return hf_config, state


@torch.no_grad()
def load_hugging_face(model: Decoder, state: dict[str, Tensor]) -> None:
    """Copy the weights of an `Olmo2ForCausalLM` of the same shape into `model`.

    `state` may have fewer embedding rows than the padded vocabulary; the rest is set to zero. Raises ConfigError for a
    weight that is missing or of another shape.
    """
    for name, part in _names(model).items():
        weight = state.get(name)
        if weight is None and name == "lm_head.weight" and model.head is None:
            continue  # tied: some state dicts leave it out
        vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        fits = weight is not None and weight.shape[1:] == part.shape[1:]
        if weight is None or not fits or not (len(weight) == len(part) or (vocabulary and len(weight) < len(part))):
            found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
            raise ConfigError(f"{name} is {found}, the model needs {tuple(part.shape)}: use a model of the same shape.")
        part[len(weight) :].zero_()
        part[: len(weight)].copy_(weight)


def _names(model: Decoder) -> dict[str, Tensor]:
    """Their names, and the parts of our weights that they mean."""
    embedding = model.embedding.weight
    names = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": model.final_norm.weight,
        "lm_head.weight": embedding if model.head is None else model.head.weight,
    }
    for layer, block in enumerate(cast("list[Block]", model.blocks)):
        prefix = f"model.layers.{layer}"
        for ours, theirs in BLOCK_NAMES.items():
            names[f"{prefix}.{theirs}.weight"] = block.get_parameter(f"{ours}.weight")
        q, k, v = block.attention.qkv_proj.weight.split(block.attention.widths)
        gate, up = block.ffn.gate_up_proj.weight.chunk(2)
        for name, weight in {"q": q, "k": k, "v": v}.items():
            names[f"{prefix}.self_attn.{name}_proj.weight"] = weight
        for name, weight in {"gate": gate, "up": up}.items():
            names[f"{prefix}.mlp.{name}_proj.weight"] = weight
    return names
