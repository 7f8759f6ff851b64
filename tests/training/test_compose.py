"""training/compose.py: what is typed is trained; models, recipes, sweeps and run directories are as documented."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from models.config import ConfigError
from training.compose import CONFIGS, Job, as_yaml, load_config, plan
from training.config import Config, resolved

MODELS = {path.stem for path in (CONFIGS / "model").glob("*.yaml")}


def single(*overrides) -> Config:
    (job,) = plan(list(overrides)).jobs
    assert job.label == ""
    return job.config


def sweep(*arguments) -> list[Job]:
    return plan(list(arguments)).jobs


def test_the_issues_models_are_there():
    assert sorted(MODELS) == [
        "moda_1_5b",
        "moda_700m",
        "moda_tiny",
        "olmo2_1_5b",
        "olmo2_700m",
        "olmo2_700m_38l",
        "olmo2_tiny",
        "study_24l",
        "study_48l",
    ]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_model_composes_is_valid_and_names_its_run(model):
    config = single(f"model={model}")
    config.validate()
    assert config.warnings() == []
    assert (config.model.name, config.run.name, config.run.dir) == (model, model, f"runs/{model}")


# layers, width, query heads, kv heads, head width, SwiGLU width, vocabulary: the paper's, but for 1.5b and tiny
SHAPES = {
    "olmo2_700m": (36, 1024, 16, 8, 64, 4096, 100278),
    "olmo2_700m_38l": (38, 1024, 16, 8, 64, 4096, 100278),
    "olmo2_1_5b": (36, 1536, 24, 12, 64, 6144, 100278),
    "study_24l": (24, 384, 6, 2, 64, 1536, 50304),
    "study_48l": (48, 384, 6, 2, 64, 1536, 50304),
    "olmo2_tiny": (4, 128, 4, 2, 32, 512, None),
}


@pytest.mark.parametrize("model", SHAPES)
def test_shapes(model):
    m = single(f"model={model}").model
    shape = (m.num_layers, m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim, m.intermediate_size, m.vocab_size)
    assert shape == SHAPES[model]
    assert m.tie_embeddings
    assert (m.depth_kv, m.ffn_kv_proj, m.attn_kv_proj, m.value_norm) == (False,) * 4
    study = model.startswith("study")
    assert (m.bias, m.qk_norm, m.ffn_kv_last_layer) == (study, not study, study)
    assert m.norm == ("pre" if study else "reordered")


@pytest.mark.parametrize("size", ["tiny", "700m", "1_5b"])
def test_a_moda_config_is_its_baseline_plus_switches(size):
    baseline, moda = resolved(single(f"model=olmo2_{size}")), resolved(single(f"model=moda_{size}"))
    switches = {"name": f"moda_{size}", "depth_kv": True, "ffn_kv_proj": True}
    assert moda["model"] == baseline["model"] | switches
    assert moda | {"model": None, "run": None} == baseline | {"model": None, "run": None}


@pytest.mark.parametrize("larger", ["olmo2_700m_38l", "study_48l"])
def test_a_deeper_model_differs_in_depth_alone(larger):
    base = {"olmo2_700m_38l": "olmo2_700m", "study_48l": "study_24l"}[larger]
    small, large = single(f"model={base}").model, single(f"model={larger}").model
    assert dataclasses.replace(large, name=base, num_layers=small.num_layers) == small


def test_the_default_recipe_is_the_papers():
    config = single()
    t, o, s = config.training, config.optimizer, config.schedule
    assert config.model.name == "moda_700m"
    assert (t.global_batch_size, config.data.sequence_length, t.max_grad_norm) == (1024, 4096, 1.0)
    tokens = t.steps * t.global_batch_size * config.data.sequence_length
    assert abs(tokens - 400e9) < 1024 * 4096  # 400 B, to the step
    assert (o.lr, o.lr * s.final_lr_ratio) == (3e-4, pytest.approx(3e-5))
    assert (s.name, s.warmup_steps) == ("cosine", 2000)
    assert (o.beta1, o.beta2, o.eps, o.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert config.data.path == "shards/c4"
    assert "output=shards/c4" in config.data.prepare


def test_the_defaults_of_schema_and_files_agree_but_for_names():
    composed, schema = resolved(single("model=olmo2_700m")), resolved(Config())
    for tree in (composed, schema):
        del tree["run"], tree["model"]["name"], tree["data"]["prepare"]
    assert composed == schema


def test_a_tiny_model_brings_its_own_recipe_and_the_command_line_wins_over_it():
    assert single("model=moda_tiny").data.sequence_length == 256
    config = single("optimizer.lr=1e-4", "training.steps=7", "model=moda_tiny", "model.num_layers=2", "schedule=wsd")
    assert (config.optimizer.lr, config.training.steps, config.model.num_layers) == (1e-4, 7, 2)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("wsd", 30)


@pytest.mark.parametrize("group", ["optimizer", "schedule", "parallel", "checkpoint", "evaluation", "logging"])
def test_no_model_recipe_hides_an_option_that_is_chosen_by_hand(group):
    options = [path.stem for path in (CONFIGS / group).glob("*.yaml")]
    seen = {yaml.safe_dump(resolved(single("model=moda_tiny", f"{group}={option}"))) for option in options}
    assert len(seen) == len(options)


def test_words_that_users_type():
    config = single(
        *("model=moda_tiny", "model.norm=pre", "model.value_norm=true", "model.attn_kv_proj=true", "data.path=S"),
        *("training.stop_at=5", "training.seed=3", "logging.every=2", "logging.wandb.mode=offline"),
        *("checkpoint.every=5", "checkpoint.resume=never", "evaluation.every=5", "run.name=first"),
    )
    assert (config.model.norm, config.model.value_norm, config.model.attn_kv_proj) == ("pre", True, True)
    assert (config.training.stop_at, config.training.seed, config.logging.every) == (5, 3, 2)
    assert (config.checkpoint.resume, config.logging.wandb.mode) == ("never", "offline")
    assert (config.run.dir, config.data.path) == ("runs/first", "S")
    assert single("run.dir=/x").run.dir == "/x"


def test_the_demo():
    config = single("experiment=demo")
    assert (config.run.dir, config.model.name, config.data.path) == ("runs/demo", "moda_tiny", "demo/shards")
    assert "source=embedded" in config.data.prepare


def test_data_of_ones_own_needs_a_path():
    with pytest.raises(ConfigError, match=r"data\.path"):
        single("data=files").validate()
    assert "output=here" in single("data=files", "data.path=here").data.prepare


def test_a_sweep_is_the_product_in_order_with_numbered_directories():
    jobs = sweep("-m", "model=study_24l", "model.norm=pre,post", "model.depth_kv=false,true")
    assert [job.config.run.dir for job in jobs] == [f"sweeps/study_24l/{i}" for i in range(4)]
    found = [(job.config.model.norm, job.config.model.depth_kv) for job in jobs]
    assert found == [("pre", False), ("pre", True), ("post", False), ("post", True)]
    assert jobs[2].label == "model.norm=post model.depth_kv=False"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["model=moda_tiny"], "run.name"),
        (["run.name=a/b"], "run.name"),
        (["run.dir=elsewhere", "run.name=first"], "run.dir"),
        (["run.dir=sweeps/first"], "run.dir"),
        (["-m", "model=glob(*_tiny)"], "run.name"),
        (["-m", "model=glob(*_tiny)", "run.name=a"], "run.name"),
        (["-m", "run.name=a,b"], "run.name"),
        (["-m", "model=glob(*_tiny)", "hydra.sweep.dir=sweeps/elsewhere"], "hydra.sweep.dir"),
    ],
)
def test_the_key_that_places_a_run_is_known(arguments, key):
    for job in plan(arguments).jobs:
        assert job.config.run.placed_by == key


def test_the_same_sweep_has_the_same_directories_again():
    arguments = ("-m", "model=moda_tiny", "training.seed=range(3)")
    assert sweep(*arguments) == sweep(*arguments)
    assert len(sweep(*arguments)) == 3


def test_swept_models_share_one_directory():
    assert [j.config.run.dir for j in sweep("-m", "model=glob(*_tiny)")] == ["sweeps/moda_tiny/0", "sweeps/moda_tiny/1"]


def test_the_directory_of_a_sweep_can_be_chosen():
    jobs = sweep("-m", "training.seed=1,2", "hydra.sweep.dir=S", "hydra.sweep.subdir='seed-${training.seed}'")
    assert [job.config.run.dir for job in jobs] == ["S/seed-1", "S/seed-2"]


def test_a_written_down_sweep_needs_no_flag_and_can_be_changed_by_hand():
    jobs = sweep("sweep=norm_study", "model.norm=pre", "training.steps=10")
    assert [(job.config.model.depth_kv, job.config.training.steps) for job in jobs] == [(False, 10), (True, 10)]
    assert [job.config.run.dir for job in jobs] == ["sweeps/norm_study/0", "sweeps/norm_study/1"]
    found = [(job.config.model.norm, job.config.model.depth_kv) for job in sweep("sweep=norm_study")]
    assert found == [(norm, depth) for norm in ("reordered", "pre", "post") for depth in (False, True)]


def test_two_equal_jobs_are_refused():
    with pytest.raises(ConfigError, match=r"The sweep has model\.norm=pre twice, two equal jobs: give each value once"):
        sweep("-m", "model.norm=pre,post,pre")


def test_one_wrong_job_refuses_the_whole_sweep():
    with pytest.raises(ConfigError, match="model=moda_7m does not exist"):
        plan(["-m", "model=moda_tiny,moda_7m"])


def test_configurations_of_ones_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [moda_tiny, _self_]\nmodel: {name: mine, num_layers: 2}\n"
    )
    config = single("--config-dir", str(tmp_path), "model=mine")
    assert (config.model.num_layers, config.model.depth_kv, config.run.dir) == (2, True, "runs/mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layer: 2}", "model/mine.yaml: unknown key `model.num_layer`: did you mean `model.num_layers`?"),
        ("model: {num_layers: two}", "model/mine.yaml: model.num_layers=two has the wrong type: use an integer."),
        ("defaults: [moda_tiney]", "model=moda_tiney does not exist"),
        ("model: {num_layers: [2}", "is not valid YAML"),
    ],
)
def test_mistakes_in_files_are_named_with_the_file(tmp_path, text, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        plan(["--config-dir", str(tmp_path), "model=mine"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_directory_is_read_back(tmp_path):
    config = single("model=moda_tiny", "run.name=a", "logging.wandb.tags=[x,y]", "optimizer.eps=1e-9")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    assert load_config(tmp_path) == load_config(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    assert load_config(str(tmp_path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.yaml does not exist"),
        ("model: {num_layer: 2}", "config.yaml: unknown key `model.num_layer`: did you mean `model.num_layers`?"),
        ("training: {steps: x}", "config.yaml: training.steps=x has the wrong type: use an integer."),
        ("training: {steps: [}", "is not valid YAML"),
        ("- 1", "config.yaml"),
    ],
)
def test_a_run_directory_that_cannot_be_read_is_named(tmp_path, text, message):
    path = Path(tmp_path / "config.yaml")
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
