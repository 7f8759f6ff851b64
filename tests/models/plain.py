"""Small decoders, random tokens, and a depth stream by definition, for tests of models and their distribution."""

import torch

from moda import reference
from models.config import ModelConfig
from models.decoder import Decoder
from models.initialization import initialize


def small(**fields) -> ModelConfig:
    shape = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return ModelConfig(**{**shape, "intermediate_size": 48, "vocab_size": 100, **fields})


def build(config: ModelConfig, dtype=torch.float64) -> Decoder:
    model = Decoder(config).to(dtype)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases away from 1 and 0, logits away from 0
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            else:
                parameter.mul_(4.0)
    return model


def tokens(batch=2, time=11, seed=0):
    ids = torch.randint(0, 100, (batch, time + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


class PlainStream:
    """`moda.DepthStream` by definition: lists of K and V, one softmax over all, gradients by autograd."""

    def __init__(self, num_layers, batch, time, num_kv_heads, head_dim, *, slots_per_layer, dtype, device, **bounds):
        self.slots = [[] for _ in range(num_layers)]
        self.recent, self.first = bounds["recent_layers"], bounds["first_layers"]

    def start(self):
        return torch.zeros(())

    def place(self, handle, layer, slot):
        return None

    def write(self, handle, layer, slot, k, v):
        self.slots[layer].append((k, v))
        return k, v, handle

    def attend(self, handle, layer, q, k, v, *, scale=None, cu_seqlens=None, backend="auto"):
        visible = [i for i in range(layer) if self.recent is None or layer - i <= self.recent or i < self.first]
        read = [pair for i in visible for pair in self.slots[i]]
        depth = [torch.stack(t) for t in zip(*read, strict=True)] if read else []
        return reference.definition(q, k, v, *depth, scale=scale, cu_seqlens=cu_seqlens)[0], handle

    def finish(self, handle, x):
        return x
