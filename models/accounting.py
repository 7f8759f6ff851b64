"""What a model costs: parameters, floating-point operations, memory. Known before anything is allocated.

In: a `ModelConfig` and the shape of a batch. Out: counts, and a table for people. A multiply-add is two operations;
backward costs twice the forward. Attention is counted in two ways: *full*, over the whole square of queries and keys,
as the paper prints and as MFU is usually reported; *causal*, over the pairs that are computed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

import moda
from models.config import ACTIVATION_CHECKPOINTING, ModelConfig
from models.cross_entropy import chunk_tokens
from models.decoder import Decoder
from models.parallelize import prepare_blocks, units

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
SLICE = re.compile(r"MIG|\d+[ABCQ](ME)?")  # a word in the name of a part of a device: of MIG, of a virtual GPU


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak, FLOP/s, of a device as `torch.cuda.get_device_name` calls it; None if unknown, or of a slice."""
    words = device_name.replace("-", " ").split()
    if any(SLICE.fullmatch(word) for word in words):
        return None
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


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """Forward and backward operations a token, attention counted full and causal: what MFU is computed from."""
    forward = forward_flops(config, sequence_length)
    return 3 * forward.full / sequence_length, 3 * forward.causal / sequence_length


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, item by item; `moments` adds up what exists at the same time."""

    weights: int  # fp32 master weights, sharded
    gradients: int  # fp32, sharded
    optimizer: int  # two fp32 moments, sharded
    accumulated: int  # fp32 sums of gradients over micro-batches, not sharded; 0 with one micro-batch a step
    gathered: int  # weights in the compute dtype: of the root, and of the blocks that are gathered at a time
    activations: int  # what autograd and the depth stream keep of one micro-batch at the end of its forward
    slots: int  # of these, the depth stream's: they stay until the end of backward
    readers: int  # what layers have left for the slots below them at the end of backward
    loss: int  # logits of a chunk
    block: int  # of the backward of one block: activations computed again, gradients of activations and weights
    output: int  # gradient of the embedding and the output matrix, in the compute dtype and as the input of a reduction

    @property
    def moments(self) -> dict[str, int]:
        """What is held at the moments of a step where the peak can be: its end, the optimizer's, never holds more."""
        lasting = self.weights + self.optimizer + self.accumulated
        return {
            "loss": lasting + self.gathered + self.activations + self.loss,
            "begin of backward": lasting + self.gathered + self.activations + self.block,
            "end of backward": lasting
            + self.gathered
            + self.gradients
            + self.slots
            + self.readers
            + self.block
            + self.output,
        }

    @property
    def peak(self) -> str:
        """The moment at which most is held."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def total(self) -> int:
        """What is held at the peak. The allocator reserves some percent more, and the CUDA context is not counted."""
        return self.moments[self.peak]


def memory(
    config: ModelConfig,
    micro_batch_size: int,
    sequence_length: int,
    *,
    world_size: int = 1,
    replicate: int = 1,
    compute_dtype: torch.dtype = torch.bfloat16,
    activation_checkpointing: str = "none",
    compiled: bool = False,
    reshard_after_forward: bool = True,
    accumulates: bool = False,
) -> Memory:
    """Bytes that training needs on a rank, by passes through two and three layers on the meta device.

    Args:
        micro_batch_size, sequence_length: shape of what a rank computes at a time.
        world_size, replicate: ranks, and copies of the sharded model among them.
        compute_dtype: of activations and gathered weights.
        activation_checkpointing, compiled: how blocks are prepared (`models.parallelize`). What compiled regions keep
            is what PyTorch's partitioner chooses for them.
        reshard_after_forward: as in `models.parallelize`.
        accumulates: whether an optimizer step has several micro-batches.
    """
    with torch.device("meta"):
        model = Decoder(config)
    tokens, width = micro_batch_size * sequence_length, compute_dtype.itemsize
    parameters = sum(p.numel() for p in model.parameters())
    unit_parameters = max(
        sum(p.numel() for block in unit for p in block.parameters()) for unit in units(model, reshard_after_forward)
    )
    root_parameters = parameters - sum(p.numel() for p in model.blocks.parameters())
    shard = -(-parameters * replicate // world_size) * 4
    reduced = 0 if world_size == replicate else 4  # bytes a weight; of a whole copy gradients are reduced in place

    shape = tuple(asdict(config).items())
    kept = _kept(shape, micro_batch_size, sequence_length, compute_dtype, compiled)

    def of_layers(checkpointing: str) -> tuple[int, int]:  # of all layers, and of one
        if config.num_layers <= 3:
            total = kept[config.num_layers, checkpointing]
            return total, total // config.num_layers
        two, three = kept[2, checkpointing], kept[3, checkpointing]
        return two + (config.num_layers - 2) * (three - two), three - two

    activations, of_one = of_layers(activation_checkpointing)
    recomputed = 0 if activation_checkpointing == "none" else of_layers("none")[1] - of_one
    # At the end of backward every layer has left q, do, lse and delta for the slots below it.
    reader = tokens * config.num_heads * (2 * config.head_dim * width + 8) if config.depth_kv else 0
    # Gradients of gate and up, and silu(gate) * up once more (models.swiglu; its gradient, which is made without
    # quack-kernels only, is not counted); gradients of three tensors of the residual stream; of the weights of a unit
    # of FSDP2, and again in fp32 to be reduced.
    block = tokens * (3 * config.intermediate_size + 3 * config.hidden_size) * width
    block += unit_parameters * (width + 4)
    at_a_time = 2 * unit_parameters if reshard_after_forward else parameters - root_parameters
    return Memory(
        weights=shard,
        gradients=shard,
        optimizer=2 * shard,
        accumulated=4 * parameters if accumulates else 0,
        gathered=(root_parameters + at_a_time) * width,
        activations=activations,
        slots=_slots(config, config.num_layers, tokens, compute_dtype),
        readers=config.num_layers * reader,
        loss=chunk_tokens(tokens, config.padded_vocab_size, compute_dtype) * config.padded_vocab_size * width,
        block=block + recomputed,
        output=root_parameters * (width + reduced),
    )


@lru_cache
def _kept(
    shape: tuple[tuple[str, Any], ...],
    micro_batch_size: int,
    sequence_length: int,
    compute_dtype: torch.dtype,
    compiled: bool,
) -> dict[tuple[int, str], int]:
    """Bytes that a forward pass leaves for backward, weights left out, by (layers, activation checkpointing).

    `shape`: fields of the configuration. The passes are real ones, on the meta device, through two and three layers, or
    all of them where these are fewer.
    """
    config = ModelConfig(**dict(shape))
    counts = (config.num_layers,) if config.num_layers <= 3 else (2, 3)
    models = {}
    for kind in ACTIVATION_CHECKPOINTING:  # all are prepared before one runs: compiled regions are then shared
        for num_layers in counts:
            with torch.device("meta"):
                model = Decoder(replace(config, num_layers=num_layers)).to(compute_dtype)
            prepare_blocks(model, kind, "aot_eager_decomp_partition" if compiled else None)
            models[num_layers, kind] = model
    ids = torch.empty(micro_batch_size, sequence_length, dtype=torch.long, device="meta")
    kept = {key: _saved(model, ids) for key, model in models.items()}
    if config.depth_kv:
        # Full checkpointing drops what blocks save; the stream's slots are not part of that and stay.
        for num_layers in counts:
            kept[num_layers, "full"] += _slots(config, num_layers, ids.numel(), compute_dtype)
    return kept


def _slots(config: ModelConfig, num_layers: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of the depth slots of so many layers."""
    return 2 * num_layers * config.slots_per_layer * tokens * config.num_kv_heads * config.head_dim * dtype.itemsize


def _saved(model: Decoder, ids: torch.Tensor) -> int:
    """Bytes of what autograd saves of the loss of `ids`, weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.UntypedStorage] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, ids)
    return sum(kept.values())


def describe(config: ModelConfig, sequence_length: int, held: Memory) -> str:
    """A table of all of the above, printed before the first step."""
    parameters, flops = count_parameters(config), forward_flops(config, sequence_length)
    full, causal = training_flops_per_token(config, sequence_length)
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
        ("training", f"{_scaled(full, 'FLOP')} a token full, {_scaled(causal)} causal"),
        ("memory of a rank", f"{_scaled(held.total, 'B')} at the peak, {held.peak}"),
        *((f"  {field.name}", _scaled(getattr(held, field.name), "B")) for field in fields(held)),
    ]
    return "\n".join(f"{name:<26}{value}" for name, value in rows)


def _scaled(value: float, unit: str = "") -> str:
    """Four significant digits with a prefix: 705.8 M, 8.275 TFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.95 or prefix == "P":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}".rstrip()
