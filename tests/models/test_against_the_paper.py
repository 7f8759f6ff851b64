"""The decoder against a second one, written straight from the paper's definition (PAPER.md, sections 1 and 5).

`decoder` below shares no code with `models` or `moda`: plain functions of a state dict, whole score matrices, one
softmax over sequence and depth scores side by side, gradients by autograd, all in float64. Only the rotary tables are
fp32, as they are by definition.
"""

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.decoder import Decoder
from models.initialization import initialize

TOLERANCE = 1e-6  # of relative norms

DEPTH = {"depth_kv": True}
FFN = {"depth_kv": True, "ffn_kv_proj": True}
BOTH = {"depth_kv": True, "ffn_kv_proj": True, "attn_kv_proj": True}
ATTENTION = {"depth_kv": True, "attn_kv_proj": True}
CASES = [
    {"norm": "reordered"},
    {"norm": "reordered", **DEPTH},
    {"norm": "reordered", **FFN},
    {"norm": "reordered", **BOTH, "value_norm": True, "ffn_kv_last_layer": True},
    {"norm": "reordered", **BOTH, "bias": True, "qk_norm": False, "tie_embeddings": False},
    {"norm": "pre", "value_norm": True, "bias": True},
    {"norm": "pre", **DEPTH, "qk_norm": False, "bias": True},
    {"norm": "pre", **FFN, "value_norm": True, "tie_embeddings": False},
    {"norm": "pre", **BOTH},
    {"norm": "pre", **ATTENTION, "num_kv_heads": 4, "rope_theta": 100.0},
    {"norm": "post", "qk_norm": False, "tie_embeddings": False},
    {"norm": "post", **DEPTH, "value_norm": True, "num_kv_heads": 1},
    {"norm": "post", **FFN, "qk_norm": False, "bias": True, "ffn_kv_last_layer": True},
    {"norm": "post", **BOTH, "bias": True, "norm_eps": 1e-2},
]


def decoder(w, c, ids):
    """Logits [batch, time, rows of the embedding] of ids [batch, time]; `w` is a state dict, `c` the shape."""
    time, half, group = ids.shape[1], c.head_dim // 2, c.num_heads // c.num_kv_heads
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    angle = torch.arange(time, dtype=torch.float32)[:, None] * frequency
    cos, sin = (torch.cat([table, table], -1)[:, None].double() for table in (angle.cos(), angle.sin()))
    future = torch.ones(time, time).triu(1).bool()

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def positioned(name, x):  # queries or keys: norm over all heads together, then heads, then rotation
        x = (norm(name, x) if c.qk_norm else x).unflatten(-1, (-1, c.head_dim))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def valued(x):
        x = x.unflatten(-1, (-1, c.head_dim))
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() if c.value_norm else x

    def slot(name, x):
        k, v = linear(f"{name}.kv_proj", x).tensor_split(2, -1)
        return positioned(f"{name}.norms.k_norm", k), valued(v)

    def attend(q, k, v, slots):
        kv_head = torch.arange(c.num_heads) // group
        k, v = k[:, :, kv_head], v[:, :, kv_head]
        scores = [torch.einsum("bthd,bshd->bths", q, k).masked_fill(future[:, None], -torch.inf)]
        scores += [(q * depth_k[:, :, kv_head]).sum(-1, keepdim=True) for depth_k, _ in slots]
        weights = (torch.cat(scores, -1) / c.head_dim**0.5).softmax(-1)
        out = torch.einsum("bths,bshd->bthd", weights[..., :time], v)
        for i, (_, depth_v) in enumerate(slots):
            out = out + weights[..., time + i, None] * depth_v[:, :, kv_head]
        return out.flatten(2)

    def attention(at, x, slots):  # the output, and what the layer leaves for later ones
        widths = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        q, k, v = linear(f"{at}.attention.qkv_proj", x).split(widths, -1)
        q, k = positioned(f"{at}.attention.q_norm", q), positioned(f"{at}.attention.norms.k_norm", k)
        out = linear(f"{at}.out_proj", attend(q, k, valued(v), slots))
        return out, lambda: slot(f"{at}.attention_slot", x) if c.attn_kv_proj else (k, valued(v))

    def ffn(at, x):
        gate, up = linear(f"{at}.ffn.gate_up_proj", x).tensor_split(2, -1)
        return linear(f"{at}.ffn.down_proj", F.silu(gate) * up), lambda: slot(f"{at}.ffn_slot", x)

    def entering(name, x):
        return norm(name, x) if c.norm == "pre" else x

    def joined(name, x, out):
        if c.norm == "post":
            return norm(name, x + out)
        return x + (norm(name, out) if c.norm == "reordered" else out)

    x, slots = w["embedding.weight"][ids], []
    for layer in range(c.num_layers):
        at = f"blocks.{layer}"
        out, attention_slot = attention(at, entering(f"{at}.attention_norm", x), slots)
        h = joined(f"{at}.attention_norm", x, out)
        out, ffn_slot = ffn(at, entering(f"{at}.ffn_norm", h))
        x = joined(f"{at}.ffn_norm", h, out)
        if layer < c.num_layers - 1:  # what the last layer would leave, nobody reads
            slots = slots + [write() for write in (attention_slot, ffn_slot)[: c.depth_kv + c.ffn_kv_proj]]
    return norm("final_norm", x) @ w["embedding.weight" if c.tie_embeddings else "head.weight"].T


def case(fields):
    """A float64 model of three layers (norms away from 1, biases from 0, scores from 0) and ids for it."""
    shape = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = ModelConfig(**{**shape, "intermediate_size": 48, "vocab_size": 100, **fields})
    model, generator = Decoder(config).double(), torch.Generator().manual_seed(2)
    initialize(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.4 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.2)
            else:
                parameter.mul_(6.0)
    return model, torch.randint(0, 100, (2, 11), generator=generator)


@pytest.mark.parametrize("fields", CASES, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()))
def test_logits_and_gradients_are_those_of_the_definition(fields):
    model, ids = case(fields)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    want, got = decoder(weights, model.config, ids), model(ids)
    assert_close(got, want, "logits")
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (want * cotangent).sum().backward()
    (got * cotangent).sum().backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, weight in weights.items():
        if weight.grad is None:  # the projection of the last layer that is counted and never read
            assert name.startswith(f"blocks.{model.config.num_layers - 1}.ffn_slot."), name
            assert model.config.ffn_kv_last_layer
            assert not parameters[name].grad.any(), name
        else:
            assert_close(parameters[name].grad, weight.grad, name)


def assert_close(got, want, name):
    error = ((got - want).norm() / want.norm()).item()
    assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


def test_the_cases_can_tell_every_slot_from_none():
    """A comparison of nothing with nothing would pass too: each kind of slot must move the logits."""
    model, ids = case({"norm": "pre", **BOTH})
    weights, config = dict(model.state_dict()), model.config
    full = decoder(weights, config, ids)
    for name in ("attention_slot", "ffn_slot"):
        changed = weights | {k: 0.5 * w for k, w in weights.items() if f"{name}.kv_proj" in k}
        assert (decoder(changed, config, ids) - full).norm() > 1e-3 * full.norm(), name
