"""training/preflight.py: a run that its data or its machine cannot carry is refused before it makes anything."""

import hashlib
import json

import pytest

from data.shards import DataError
from models.config import ConfigError
from tests.shards import VOCAB, tiny_config, write_shards
from training.compose import Job
from training.config import MixtureEntry
from training.data import validation_folders
from training.preflight import checked, preflight


@pytest.fixture
def config(shards, tmp_path):
    return tiny_config(shards, tmp_path / "run")


def message(kind, config):
    with pytest.raises(kind) as caught:
        preflight(config)
    return str(caught.value)


def test_a_null_vocabulary_is_the_tokenizers_rounded_up_to_128(config):
    config.model.vocab_size = None
    ready = preflight(config)
    assert ready.model.vocab_size == 128
    assert config.model.vocab_size is None


@pytest.mark.parametrize("size", [VOCAB, VOCAB + 1, 50304])
def test_a_smaller_tokenizer_is_accepted(config, size):
    config.model.vocab_size = size
    assert preflight(config).model.vocab_size == size


def test_a_larger_tokenizer_is_refused_by_name_with_both_sizes(config):
    config.model.vocab_size = VOCAB - 1
    text = message(ConfigError, config)
    assert text.startswith(f"model.vocab_size={VOCAB - 1} is smaller than the {VOCAB} ids of the tokenizer")
    assert "(counting)" in text


def test_missing_shards_show_the_command_that_prepares_them(config, tmp_path):
    config.data.path = str(tmp_path / "none")
    config.data.prepare = "python scripts/prepare_data.py source=x"
    text = message(DataError, config)
    assert text.startswith(f"data.path={tmp_path / 'none'} holds no token shards")
    assert text.endswith("\n  python scripts/prepare_data.py source=x")
    config.data.path = str(tmp_path / "not there")
    config.data.prepare = f"python scripts/prepare_data.py output={config.data.path}"
    assert message(DataError, config).endswith(f" 'output={tmp_path}/not there'")  # as a shell takes it


def test_an_unfinished_preparation_is_refused(config, tmp_path):
    config.data.path = str(write_shards(tmp_path / "shards"))
    (tmp_path / "shards" / "train" / "manifest.json").unlink()
    assert "did not finish" in message(DataError, config)


def test_a_sequence_longer_than_the_data_is_refused(config):
    config.data.sequence_length = 100_000
    assert message(DataError, config).startswith("data.sequence_length=100000 is longer than the data")


def test_a_sequence_longer_than_a_validation_domain_is_refused_unless_nothing_is_evaluated(config):
    config.data.sequence_length = 1000
    assert "validation" in message(DataError, config)
    config.evaluation.every = 0
    preflight(config)


def test_evaluation_without_validation_domains_is_refused(config, tmp_path):
    config.data.path = str(write_shards(tmp_path / "shards"))
    (tmp_path / "shards" / "validation").rename(tmp_path / "elsewhere")
    assert message(DataError, config).endswith("prepare some, or set evaluation.every=0.")
    config.evaluation.every = 0
    preflight(config)


def test_a_domain_of_another_tokenizer_is_refused(config, tmp_path):
    config.data.path = str(write_shards(tmp_path / "shards"))
    path = tmp_path / "shards" / "validation" / "odd" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["sha256"] = "1" * 64
    path.write_text(json.dumps(manifest))
    assert "different tokenizers" in message(DataError, config)


def test_a_tokenizer_file_of_other_data_is_refused_and_a_missing_one_is_not_needed(config, tmp_path):
    content = b"the tokenizer"
    shards = write_shards(tmp_path / "shards", tokenizer=hashlib.sha256(content).hexdigest())
    config.data.path, config.data.packing = str(shards), "best_fit"
    (shards / "tokenizer.json").write_bytes(b"another tokenizer")
    assert message(DataError, config).startswith(f"{shards}/tokenizer.json is not the tokenizer of {shards}/train")
    assert not list((shards / "train").glob("packing*")), "before any expensive work"
    (shards / "tokenizer.json").write_bytes(content)
    preflight(config)
    (shards / "tokenizer.json").unlink()
    preflight(config)


def test_more_evaluation_instances_than_there_are_is_fine(config):
    config.evaluation.instances = 10**6
    preflight(config)


def test_a_checkpoint_that_is_not_there_is_refused(config, tmp_path):
    config.checkpoint.resume = str(tmp_path / "step-5")
    assert message(ConfigError, config).startswith(f"checkpoint.resume={tmp_path / 'step-5'} is no folder")
    (tmp_path / "step-5").mkdir()
    preflight(config)


def test_a_run_directory_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "run").write_text("")
    assert message(ConfigError, config).startswith(f"run.dir={tmp_path / 'run'} cannot be made")


def test_a_run_directory_without_access_is_refused_with_what_to_do(config, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert message(ConfigError, config).endswith(
        f"{tmp_path} is not writable, so give access there or use another folder."
    )


def test_wandb_is_asked_for_only_where_it_is_used(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    preflight(config)
    config.logging.wandb.mode = "offline"
    assert message(ConfigError, config).startswith("logging.wandb.mode=offline needs the package wandb")


def test_cuda_without_a_device_is_refused(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config.training.device = "cuda"
    assert message(ConfigError, config).startswith("training.device=cuda cannot be used")
    config.training.device = "auto"
    preflight(config)


def test_more_ranks_than_gpus_are_refused(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config.training.device = "auto"
    assert "4 ranks of this host share 2 GPUs" in message(ConfigError, config)
    config.training.device = "cpu"
    preflight(config)


def test_an_altered_shard_is_found_unless_the_checksums_are_left_out(config, tmp_path):
    config.data.path = str(write_shards(tmp_path / "shards"))
    path = tmp_path / "shards" / "validation" / "odd" / "00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert message(DataError, config).startswith(f"{path} is damaged (its SHA-256 is not the manifest's)")
    config.data.verify = False
    preflight(config)


def test_a_mixture_is_checked_as_one(config, tmp_path):
    paths = [str(write_shards(tmp_path / name, seed=seed)) for seed, name in enumerate(("web", "code"))]
    config.data.path, config.data.mixture = "", [MixtureEntry(paths[0], 0.7), MixtureEntry(paths[1], 0.3)]
    preflight(config)
    assert sorted(validation_folders(config.data)) == ["code-even", "code-odd", "web-even", "web-odd"]
    (tmp_path / "code" / "validation" / "odd").rename(tmp_path / "code" / "validation" / "prime")
    assert sorted(validation_folders(config.data)) == ["code-even", "odd", "prime", "web-even"]
    config.data.mixture[1].path = str(write_shards(tmp_path / "other", tokenizer="1" * 64))
    assert "different tokenizers" in message(DataError, config)
    config.data.mixture[1].path = str(tmp_path / "nothing")
    assert message(DataError, config).startswith(f"data.path={tmp_path / 'nothing'} holds no token shards")


def test_packing_happens_before_the_run_and_says_so(config, tmp_path):
    config.data.path, config.data.packing = str(write_shards(tmp_path / "shards")), "best_fit"
    said = []
    preflight(config, said.append)
    assert "packing the 60 documents" in said[0]
    assert "% padding" in said[1]
    preflight(config, said.append)
    assert len(said) == 2


def test_nothing_is_written(config, tmp_path):
    preflight(config)
    assert list(tmp_path.iterdir()) == []


def test_a_job_of_a_sweep_is_named_and_the_number_of_ranks_counts(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"world size 3 .*\(job training.seed=7\)$"):
        checked(Job(config, label="training.seed=7"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert checked(Job(config)).config == preflight(config)


def test_compiling_on_a_cpu_without_a_compiler_is_refused(config, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None if name in ("g++", "/no/cc") else f"/usr/bin/{name}")
    monkeypatch.delenv("CXX", raising=False)
    preflight(config)
    config.parallel.compile = True
    for config.training.device in ("auto", "cpu"):
        assert "on a CPU needs a C++ compiler, and there is no g++: install it" in message(ConfigError, config)
    monkeypatch.setenv("CXX", "clang++")
    preflight(config)
    monkeypatch.setenv("CXX", "/no/cc")  # the compiler does not fall back to another
    assert "there is no /no/cc" in message(ConfigError, config)


def test_a_backend_that_cannot_take_the_model_is_refused(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config.parallel.attention_backend = "reference"
    preflight(config)
    config.parallel.attention_backend = "joined"
    assert message(ConfigError, config) == (
        "parallel.attention_backend=joined cannot be used: it needs a CUDA device, so set it to auto."
    )


def test_a_run_directory_behind_a_link_to_nothing_is_refused(config, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    config.run.dir = str(tmp_path / "link" / "run")
    assert message(ConfigError, config).endswith(f"{tmp_path / 'link'} is a link to nothing: remove it.")


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_history_of_a_gpus_memory_needs_a_gpu(config, monkeypatch, device):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config.training.device, config.logging.profile.steps, config.logging.profile.memory = device, [2], True
    assert message(ConfigError, config) == (
        "logging.profile.memory=true cannot be used: it records what is allocated on a GPU, and this run is on a CPU, "
        "so set it to false."
    )
