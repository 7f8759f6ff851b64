"""train.py as a user types it: what each mistake gets, and what starts, in which order, with which exit status."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra.core.config_store import ConfigStore

import train
from tests.shards import write_shards
from training.config import LostRankError

REPOSITORY = Path(train.__file__).parent
PREPARE_C4 = (
    "python scripts/prepare_data.py source=datasets source.name=allenai/c4 source.config=en "
    "source.validation_split=validation tokenizer=allenai/dolma2-tokenizer output=shards/c4"
)
MODELS = "moda_1_5b, moda_700m, moda_tiny, olmo2_1_5b, olmo2_700m, olmo2_700m_38l, olmo2_tiny, study_24l, study_48l"

# What is typed after `train.py`, and the whole message. `data.path=corpus` is there, with 120 ids and sequences for a
# few hundred tokens. docs/configuration.md shows the same table.
MISTAKES = [
    ("model.num_layer=4", "unknown key `model.num_layer`: did you mean `model.num_layers`?"),
    ("num_layers=4", "unknown key `num_layers`: did you mean `model.num_layers`?"),
    ("training.lr=1e-3", "unknown key `training.lr`: did you mean `optimizer.lr`?"),
    ("training.seq_length=512", "unknown key `training.seq_length`: did you mean `data.sequence_length`?"),
    (
        "optimizer.momentum=0.9",
        "unknown key `optimizer.momentum`: the keys of optimizer are lr, beta1, beta2, eps, weight_decay.",
    ),
    ("+optimizer.lrr=1", "unknown key `optimizer.lrr`: did you mean `optimizer.lr`?"),
    (
        "+foo=1",
        "unknown key `foo`: the keys at the top are run, model, data, training, optimizer, schedule, parallel, "
        "checkpoint, evaluation, logging, experiment, sweep.",
    ),
    ("modle=moda_tiny", "unknown key `modle`: did you mean `model`?"),
    ("hydra.sweep.dirr=x", "unknown key `hydra.sweep.dirr`: did you mean `hydra.sweep.dir`?"),
    ("model=moda_7m", f"model=moda_7m does not exist: did you mean model=moda_700m? The options are {MODELS}."),
    ("model=null", f"model=null does not exist: the options are {MODELS}."),
    (
        "hydra/launcher=joblib",
        "hydra/launcher=joblib is not installed: pip install hydra-joblib-launcher, or leave it out to run one job "
        "after another.",
    ),
    ("data=c5", "data=c5 does not exist: the options are c4, demo, files, mixture."),
    ("+sweep=norm_study", "+sweep=norm_study adds a key that exists already: write it without the +."),
    ("~optimizer.lr", "~optimizer.lr cannot be removed: give it a value."),
    ("model.num_layers=four", "model.num_layers=four has the wrong type: use an integer."),
    ("training.steps=1e3", "training.steps=1e3 has the wrong type: use an integer."),
    ("model.vocab_size=gpt2", "model.vocab_size=gpt2 has the wrong type: use an integer or null."),
    ("model.depth_kv=2", "model.depth_kv=2 has the wrong type: use true or false."),
    ("optimizer.lr=null", "optimizer.lr=null has the wrong type: use a number."),
    (
        "logging.wandb=offline",
        "logging.wandb=offline has the wrong type: use one of its keys, such as logging.wandb.mode.",
    ),
    ("logging.profile.steps=[1.5]", "logging.profile.steps=[1.5] has the wrong type: use a list such as [10,20]."),
    ("logging.wandb.tags=a", "logging.wandb.tags=a has the wrong type: use a list such as [a,b]."),
    (
        "run.name='${model.nam}'",
        "run.name refers to another value that cannot be used: Interpolation key 'model.nam' not found.",
    ),
    ("moda_tiny", "moda_tiny is not an override: write key=value, for example model=moda_tiny."),
    (
        "data=mixture data.mixture=[web,code]",
        "data.mixture=[web,code] cannot be used: an element of data.mixture is written {path: ..., weight: ...}.",
    ),
    (
        "data=mixture",
        "data.path= cannot be used: use a folder of token shards, as in data.path=SHARDS, or several in data.mixture.",
    ),
    (
        "--model=moda_tiny",
        "--model=moda_tiny is not a flag: keys are written without dashes, for example model=moda_tiny.",
    ),
    (
        "run.name=[first",
        "run.name=[first cannot be read: quote a value that has special characters, as in run.name='\"[first\"'.",
    ),
    (
        "model.norm=pre,post",
        "model.norm=pre,post holds several values: add -m to run one job for each, or quote a value that has commas in "
        "it.",
    ),
    (
        "-m training.seed=1,2 run.dir=here",
        "run.dir cannot be set in a sweep, where each job has a directory of its own: set hydra.sweep.dir instead.",
    ),
    ("hydra.run.dir=here", "hydra.run.dir=here has no effect: the directory of a run is run.dir."),
    ("model.norm=layer", "model.norm=layer cannot be used: choose one of reordered, pre, post."),
    (
        "model.num_heads=5",
        "model.num_kv_heads=8 cannot be used: model.num_heads=5 must be divisible by it, so use for example 5.",
    ),
    (
        "model=olmo2_tiny model.ffn_kv_proj=true",
        "model.ffn_kv_proj=true cannot be used: it needs model.depth_kv=true, so add that or set "
        "model.ffn_kv_proj=false.",
    ),
    (
        "training.global_batch_size=10",
        "training.global_batch_size=10 is not divisible by training.micro_batch_size=8 × world size 1 = 8: use "
        "training.global_batch_size=8 or 16, or training.micro_batch_size=5.",
    ),
    (
        "training.stop_at=100000",
        "training.stop_at=100000 cannot be used: use null (run to the end) or a step from 1 to training.steps=95367.",
    ),
    ("optimizer.lr=-1", "optimizer.lr=-1.0 cannot be used: use a positive number such as 3e-4, at most 100."),
    ("optimizer.beta2=1", "optimizer.beta2=1.0 cannot be used: use a number from 0 to below 1."),
    ("schedule.name=cos", "schedule.name=cos cannot be used: choose one of cosine, linear, constant, wsd."),
    ("training.precision=fp16", "training.precision=fp16 cannot be used: choose one of auto, fp32, bf16."),
    ("logging.wandb.mode=off", "logging.wandb.mode=off cannot be used: choose one of online, offline, disabled."),
    (
        "-m model=moda_tiny data.path=corpus model.num_heads=4,3",
        "model.num_kv_heads=2 cannot be used: model.num_heads=3 must be divisible by it, so use for example 1. (job "
        "model.num_heads=3)",
    ),
    (
        "checkpoint.resume=runs/a/checkpoints/step-5",
        "checkpoint.resume=runs/a/checkpoints/step-5 is no folder: use auto, never, or the path of a run or "
        "checkpoint, as in runs/NAME or runs/NAME/checkpoints/step-1000.",
    ),
    (
        "model=moda_tiny",
        "data.path=shards/c4 holds no token shards (shards/c4/train does not exist): set data.path to a prepared "
        f"folder, or prepare it with\n  {PREPARE_C4}",
    ),
    (
        "model=moda_tiny data.path=corpus data.sequence_length=1000000",
        "data.sequence_length=1000000 is longer than the data: corpus/train holds 4387 tokens, so use at most 4386.",
    ),
    (
        "model=moda_tiny data.path=corpus model.vocab_size=100",
        "model.vocab_size=100 is smaller than the 120 ids of the tokenizer of data.path=corpus (counting): use "
        "model.vocab_size=null, or data with a smaller tokenizer.",
    ),
    (
        "model=moda_tiny data.path=corpus training.device=cuda",
        "training.device=cuda cannot be used: no CUDA device is visible, so use auto or cpu.",
    ),
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory but for `corpus`."""
    write_shards(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The configurations that reached the trainer, which is replaced by a list; a job of seed 13 or 75 fails."""
    configs = []

    def fake(config):
        configs.append(config)
        if config.training.seed == 13:
            raise RuntimeError("loss is not finite")
        if config.training.seed == 75:
            raise LostRankError("rank 1 did not come")

    module = ModuleType("training.trainer")
    module.__dict__["train"] = fake
    monkeypatch.setitem(sys.modules, "training.trainer", module)
    return configs


TINY = ("model=moda_tiny", "data.path=corpus", "data.sequence_length=32", "training.device=cpu")


@pytest.mark.parametrize(("typed", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(typed, message, workplace, trained, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert train.main(shlex.split(typed)) == 2
    said = capsys.readouterr()
    assert (said.err.splitlines()[-len(message.splitlines()) :], said.out) == (f"error: {message}".splitlines(), "")
    assert trained == []
    assert [path.name for path in workplace.iterdir()] == ["corpus"]


@pytest.mark.parametrize(("typed", "message"), MISTAKES)
def test_the_documentation_shows_the_real_message(typed, message):
    assert documented(typed, message) in (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")


def documented(typed, message):
    """The row of the table in docs/configuration.md."""
    return f"| `{typed}` | {' '.join(message.split())} |\n"


def test_the_rank_count_is_part_of_the_check(workplace, trained, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main([*TINY]) == 2
    assert "training.micro_batch_size=4 × world size 3 = 12" in capsys.readouterr().err


def test_a_run_reaches_the_trainer_with_its_vocabulary(workplace, trained, capsys):
    assert train.main([*TINY, "run.name=first", "training.steps=20"]) == 0
    (config,) = trained
    assert (config.run.dir, config.model.vocab_size, config.training.steps) == ("runs/first", 128, 20)
    assert capsys.readouterr().err == (
        "warning: schedule.warmup_steps=30 is longer than the run (training.steps=20), so the learning rate never "
        "reaches its peak: use for example schedule.warmup_steps=2.\n"
    )


@pytest.mark.parametrize("gpu", [True, False])
def test_settings_that_make_a_gpu_slow_are_told_where_there_is_one(gpu, workplace, trained, capsys, monkeypatch):
    monkeypatch.setattr(train, "on_gpu", lambda config: gpu)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert train.main([*TINY, "run.name=first"]) == 0
    assert ("warning: NCCL_P2P_DISABLE=1 is set, so" in capsys.readouterr().err) == gpu


def test_a_failing_job_is_named_and_the_others_run(workplace, trained, capsys):
    assert train.main(["-m", *TINY, "training.seed=12,13,14", "training.steps=20"]) == 1
    assert [(c.training.seed, c.run.dir) for c in trained] == [(12 + i, f"sweeps/moda_tiny/{i}") for i in range(3)]
    said = capsys.readouterr().err
    assert "RuntimeError: loss is not finite" in said
    assert said.endswith("error: 1 of 3 jobs failed: 1 (training.seed=13)\n")
    assert said.count("warning:") == 1
    assert [path.name for path in workplace.iterdir()] == ["corpus"]


def test_what_fails_in_a_single_run_is_raised(workplace, trained):
    with pytest.raises(RuntimeError, match="not finite"):
        train.main([*TINY, "training.seed=13"])


def test_a_run_that_lacks_a_rank_asks_to_be_started_again(workplace, trained, capsys):
    assert train.main([*TINY, "training.seed=75"]) == 75
    assert capsys.readouterr().err.endswith("error: rank 1 did not come\n")


def test_every_job_is_checked_before_the_first_starts(workplace, trained, capsys):
    assert train.main(["-m", *TINY, "training.micro_batch_size=4,5"]) == 2
    assert trained == []
    assert "(job training.micro_batch_size=5)" in capsys.readouterr().err


def test_a_silent_rank_says_nothing(workplace, trained, capsys, monkeypatch):
    monkeypatch.setattr(train, "SPEAKS", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert train.main(["model=moda_7m"]) == 2
    assert train.main(["-m", *TINY, "training.seed=1,2"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_resolved_configuration_is_shown_and_nothing_starts(workplace, trained, capsys):
    assert train.main(["model=moda_tiny", "run.name=a", "--cfg", "job", "--resolve"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["run"]["dir"], tree["model"]["vocab_size"], tree["optimizer"]["lr"]) == ("runs/a", None, 3e-3)
    assert train.main(["-m", "--cfg", "job", "-p", "run.dir", "training.seed=1,2"]) == 0
    assert capsys.readouterr().out.split() == ["sweeps/moda_700m/0", "---", "sweeps/moda_700m/1"]
    assert trained == []


@pytest.fixture
def queue_launcher():
    """`hydra/launcher=queue`: Hydra starts the jobs, as with the launchers of joblib and submitit."""
    ConfigStore.instance().store(group="hydra/launcher", name="queue", node=BasicLauncherConf)
    yield
    del ConfigStore.instance().repo["hydra"]["launcher"]["queue.yaml"]


def test_a_launcher_of_hydra_starts_the_jobs_that_were_checked(queue_launcher, workplace, trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["-m", "hydra/launcher=queue", *TINY, "model=olmo2_tiny,moda_tiny", "run.name='${model.name}'"]
    assert train.main(arguments) == 0
    found = [(c.model.name, c.run.dir, c.model.vocab_size) for c in trained]
    assert found == [("olmo2_tiny", "sweeps/olmo2_tiny/0", 128), ("moda_tiny", "sweeps/olmo2_tiny/1", 128)]
    monkeypatch.setenv("RANK", "0")
    assert train.main(arguments) == 2
    assert "torchrun cannot be used with it" in capsys.readouterr().err


def command(workplace, *arguments):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        cwd=workplace,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_mistake_is_answered_before_torch_is_imported(workplace):
    code = (
        "import sys, train; status = train.main(['model=moda_tiny']); sys.exit(status + 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, env={"PYTHONPATH": str(REPOSITORY)}, check=False)
    assert done.returncode == 2


def test_the_command_itself(workplace):
    done = command(workplace, "model=moda_7m")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model=moda_7m does not exist")
    assert done.stderr.count("\n") == 1
    done = command(workplace, "--help")
    assert done.returncode == 0
    assert "torchrun --nproc-per-node 8 train.py" in done.stdout
    assert "moda_1_5b, moda_700m, moda_tiny" in done.stdout
    assert [path.name for path in workplace.iterdir()] == ["corpus"]
