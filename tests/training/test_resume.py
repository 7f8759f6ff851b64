"""training/resume.py: a run and its own checkpoints; the command that continues it (damage: test_checkpoint.py)."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

import training.trainer
from models.config import ConfigError
from tests.training.runs import short, untimed
from training.checkpoint import find_checkpoints, newest_marked, read_marker
from training.config import resolved
from training.resume import choose_checkpoint, continue_command
from training.tracking import WandbTracker
from training.trainer import Trainer, train

TORCHRUN = {"TORCHELASTIC_RUN_ID": "first", "RANK": "0", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "PYTHON train.py a=b training.stop_at=null"),
        ({"SLURM_JOB_ID": "7"}, "PYTHON train.py a=b training.stop_at=null"),  # by hand, in an allocation
        (
            TORCHRUN | {"GROUP_WORLD_SIZE": "1"},
            "PYTHON -m torch.distributed.run --nproc-per-node 8 train.py a=b training.stop_at=null",
        ),
        (
            TORCHRUN | {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"},
            "PYTHON -m torch.distributed.run --nproc-per-node 8 --max-restarts 3 train.py a=b training.stop_at=null",
        ),
        (
            TORCHRUN | SLURM | {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"},
            "on each of the 2 hosts, PYTHON -m torch.distributed.run --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d "
            "--rdzv-endpoint node-1:29500 --rdzv-id first train.py a=b training.stop_at=null",
        ),
        (
            SLURM | {"RANK": "0", "WORLD_SIZE": "8"},
            "sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 scripts/slurm/train.sbatch a=b "
            "training.stop_at=null",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "on every rank, with RANK and WORLD_SIZE as they were, PYTHON train.py a=b training.stop_at=null",
        ),
    ],
    ids=["one process", "in an allocation", "one host", "restarts", "hosts", "slurm", "by hand"],
)
def test_the_command_that_continues_starts_all_ranks(environment, command, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE", "RANK", *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "a=b", "training.stop_at=10"])
    monkeypatch.setattr(sys, "executable", "/elsewhere/PYTHON")
    assert continue_command(at_stop=True) == command.replace("PYTHON", "/elsewhere/PYTHON")
    unchanged = command.replace("training.stop_at=null", "training.stop_at=10")
    assert continue_command(at_stop=False) == unchanged.replace("PYTHON", "/elsewhere/PYTHON"), "after a signal"


@pytest.mark.parametrize("key", ["run.name", "run.dir"])
@pytest.mark.parametrize(
    "change",
    [
        lambda c, run_dir: setattr(c.model, "norm", "pre"),
        lambda c, run_dir: setattr(c.checkpoint, "resume", "never"),
        lambda c, run_dir: setattr(c.checkpoint, "resume", str(run_dir / "checkpoints" / "step-4")),
        lambda c, run_dir: setattr(c.checkpoint, "allow_changes", ["model.norm"]),
        lambda c, run_dir: [marker.write_text("{") for marker in run_dir.glob("checkpoints/*/checkpoint.json")],
        lambda c, run_dir: shutil.rmtree(run_dir / "checkpoints"),
        lambda c, run_dir: [shutil.rmtree(run_dir / "checkpoints"), (run_dir / "versions.json").unlink()],
    ],
    ids=["configuration", "never", "older", "allow_changes", "damaged", "lost", "foreign"],
)
def test_a_run_directory_that_cannot_be_used_is_answered_with_the_key_that_was_given(
    change, key, run, tmp_path, monkeypatch
):
    (tmp_path / "runs").mkdir()
    Path(run.run.dir).rename(tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    run.run.name, run.run.dir = ("first" if key == "run.name" else "other"), "runs/first"
    change(run, tmp_path / "runs" / "first")
    with pytest.raises(ConfigError, match=rf"(another|other) {key}\b") as refused:
        choose_checkpoint(run)
    assert ({"run.name", "run.dir"} - {key}).pop() not in str(refused.value)


@pytest.mark.parametrize("stop", [5, 6], ids=["behind", "at"])
def test_no_command_is_given_that_would_make_no_step(stop, run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", f"training.stop_at={stop}", "a=b"])
    shutil.rmtree(Path(run.run.dir) / "checkpoints" / "step-8")
    run.training.stop_at = stop
    train(run)
    assert "train.py a=b training.stop_at=null\n" in capsys.readouterr().out


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/step-6"])
def test_checkpoints_that_lie_elsewhere_by_a_link_are_the_runs_own(linked, run, saved, tmp_path):
    run_dir = Path(run.run.dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-8")
    (run_dir / linked).rename(tmp_path / "elsewhere" if linked == "checkpoints" else tmp_path / "step-6")
    (run_dir / linked).symlink_to(tmp_path / ("elsewhere" if linked == "checkpoints" else "step-6"))
    train(run)
    assert untimed(run_dir) == untimed(saved)
    assert read_marker(find_checkpoints(run_dir)[-1]).state.begun_from is None


def test_a_run_that_began_with_other_weights_does_not_begin_again_with_new_ones(saved, shards, tmp_path):
    other = str(saved / "checkpoints" / "step-4")
    config = short(shards, tmp_path / "run", resume=other)
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had been killed before its first
    (tmp_path / "run" / "summary.json").unlink()
    config.checkpoint.resume = "auto"
    with pytest.raises(ConfigError, match=rf"whose run began with {other}: give checkpoint\.resume={other} again"):
        choose_checkpoint(config)
    config.checkpoint.resume = other
    assert choose_checkpoint(config) == Path(other)


def test_a_start_that_makes_no_step_leaves_the_configuration_of_the_run(run, monkeypatch):
    shown = []

    class Tracker(WandbTracker):
        def __init__(self, config, run_name, run_dir, resolved_config, *rest):
            shown.append(resolved_config)
            super().__init__(config, run_name, run_dir, resolved_config, *rest)

    monkeypatch.setattr(training.trainer, "WandbTracker", Tracker)
    path = Path(run.run.dir) / "config.yaml"
    before = path.read_bytes()
    run.training.micro_batch_size, run.logging.every = 4, 3
    train(run)
    assert path.read_bytes() == before
    assert shown == [yaml.safe_load(before)]
    path.unlink()
    train(run)
    assert path.read_bytes() == before, "as the checkpoint has it"
    shutil.rmtree(path.parent / "checkpoints" / "step-8")
    train(run)
    assert yaml.safe_load(path.read_text()) == shown[-1] == resolved(run)


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "a link", "inside"])
def test_a_run_to_begin_with_means_its_newest_whole_checkpoint(named, run, shards, tmp_path, monkeypatch):
    other = Path(run.run.dir)
    (other / "checkpoints" / "step-8" / "checkpoint.json").unlink()  # as while it is saved
    (tmp_path / "link").symlink_to(other / "checkpoints")
    monkeypatch.chdir(other / "checkpoints")
    paths = {"run": other, "run/checkpoints": other / "checkpoints", "a link": tmp_path / "link", "inside": Path(".")}
    config = short(shards, tmp_path / "new", resume=str(paths[named]))
    assert choose_checkpoint(config) == other / "checkpoints" / "step-6"
    assert newest_marked(paths[named]).samefile(other / "checkpoints" / "step-6")


def test_a_run_that_began_with_the_newest_of_another_continues_its_own_though_that_goes_on(run, shards, tmp_path):
    other = Path(run.run.dir) / "checkpoints"
    (other / "step-8").rename(tmp_path / "step-8")
    config = short(shards, tmp_path / "new", resume=run.run.dir)
    config.training.stop_at = 7
    train(config)
    (tmp_path / "step-8").rename(other / "step-8")
    shutil.rmtree(other / "step-6")
    assert choose_checkpoint(config) == tmp_path / "new" / "checkpoints" / "step-7"
    shutil.rmtree(other)
    assert choose_checkpoint(config) == tmp_path / "new" / "checkpoints" / "step-7"
    config.checkpoint.resume = str(tmp_path / "new")
    assert choose_checkpoint(config) == tmp_path / "new" / "checkpoints" / "step-7"
    config.checkpoint.resume = run.run.dir
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(ConfigError, match=rf"resume={run.run.dir} has no whole checkpoint: give a run that has saved"):
        train(config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("stop_at", "done", "remedy"),
    [
        (None, 8, r"training\.steps with checkpoint\.allow_changes=\[training\.steps\], or a checkpoint before it\.$"),
        (5, 6, r"training\.stop_at, or a checkpoint before it\.$"),
        (5, 8, r"training\.stop_at and training\.steps with checkpoint\.allow_changes=\[training\.steps\], or a"),
    ],
)
def test_a_new_run_that_would_make_no_step_is_refused_and_leaves_no_file(stop_at, done, remedy, run, shards, tmp_path):
    config = short(shards, tmp_path / "new", resume=f"{run.run.dir}/checkpoints/step-{done}")
    config.training.stop_at = stop_at
    with pytest.raises(ConfigError, match=rf"has come to step {done} already, .*: give a higher {remedy}"):
        train(config)
    assert not (tmp_path / "new").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_where_it_began(run, shards, tmp_path):
    """Though the run that it began from has gone on since."""
    other = Path(run.run.dir) / "checkpoints"
    (other / "step-8").rename(tmp_path / "step-8")
    config = short(shards, tmp_path / "new", resume=run.run.dir)
    config.training.stop_at = 7
    train(config)
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    (tmp_path / "new" / "summary.json").unlink()
    (tmp_path / "step-8").rename(other / "step-8")
    assert choose_checkpoint(config) == other / "step-6"
    shutil.copytree(run.run.dir, tmp_path / "third")
    another = short(shards, tmp_path / "new", resume=str(tmp_path / "third"))
    another.training.stop_at, another.training.steps = None, 12
    another.checkpoint.allow_changes = ["training.steps"]
    assert choose_checkpoint(another) == tmp_path / "third" / "checkpoints" / "step-8", "of another run the newest"
    shutil.rmtree(other / "step-6")
    with pytest.raises(ConfigError, match=r"come to step-8, and the run in .* has begun with step-6, which is gone"):
        choose_checkpoint(config)


def test_fewer_steps_than_are_done_are_refused(run):
    run.training.steps, run.checkpoint.allow_changes = 5, ["training.steps"]
    with pytest.raises(ConfigError, match=r"training\.steps=5 lies before step 8, which .*step-8 has come to"):
        choose_checkpoint(run)


@pytest.mark.parametrize("content", ["", "a: [", "- 1"])
def test_a_damaged_configuration_of_a_run_without_checkpoints_gets_one_sentence(content, run):
    run_dir = Path(run.run.dir)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "summary.json").unlink()
    (run_dir / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged, and there is no checkpoint"):
        choose_checkpoint(run)


@pytest.mark.parametrize("lost", ["checkpoints", "markers"])
def test_a_run_that_has_ended_does_not_begin_again_where_its_checkpoints_are_lost(lost, run):
    run_dir = Path(run.run.dir)
    shutil.rmtree(run_dir / "checkpoints") if lost == "checkpoints" else None
    for marker in run_dir.glob("checkpoints/*/checkpoint.json"):
        marker.unlink()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"come to step 8 and none of its checkpoints .* put them back, or"):
        train(run)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_that_begins_again_keeps_records_of_more_than_a_checkpoint_may_lose(run, saved, capsys):
    run_dir = Path(run.run.dir)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "summary.json").unlink()
    records = (run_dir / "metrics.jsonl").read_bytes()
    train(run)
    assert "has records up to step 8 and no checkpoint: the run begins again" in capsys.readouterr().out
    assert (run_dir / "metrics-to-step-8.jsonl").read_bytes() == records
    assert untimed(run_dir) == untimed(saved)


@pytest.mark.parametrize("left", [0, 3])
def test_records_that_are_lost_are_missed(left, run, capsys):
    path = Path(run.run.dir) / "metrics.jsonl"
    train(run)
    assert "some were lost" not in capsys.readouterr().out
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:left]))
    train(run)
    assert f"has no records between step {left} and the checkpoint's, 8: some were lost" in capsys.readouterr().out


def test_a_run_that_began_at_a_step_of_another_and_has_no_record_yet_misses_none(
    saved, shards, tmp_path, capsys, monkeypatch
):
    config = short(shards, tmp_path / "run", resume=str(saved / "checkpoints" / "step-4"))
    config.logging.every = 3
    step = Trainer._step

    def signalled(self, *given):
        signal.raise_signal(signal.SIGTERM)
        return step(self, *given)

    with monkeypatch.context() as signals:
        signals.setattr(Trainer, "_step", signalled)
        with pytest.raises(SystemExit):
            train(config)
    assert find_checkpoints(tmp_path / "run")[-1].name == "step-5"
    assert not (tmp_path / "run" / "metrics.jsonl").read_bytes()
    config.checkpoint.resume = "auto"
    train(config)
    assert "some were lost" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "summary.json", "curves.png", "versions.json", "train/manifest.json"]
)
def test_a_folder_of_other_files_is_left_alone(name, shards, tmp_path):
    config = short(shards, tmp_path / "run")
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}\n')
    words = (
        "holds token shards: set" if "train" in name else rf"holds {name}, and no versions\.json that tells of a run"
    )
    for config.checkpoint.resume in ("auto", "never")[: 1 if name == "metrics.jsonl" else 2]:
        with pytest.raises(ConfigError, match=words):
            train(config)
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == '{"mine": 1}\n'
