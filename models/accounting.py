"""What a model costs: parameters, floating-point operations, memory. Known before anything is allocated.

In: a `ModelConfig` and the shape of a batch. Out: counts, and a table for people. A multiply-add is two operations;
backward costs twice the forward. Attention is counted in two ways: *full*, over the whole square of queries and keys,
as the paper prints and as MFU is usually reported; *causal*, over the pairs that are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import moda
from models.config import ModelConfig
from models.decoder import Decoder
from models.parallelize import prepare_blocks

# Dense bf16 matrix peak of one device, FLOP/s, from the vendor's data sheets. The longest name that is part of the
# device's name counts; a device that is not here has no MFU rather than a wrong one.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device as `torch.cuda.get_device_name` calls it; None if unknown."""
    words = device_name.replace("-", " ").split()
    known = [name for name in PEAK_FLOPS if all(word in words for word in name.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class Parameters:
    """Counts of weights. `total` leaves out the rows that pad the embedding, as published counts do."""

    total: int
    embedding: int  # vocab_size * hidden_size, once
    slot_projections: int  # of FFN and attention input to depth slots, their norms included
    matmul: int  # those that a token is multiplied with: all but norms, biases and an untied input embedding


def count_parameters(config: ModelConfig) -> Parameters:
    """Exact counts, from the modules themselves (on the meta device)."""
    with torch.device("meta"):
        model = Decoder(config)
    padding = (config.padded_vocab_size - (config.vocab_size or 0)) * config.hidden_size
    tables = 1 if config.tie_embeddings else 2
    slots = [p for name, p in model.named_parameters() if "_slot." in name]
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return Parameters(
        total=sum(p.numel() for p in model.parameters()) - tables * padding,
        embedding=model.embedding.weight.numel() - padding,
        slot_projections=sum(p.numel() for p in slots),
        matmul=linear - padding + (model.embedding.weight.numel() if config.tie_embeddings else 0),
    )


def slots_read(config: ModelConfig) -> int:
    """Depth slots that all layers together read at one token."""
    if not config.depth_kv:
        return 0
    stream = moda.DepthStream(
        config.num_layers,
        batch=1,
        time=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        slots_per_layer=config.slots_per_layer,
        dtype=torch.float32,
        device="meta",
        recent_layers=config.depth_recent_layers,
        first_layers=config.depth_first_layers,
    )
    return sum(stop - start for layer in range(config.num_layers) for start, stop in stream.read_ranges(layer))


@dataclass(frozen=True)
class Flops:
    """Forward operations of one sequence."""

    matmul: int  # projections, FFN, output product
    attention_full: int  # scores and values over time^2 pairs
    attention_causal: int  # over time (time + 1) / 2 pairs
    depth: int  # scores and values over depth slots

    @property
    def full(self) -> int:
        """The paper's count."""
        return self.matmul + self.attention_full + self.depth

    @property
    def causal(self) -> int:
        """The count of what is computed."""
        return self.matmul + self.attention_causal + self.depth


def forward_flops(config: ModelConfig, sequence_length: int) -> Flops:
    """Operations of the forward pass of one sequence of `sequence_length` tokens."""
    width = config.num_heads * config.head_dim
    time = sequence_length
    return Flops(
        matmul=2 * count_parameters(config).matmul * time,
        attention_full=4 * time**2 * width * config.num_layers,
        attention_causal=2 * time * (time + 1) * width * config.num_layers,
        depth=4 * time * width * slots_read(config),
    )


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward operations a token, attention counted full: what MFU is computed from."""
    return 3 * forward_flops(config, sequence_length).full / sequence_length


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int  # fp32 master weights, sharded
    gradients: int  # fp32, sharded
    optimizer: int  # two fp32 moments, sharded
    activations: int  # what autograd and the depth stream keep of one micro-batch

    @property
    def total(self) -> int:
        """All of it; transient buffers (gathered weights, scores, logits' gradient) come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    config: ModelConfig,
    micro_batch_size: int,
    sequence_length: int,
    *,
    world_size: int = 1,
    compute_dtype: torch.dtype = torch.bfloat16,
    activation_checkpointing: str = "none",
    compiled: bool = False,
) -> Memory:
    """Bytes that training holds on a rank: weights, and what a forward pass on the meta device leaves for backward."""
    with torch.device("meta"):
        model = Decoder(config)
    shard = -(-sum(p.numel() for p in model.parameters()) // world_size) * 4
    model.to(compute_dtype)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that no other storage takes its address
        return tensor

    alive: list[torch.UntypedStorage] = []
    prepare_blocks(model, activation_checkpointing, "aot_eager_decomp_partition" if compiled else None)
    ids = torch.empty(micro_batch_size, sequence_length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, ids)
    if config.depth_kv and activation_checkpointing == "full":
        # Checkpointing drops what blocks save; the stream's slots are not part of that and stay.
        tokens = micro_batch_size * sequence_length
        slot = tokens * config.num_kv_heads * config.head_dim * compute_dtype.itemsize
        kept[-1] = 2 * config.num_layers * config.slots_per_layer * slot
        # At the end of backward every layer has left q, do, lse and delta for the slots below it.
        row = 2 * config.head_dim * compute_dtype.itemsize + 2 * torch.float32.itemsize
        kept[-2] = config.num_layers * tokens * config.num_heads * row
    return Memory(shard, shard, 2 * shard, sum(kept.values()))


def describe(config: ModelConfig, sequence_length: int, held: Memory) -> str:
    """A table of all of the above, printed before the first step."""
    parameters, flops = count_parameters(config), forward_flops(config, sequence_length)
    rows = [
        ("parameters", _scaled(parameters.total)),
        (
            "  embedding",
            _scaled(parameters.embedding) + (" (tied)" if config.tie_embeddings else " (and as many, head)"),
        ),
        ("  slot projections", _scaled(parameters.slot_projections)),
        (f"forward of {sequence_length} tokens", f"{_scaled(flops.full, 'FLOP')} full, {_scaled(flops.causal)} causal"),
        ("  projections", _scaled(flops.matmul, "FLOP")),
        ("  attention", f"{_scaled(flops.attention_full, 'FLOP')} full, {_scaled(flops.attention_causal)} causal"),
        ("  depth reads", f"{_scaled(flops.depth, 'FLOP')}, {slots_read(config):,} slots a token"),
        ("training", f"{_scaled(training_flops_per_token(config, sequence_length), 'FLOP')} a token (full)"),
        ("memory of a rank", f"{_scaled(held.total, 'B')}, transient buffers on top"),
        ("  weights, gradients", _scaled(held.weights + held.gradients, "B")),
        ("  optimizer", _scaled(held.optimizer, "B")),
        ("  activations", f"{_scaled(held.activations, 'B')} a micro-batch"),
    ]
    return "\n".join(f"{name:<26}{value}" for name, value in rows)


def _scaled(value: float, unit: str = "") -> str:
    """Four significant digits with a prefix: 705.8 M, 8.275 TFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.95 or prefix == "P":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}".rstrip()
