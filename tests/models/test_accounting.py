"""Counts against the tables of the paper (arXiv 2603.15619, Tables 3 and 6) and against a real forward pass."""

import pytest
import torch

from models.accounting import count_parameters, describe, forward_flops, memory, peak_flops, slots_read
from models.config import ModelConfig
from models.decoder import Decoder
from models.parallelize import prepare_blocks

STUDY = {
    "hidden_size": 384,
    "num_heads": 6,
    "num_kv_heads": 2,
    "intermediate_size": 1536,
    "vocab_size": 50304,
    "bias": True,
    "qk_norm": False,
    "ffn_kv_last_layer": True,
}
DEPTH = {"depth_kv": True}
FFN = {"depth_kv": True, "ffn_kv_proj": True}
ATTENTION = {"depth_kv": True, "ffn_kv_proj": True, "attn_kv_proj": True}


# Table 3: parameters in millions, forward TFLOP of one 4096-token sequence
@pytest.mark.parametrize(
    ("fields", "millions", "teraflops"),
    [
        ({"num_layers": 36}, 669.0, 8.01),
        ({"num_layers": 38}, 700.5, 8.41),
        ({"num_layers": 36, **DEPTH}, 669.0, 8.02),
        ({"num_layers": 36, **FFN}, 705.7, 8.33),
        ({"num_layers": 36, **ATTENTION}, 742.4, 8.63),
    ],
)
def test_table_3(fields, millions, teraflops):
    config = ModelConfig(**fields)
    assert count_parameters(config).total / 1e6 == pytest.approx(millions, abs=0.1)
    assert forward_flops(config, 4096).full / 1e12 == pytest.approx(teraflops, rel=0.01)


# Table 6: parameters in millions
@pytest.mark.parametrize(
    ("layers", "fields", "millions"),
    [
        (48, {}, 123.38),
        (48, DEPTH, 123.38),
        (48, FFN, 128.11),
        (24, {}, 71.35),
        (24, DEPTH, 71.35),
        (24, FFN, 73.72),
    ],
)
def test_table_6(layers, fields, millions):
    config = ModelConfig(num_layers=layers, **STUDY, **fields)
    assert count_parameters(config).total / 1e6 == pytest.approx(millions, abs=0.02)


def test_slots_read_follow_the_layers_and_their_bounds():
    assert slots_read(ModelConfig(num_layers=36)) == 0
    assert slots_read(ModelConfig(num_layers=36, **DEPTH)) == 36 * 35 // 2
    assert slots_read(ModelConfig(num_layers=36, **FFN)) == 36 * 35
    assert (
        slots_read(ModelConfig(num_layers=5, depth_recent_layers=1, depth_first_layers=1, **DEPTH)) == 0 + 1 + 2 + 2 + 2
    )


def small(**fields):
    shape = {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return ModelConfig(**{**shape, "intermediate_size": 128, "vocab_size": 250, **fields})


@pytest.mark.parametrize("fields", [{}, FFN, {"tie_embeddings": False}], ids=str)
def test_matmul_operations_equal_those_that_run(fields):
    """torch counts every matrix product of a real forward pass; attention's own are subtracted by the causal count."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small(**fields)
    model, ids = Decoder(config), torch.zeros(1, 32, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    expected = forward_flops(config, 32)
    padding = 2 * 32 * (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    # The reference computes whole rows of the square for one chunk of queries.
    assert counter.get_total_flops() == expected.matmul + expected.attention_full + expected.depth + padding


@pytest.mark.parametrize(
    ("checkpointing", "compiled"), [("none", False), ("selective", False), ("full", False), ("none", True)]
)
@pytest.mark.parametrize("fields", [{}, FFN], ids=str)
def test_activation_bytes_equal_what_autograd_keeps(fields, checkpointing, compiled):
    """On the CPU, of all five layers; the estimate looks at two and three of them on the meta device."""
    config = small(**{**fields, "num_layers": 5})
    model, ids, kept = Decoder(config).bfloat16(), torch.zeros(2, 32, dtype=torch.long), {}
    prepare_blocks(model, checkpointing, "aot_eager_decomp_partition" if compiled else None)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(ids, ids)
    estimate = memory(config, 2, 32, activation_checkpointing=checkpointing, compiled=compiled)
    slots = 2 * 5 * config.slots_per_layer * 2 * 32 * config.num_kv_heads * config.head_dim * 2
    outside_autograd = slots if checkpointing == "full" else 0  # the stream's, which no checkpoint drops
    assert estimate.activations == sum(kept.values()) + outside_autograd
    assert estimate.slots == slots
    assert estimate.readers == (5 * 2 * 32 * config.num_heads * (4 * config.head_dim + 8) if fields else 0)


def test_estimates_of_all_kinds_of_checkpointing_share_their_compiled_regions():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    for checkpointing in ("none", "selective", "full", "none"):
        memory(small(**FFN), 2, 48, activation_checkpointing=checkpointing, compiled=True)
    assert counters["stats"]["unique_graphs"] == 3  # before attention, after it, and after it in the last layer


def test_the_peak_is_the_moment_at_which_most_is_held():
    config = small(**FFN)
    held = memory(config, 2, 32)
    assert held.total == max(held.moments.values()) == held.moments[held.peak]
    long = memory(config, 64, 32)
    assert long.peak in ("loss", "begin of backward")
    assert long.total > long.weights + long.optimizer + long.activations
    assert memory(config, 1, 1).peak == "end of backward"
    # Computed again, activations are little: what stays until the end of backward, slots and readers, is the most.
    again = memory(small(**{**FFN, "num_kv_heads": 4, "head_dim": 64}), 64, 512, activation_checkpointing="full")
    assert again.peak == "end of backward"
    assert again.total > again.slots + again.readers + again.block
    assert memory(config, 2, 32, accumulates=True).total > held.total
    assert memory(config, 2, 32, reshard_after_forward=False).total > held.total


def test_replicas_are_whole_copies():
    config = small(**FFN)
    assert memory(config, 2, 32, world_size=4, replicate=4) == memory(config, 2, 32)
    assert memory(config, 2, 32, world_size=4, replicate=2) == memory(config, 2, 32, world_size=2)


def test_memory_is_sharded_and_checkpointing_saves_activations():
    config = small(**FFN)
    one, two = (memory(config, 2, 32, world_size=n) for n in (1, 2))
    assert one.optimizer == pytest.approx(2 * two.optimizer, rel=1e-3)
    assert one.activations == two.activations
    assert two.output == 3 * one.output, "two ranks reduce fp32 gradients beside bf16 ones, one reduces them in place"
    assert memory(config, 2, 32, activation_checkpointing="full").activations < one.activations / 2


def test_peak_is_known_for_named_devices_and_none_for_others():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 2080") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "GRID A100-10C",
        "NVIDIA H100-1-10CME",
        "NVIDIA L40S-8Q",
        "NVIDIA L40S-24A",
        "NVIDIA L40S-8B",
    ],
)
def test_a_slice_of_a_device_has_no_peak(name):
    assert peak_flops(name) is None


def test_the_table_shows_the_counts():
    config = ModelConfig(**FFN)
    text = describe(config, 4096, memory(small(**FFN), 1, 16))
    for words in ("705.8 M", "36.72 M", "1,260 slots", "8.275 TFLOP full", "6.061 GFLOP a token full, 5.155 G causal"):
        assert words in text, text
