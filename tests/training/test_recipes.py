"""The models and the recipe that `model=NAME` on the command line gives, against the paper (PAPER.md).

What is tested is the composed configuration, files and defaults and overrides together: Tables 3 and 6, the shapes of
section 3, and the constants of section 5, drawn weights included.
"""

import dataclasses
import math
from functools import cache

import pytest
import torch

from models.accounting import forward_flops
from models.config import ModelConfig
from models.decoder import Decoder
from models.initialization import initialize
from training.compose import plan
from training.config import Config
from training.optimizer import build_optimizer
from training.schedule import lr_factor

DEPTH, FFN = "model.depth_kv=true", "model.ffn_kv_proj=true"
LARGE = ("olmo2_700m", "olmo2_700m_38l", "moda_700m", "olmo2_1_5b", "moda_1_5b")
STUDY = ("study_24l", "study_48l")
TINY = ("olmo2_tiny", "moda_tiny")

# Arguments; parameters in millions; forward TFLOP of 4096 tokens, as printed and by the formula of section 3.
TABLE_3 = [
    (["model=olmo2_700m"], 669.0, 8.01, 7.95),
    (["model=olmo2_700m_38l"], 700.5, 8.41, 8.35),
    (["model=moda_700m", "model.ffn_kv_proj=false"], 669.0, 8.02, 7.96),
    (["model=moda_700m"], 705.7, 8.33, 8.28),
    (["model=moda_700m", "model.attn_kv_proj=true"], 742.4, 8.63, 8.58),
]
TABLE_6 = [
    (["model=study_48l", "model.norm=pre"], 123.38),
    (["model=study_48l", "model.norm=post"], 123.38),
    (["model=study_48l", "model.norm=pre", DEPTH], 123.38),
    (["model=study_48l", "model.norm=post", DEPTH], 123.38),
    (["model=study_48l", "model.norm=pre", DEPTH, FFN], 128.11),
    (["model=study_48l", "model.norm=post", DEPTH, FFN], 128.11),
    (["model=study_24l", "model.norm=post"], 71.35),
    (["model=study_24l", "model.norm=post", DEPTH], 71.35),
    (["model=study_24l", "model.norm=post", DEPTH, FFN], 73.72),
]


# Section 3: layers, width, query heads, kv heads, head dim, SwiGLU hidden, vocabulary, biases, QK-norm, FFN KV
# projection of the last layer, tied embeddings.
SHAPES = {
    "olmo2_700m": (36, 1024, 16, 8, 64, 4096, 100278, False, True, False, True),
    "olmo2_700m_38l": (38, 1024, 16, 8, 64, 4096, 100278, False, True, False, True),
    "moda_700m": (36, 1024, 16, 8, 64, 4096, 100278, False, True, False, True),
    "olmo2_1_5b": (36, 1536, 24, 12, 64, 6144, 100278, False, True, False, True),
    "moda_1_5b": (36, 1536, 24, 12, 64, 6144, 100278, False, True, False, True),
    "study_48l": (48, 384, 6, 2, 64, 1536, 50304, True, False, True, True),
    "study_24l": (24, 384, 6, 2, 64, 1536, 50304, True, False, True, True),
}


def words(value):
    return " ".join(value) if isinstance(value, list) else None


@cache
def composed(*arguments: str) -> Config:
    """What the arguments give. Read only: tests that change it make a copy."""
    (job,) = plan(list(arguments)).jobs
    job.config.validate()
    return job.config


def millions(config: ModelConfig) -> float:
    """Parameters, counted on the modules; rows that pad the embedding are left out."""
    with torch.device("meta"):
        model = Decoder(config)
    tables = [m.weight for m in (model.embedding, model.head) if m is not None]
    padding = sum((table.shape[0] - config.vocab_size) * table.shape[1] for table in tables)
    return (sum(p.numel() for p in model.parameters()) - padding) / 1e6


@pytest.mark.parametrize(
    ("arguments", "parameters", "printed", "derived"),
    TABLE_3,
    ids=words,
)
def test_parameters_and_operations_of_table_3(arguments, parameters, printed, derived):
    config = composed(*arguments)
    assert millions(config.model) == pytest.approx(parameters, abs=0.1)
    teraflops = forward_flops(config.model, config.data.sequence_length).full / 1e12
    assert teraflops == pytest.approx(printed, rel=0.01)
    assert teraflops == pytest.approx(derived, abs=0.005)


@pytest.mark.parametrize(("arguments", "parameters"), TABLE_6, ids=words)
def test_parameters_of_table_6(arguments, parameters):
    assert millions(composed(*arguments).model) == pytest.approx(parameters, abs=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_section_3(name):
    m = composed(f"model={name}").model
    shape = (m.num_layers, m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim, m.intermediate_size, m.vocab_size)
    assert (*shape, m.bias, m.qk_norm, m.ffn_kv_last_layer, m.tie_embeddings) == SHAPES[name]
    assert m.padded_vocab_size == {100278: 100352, 50304: 50304}[m.vocab_size]


@pytest.mark.parametrize(("name", "billions"), [("olmo2_1_5b", 1.43), ("moda_1_5b", 1.51)])
def test_the_second_size_has_the_parameters_of_section_3(name, billions):
    assert millions(composed(f"model={name}").model) / 1e3 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("name", LARGE + STUDY)
def test_depth_is_on_in_moda_alone_and_nothing_beyond_the_paper_is(name):
    m, moda = composed(f"model={name}").model, name.startswith("moda")
    assert (m.depth_kv, m.ffn_kv_proj, m.attn_kv_proj) == (moda, moda, False)
    assert (m.value_norm, m.depth_recent_layers, m.depth_first_layers) == (False, None, 0)


@pytest.mark.parametrize("name", LARGE + STUDY + TINY)
def test_every_model_has_the_constants_of_olmo_2(name):
    config = composed(f"model={name}")
    m, o, s = config.model, config.optimizer, config.schedule
    assert (m.norm_eps, m.rope_theta, m.init_std, m.z_loss) == (1e-6, 500_000, 0.02, 1e-5)
    assert (o.beta1, o.beta2, o.eps, o.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (s.name, s.final_lr_ratio, config.training.max_grad_norm) == ("cosine", 0.1, 1.0)
    assert m.norm == ("pre" if name in STUDY else "reordered")


@pytest.mark.parametrize("name", LARGE)
def test_large_models_have_the_papers_batch_length_and_rates(name):
    config = composed(f"model={name}")
    t, length = config.training, config.data.sequence_length
    assert (t.global_batch_size, length) == (1024, 4096)
    assert t.steps * t.global_batch_size * length == pytest.approx(400e9, abs=1024 * 4096)  # to the step
    assert t.stop_at is None
    rates = [config.optimizer.lr * lr_factor(config.schedule, step, t.steps) for step in range(t.steps)]
    assert rates.index(max(rates)) + 1 == 2000
    assert rates[1999] == pytest.approx(3e-4)
    assert rates[999] == pytest.approx(1.5e-4)
    assert rates[-1] == min(rates[1999:]) == pytest.approx(3e-5)


@pytest.mark.parametrize("arguments", [["model=moda_700m"], ["model=study_24l", DEPTH, FFN]], ids=words)
def test_adamw_gets_the_constants_and_spares_the_embedding_alone(arguments):
    config = composed(*arguments)
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(config.model, num_layers=2))
    groups = build_optimizer(model, config.optimizer).param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decay[p] for name, p in model.named_parameters()} == {
        name: 0.0 if name == "embedding.weight" else 0.1 for name, _ in model.named_parameters()
    }
    for group in groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.95), 1e-8, False)


@pytest.mark.parametrize(
    "arguments",
    [["model=moda_700m", "model.attn_kv_proj=true"], ["model=study_24l", DEPTH, FFN, "model.tie_embeddings=false"]],
    ids=words,
)
def test_drawn_weights_are_a_normal_of_002_cut_at_three_deviations(arguments):
    """Two layers of the model, cut narrower; every matrix by itself, so that none is scaled by depth or width."""
    smaller = {"num_layers": 2, "vocab_size": 1000, "intermediate_size": 1024}
    model = Decoder(dataclasses.replace(composed(*arguments).model, **smaller))
    initialize(model, seed=0)
    std, cut = 0.02, 3.0
    inside = math.erf(cut / math.sqrt(2))  # of a normal
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    narrowed = std * math.sqrt(1 - 2 * cut * density / inside)
    tail = (math.erf(cut / math.sqrt(2)) - math.erf(2 / math.sqrt(2))) / inside
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((weight == 1).all()), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        else:
            assert weight.abs().max() <= cut * std, name
            assert weight.abs().max() > 2.99 * std, name
            assert (weight.abs() > 2 * std).float().mean().item() == pytest.approx(tail, rel=0.05), name
            assert weight.std().item() == pytest.approx(narrowed, rel=0.006), name
            assert abs(weight.mean().item()) < 0.01 * std, name
