"""training/config.py: values that cannot run are refused by name, before anything else looks at them."""

import dataclasses

import pytest

from models.config import ConfigError
from training.config import Config, MixtureEntry, resolved


def with_value(key, value):
    config = Config()
    *sections, name = key.split(".")
    target = config
    for section in sections:
        target = getattr(target, section)
    assert name in {f.name for f in dataclasses.fields(target)}
    setattr(target, name, value)
    return config


def test_the_defaults_are_valid():
    Config().validate(world_size=8)


def test_a_start_ends_where_it_is_to_stop_or_after_all_steps():
    training = Config().training
    assert training.last_step == training.steps
    training.stop_at = 10
    assert training.last_step == 10
    training.steps = 5  # not validated yet
    assert training.last_step == 5
    assert "last_step" not in resolved(Config())["training"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.name", " "),
        ("run.name", "../other"),
        ("run.name", "/other"),
        ("run.dir", ""),
        ("run.dir", "runs/" + 300 * "n"),
        ("training.skip_window", 3),
        ("training.skip_window", 10**12),  # no memory holds it
        ("training.global_batch_size", 4 * 10**12),
        ("training.micro_batch_size", 10**5),  # 400 M tokens
        ("data.sequence_length", 10**9),
        ("data.workers", 100_000),
        ("model.num_layers", 0),
        ("model.num_layers", 100_000),
        ("model.hidden_size", 10**9),
        ("model.vocab_size", 10**12),
        ("model.num_kv_heads", 3),
        ("model.head_dim", 63),
        ("model.norm", "layer"),
        ("model.z_loss", -1.0),
        ("model.rope_theta", float("inf")),
        ("model.vocab_size", 1),
        ("model.ffn_kv_proj", True),
        ("model.attn_kv_proj", True),
        ("model.depth_recent_layers", 0),
        ("model.depth_first_layers", -1),
        ("model.depth_first_layers", 2),
        ("data.path", ""),
        ("data.sequence_length", 0),
        ("data.packing", "worst_fit"),
        ("data.workers", 0),
        ("data.timeout", 0.0),
        ("data.timeout", 1e300),
        ("training.steps", 0),
        ("training.steps", 10**20),
        ("training.global_batch_size", -8),
        ("training.micro_batch_size", 0),
        ("training.seed", -1),
        ("training.seed", 2**63),
        ("training.stop_at", 0),
        ("training.stop_at", 95_368),
        ("training.device", "gpu"),
        ("training.precision", "fp16"),
        ("training.max_grad_norm", -1.0),
        ("optimizer.lr", 0.0),
        ("optimizer.lr", 1e300),
        ("optimizer.eps", 1e30),
        ("training.hang_seconds", 1e-9),
        ("model.norm_eps", 1e30),
        ("model.init_std", 1e20),
        ("model.rope_theta", 1e-300),
        ("optimizer.lr", float("nan")),
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", -0.1),
        ("optimizer.eps", 0.0),
        ("optimizer.weight_decay", -0.1),
        ("schedule.name", "cosin"),
        ("schedule.warmup_steps", -1),
        ("schedule.final_lr_ratio", 1.5),
        ("schedule.decay_fraction", 0.0),
        ("parallel.activation_checkpointing", "some"),
        ("parallel.attention_backend", "flash"),
        ("parallel.replicate", 0),
        ("parallel.replicate", 2),
        ("logging.profile.steps", [0]),
        ("logging.profile.steps", [5, 100_000]),
        ("logging.profile.memory", True),
        ("checkpoint.every", 0),
        ("checkpoint.keep", 0),
        ("checkpoint.resume", ""),
        ("evaluation.every", -1),
        ("evaluation.instances", 0),
        ("evaluation.micro_batch_size", 0),
        ("evaluation.micro_batch_size", 10**10),
        ("logging.every", 0),
        ("logging.wandb.mode", "ofline"),
        ("logging.wandb.project", ""),
    ],
)
def test_a_value_that_cannot_run_is_named_with_its_key(key, value):
    with pytest.raises(ConfigError) as caught:
        with_value(key, value).validate()
    assert str(caught.value).startswith(f"{key}={value}".replace("True", "true"))


@pytest.mark.parametrize(
    ("path", "entries", "message"),
    [
        ("shards", [("a", 1.0)], "data.path=shards cannot be used: data.mixture is given too"),
        ("", [], "data.path= cannot be used"),
        ("", [("a", 1.0), ("", 1.0)], "data.mixture[1].path= cannot be used"),
        ("", [("a", 1.0), ("b", 0.0)], "data.mixture[1].weight=0.0 cannot be used"),
        ("", [("a", 1.0), ("b", 1.0), ("a", 2.0)], "data.mixture[2].path=a cannot be used: it is there before"),
    ],
)
def test_a_mixture_that_cannot_run_is_named_with_its_entry(path, entries, message):
    config = Config()
    config.data.path, config.data.mixture = path, [MixtureEntry(*entry) for entry in entries]
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.vocab_size", None),
        ("training.stop_at", 95_367),
        ("training.max_grad_norm", 0.0),
        ("schedule.warmup_steps", 0),
        ("checkpoint.keep", None),
        ("evaluation.every", 0),
        ("evaluation.instances", None),
        ("model.num_kv_heads", 16),
        ("model.z_loss", 0.0),
    ],
)
def test_the_edge_of_what_is_allowed_is_allowed(key, value):
    with_value(key, value).validate()


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "remedy"),
    [
        (10, 4, 2, "training.global_batch_size=8 or 16, or training.micro_batch_size=1"),
        (6, 4, 2, "training.global_batch_size=8, or training.micro_batch_size=3"),
        (1024, 8, 3, "training.global_batch_size=1008 or 1032"),
        (4, 4000, 1, "training.global_batch_size=4000, or training.micro_batch_size=4"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_values_that_do(batch, micro, ranks, remedy):
    config = Config()
    config.training.global_batch_size, config.training.micro_batch_size = batch, micro
    with pytest.raises(ConfigError) as caught:
        config.validate(ranks)
    assert str(caught.value) == (
        f"training.global_batch_size={batch} is not divisible by training.micro_batch_size={micro} × world size "
        f"{ranks} = {micro * ranks}: use {remedy}."
    )


def test_a_proposed_batch_is_accepted():
    config = Config()
    config.training.global_batch_size = 1032
    config.validate(3)


def test_a_warmup_longer_than_the_run_is_a_warning_and_no_error():
    config = Config()
    assert config.warnings() == []
    config.training.steps = 300
    config.validate()
    (warning,) = config.warnings()
    assert "schedule.warmup_steps=2000" in warning
    assert "training.steps=300" in warning


def test_resolved_is_plain_and_whole():
    tree = resolved(Config())
    assert tree["logging"]["wandb"]["tags"] == []
    assert list(tree) == [f.name for f in dataclasses.fields(Config)]
    assert type(tree["model"]) is dict
