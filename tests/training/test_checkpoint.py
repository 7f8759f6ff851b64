"""Checkpoints on disk: what is written, kept, deleted, verified, set aside and refused; and saves that fail."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

import training.saver
import training.storage
from models.config import ConfigError
from tests.training.runs import OVERLAPPING, short
from training.checkpoint import CHECKSUM, MARKER, Marker, find_checkpoints, prune, read_marker, sealed, verify
from training.config import TrainingError
from training.host_copy import HostCopy, _leaves
from training.metrics import read_metrics
from training.resume import choose_checkpoint
from training.saver import CheckpointSaver
from training.storage import METADATA
from training.trainer import Trainer, train


def names(run_dir):
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def losses(run_dir):
    return {record["step"]: record["train/loss"] for record in read_metrics(Path(run_dir) / "metrics.jsonl")}


def test_permanent_checkpoints_stay_and_the_newest_of_the_others(shards, tmp_path):
    train(short(shards, tmp_path / "run", keep=1, permanent_every=3))
    assert names(tmp_path / "run") == ["step-3", "step-6", "step-8"]
    assert [read_marker(p).state.permanent for p in find_checkpoints(tmp_path / "run")] == [True, True, False]


def test_every_file_has_its_checksum_in_the_marker(saved):
    for path in find_checkpoints(saved):
        marker = verify(path)
        assert marker.sha256.keys() == marker.bytes.keys() == {f.name for f in path.iterdir()} - {MARKER}
        assert METADATA in marker.sha256


def flip(path):
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def edit_state(path, seal=sealed, **values):
    content = json.loads((path / MARKER).read_text())
    content["state"] |= values
    (path / MARKER).write_text(json.dumps(seal(content)))


def edit_text(path, old, new):
    text = (path / MARKER).read_text()
    assert text.count(old) == 1
    (path / MARKER).write_text(text.replace(old, new))


DAMAGE = {
    "flipped byte": lambda path: flip(max(path.glob("*.distcp"), key=os.path.getsize)),
    "truncated file": lambda path: os.truncate(next(path.glob("*.distcp")), 100),
    "missing shard": lambda path: next(path.glob("*.distcp")).unlink(),
    "missing metadata": lambda path: (path / METADATA).unlink(),
    "marker without files": lambda path: [file.unlink() for file in path.iterdir() if file.name != MARKER],
    "marker that is no JSON": lambda path: (path / MARKER).write_text("{"),
    "marker that is something else": lambda path: (path / MARKER).write_text('{"state": 3}'),
    "marker with a word for a number": lambda path: edit_state(path, tokens="8"),
    "marker with another step": lambda path: edit_state(path, step=6),
    "marker with another position": lambda path: edit_state(path, seal=dict, instances=36),
    "marker with another key": lambda path: edit_text(path, '"seconds"', '"secondr"'),
    "marker without its checksum": lambda path: edit_text(path, f'"{CHECKSUM}"', '"checksun"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_named_set_aside_and_the_one_before_is_taken(damage, run, saved, capsys):
    run_dir = Path(run.run.dir)
    DAMAGE[damage](run_dir / "checkpoints" / "step-8")
    train(run)
    printed = capsys.readouterr()
    assert "step-8 is damaged (" in printed.err
    assert "set aside as step-8.damaged" in printed.err
    assert "step-6 at step 6" in printed.out
    assert names(run_dir) == ["step-2", "step-4", "step-6", "step-8", "step-8.damaged"]
    assert losses(run_dir) == losses(saved)


def test_a_newest_that_a_disk_cannot_read_is_damaged_too(run, saved, monkeypatch, capsys):
    original = training.storage.checksum

    def checksum(file, **options):
        if file.parent.name == "step-8":
            raise OSError(5, "Input/output error", str(file))
        return original(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.storage, "checksum", checksum)
        assert choose_checkpoint(run, locked=True).name == "step-6"
    assert "Input/output error" in capsys.readouterr().err
    assert "step-8.damaged" in names(run.run.dir)


def test_a_checkpoint_of_a_later_version_is_neither_damaged_nor_passed_over(run):
    run_dir = Path(run.run.dir)
    marker = run_dir / "checkpoints" / "step-8" / MARKER
    content = json.loads(marker.read_text())
    content["state"]["of_tomorrow"] = 1
    marker.write_text(json.dumps(sealed(content)))
    with pytest.raises(ConfigError, match=r"step-8 was written by a later version of this code .* has of_tomorrow"):
        train(run)
    assert names(run_dir) == ["step-2", "step-4", "step-6", "step-8"]


def test_without_any_whole_checkpoint_nothing_is_lost_by_beginning_again(run):
    run_dir = Path(run.run.dir)
    before = (run_dir / "metrics.jsonl").read_bytes()
    for path in find_checkpoints(run_dir):
        flip(next(path.glob("*.distcp")))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"has no whole checkpoint \(.*is damaged"):
            train(run)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert names(run_dir) == ["step-2", "step-4", "step-6", "step-8"]


def test_deletion_keeps_the_newest_whole_one_and_removes_what_interrupted_saves_left(run):
    run_dir = Path(run.run.dir)
    (run_dir / "checkpoints" / "step-4" / MARKER).unlink()
    os.truncate(next((run_dir / "checkpoints" / "step-8").glob("*.distcp")), 100)
    assert sorted(path.name for path in prune(run_dir, keep=1)) == ["step-2", "step-4"]
    assert [path.name for path in find_checkpoints(run_dir)] == ["step-6"]


def test_of_damaged_checkpoints_the_newest_stays_and_the_log_says_so(run, capsys):
    """Else a disk that damages one a day is full after some weeks."""
    run_dir = Path(run.run.dir)
    for name in ("step-8", "step-6"):
        flip(max((run_dir / "checkpoints" / name).glob("*.distcp"), key=os.path.getsize))
    run.training.stop_at = 5
    train(run)
    assert names(run_dir) == ["step-2", "step-4", "step-5", "step-8.damaged"]
    assert f"deleted {run_dir / 'checkpoints' / 'step-6.damaged'}: of damaged" in capsys.readouterr().out


def test_what_is_a_link_elsewhere_is_deleted_there_and_one_failure_keeps_no_other(run, tmp_path, monkeypatch):
    checkpoints, deleted = Path(run.run.dir) / "checkpoints", shutil.rmtree
    (checkpoints / "step-2").rename(tmp_path / "elsewhere")
    (checkpoints / "step-2").symlink_to(tmp_path / "elsewhere")

    def fails(path):
        if path.name == "step-4":
            raise OSError(13, "Permission denied", str(path))
        deleted(path)

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(OSError, match="step-4"):
        prune(Path(run.run.dir), keep=1)
    assert names(run.run.dir) == ["step-4", "step-8"]
    assert not (tmp_path / "elsewhere").exists()


def test_a_kill_inside_a_deletion_leaves_no_half_checkpoint(run, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(Path(run.run.dir), keep=1)
    assert [path.name for path in find_checkpoints(Path(run.run.dir))] == ["step-4", "step-6", "step-8"]


def test_training_goes_on_while_a_checkpoint_is_written_and_the_copy_is_that_of_its_step(
    shards, saved, tmp_path, monkeypatch
):
    """The write of step 2 waits until step 3 is done: weights that it holds must be those of step 2 all the same."""
    stepped = threading.Event()
    original = training.saver._clear

    def clear(path):
        if path.name == "step-2":
            assert stepped.wait(60), "training waits for the write"
        original(path)

    def record(self, *given):
        recorded(self, *given)
        if self.state.step == 3:
            stepped.set()

    recorded = Trainer._record
    monkeypatch.setattr(training.saver, "_clear", clear)
    monkeypatch.setattr(Trainer, "_record", record)
    train(short(shards, tmp_path / "run", **OVERLAPPING))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-8")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    monkeypatch.undo()
    train(short(shards, tmp_path / "run", keep=None))
    assert losses(tmp_path / "run") == losses(saved)


def test_the_log_has_the_wait_of_a_save_for_the_one_before(shards, tmp_path, monkeypatch, capsys):
    original, wait, waits = training.saver._clear, CheckpointSaver.wait, threading.Event()

    def clear(path):
        if path.name == "step-2":
            assert waits.wait(60)
            time.sleep(0.5)
        original(path)

    def waiting(self):
        if self._writing is not None:
            waits.set()
        return wait(self)

    monkeypatch.setattr(CheckpointSaver, "wait", waiting)
    monkeypatch.setattr(training.saver, "_clear", clear)
    train(short(shards, tmp_path / "run", **OVERLAPPING))
    said = re.findall(r"step-(\d) \| .*training waited ([\d.]+) s", capsys.readouterr().out)
    waited = {step: float(seconds) for step, seconds in said}
    assert waited.keys() == {"2", "4", "6", "8"}
    assert waited["4"] > 0.3 > waited["2"]


def test_the_records_of_a_checkpoint_are_on_disk_before_its_marker(shards, tmp_path, monkeypatch):
    """A machine that stops forgets what was written and not synced, and a resume makes no earlier record again."""
    log, synced, marked = tmp_path / "run" / "metrics.jsonl", [], []
    fsync, write = os.fsync, Marker.write

    def syncs(descriptor):
        if log.exists() and os.path.samestat(os.fstat(descriptor), log.stat()):
            synced.append(read_metrics(log)[-1]["step"])
        fsync(descriptor)

    def marks(self, path):
        marked.append((self.state.step, max(synced, default=0)))
        write(self, path)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(Marker, "write", marks)
    train(short(shards, tmp_path / "run"))
    assert [step for step, _ in marked] == [2, 4, 6, 8]
    assert all(on_disk >= step for step, on_disk in marked)


def test_synchronous_saves_give_the_same_checkpoint(shards, saved, tmp_path):
    train(short(shards, tmp_path / "run", asynchronous=False, keep=None))
    assert losses(tmp_path / "run") == losses(saved)
    assert names(tmp_path / "run") == names(saved)


def test_every_copy_lies_in_the_memory_of_the_first(shards, tmp_path, monkeypatch):
    seen, original = [], HostCopy.begin

    def begin(self, tensors):
        original(self, tensors)
        seen.append([leaf.data_ptr() for leaf in _leaves(self.tensors)])
        assert all(torch.equal(*pair) for pair in zip(_leaves(self.tensors), _leaves(tensors), strict=True))

    monkeypatch.setattr(HostCopy, "begin", begin)
    train(short(shards, tmp_path / "run", keep=None))
    assert len(seen) > 1
    assert all(memory == seen[0] for memory in seen)


@pytest.fixture
def late_copies(monkeypatch):
    """Copies as a busy GPU makes them: some time after `begin`, and before the optimizer of the next step."""
    begin = HostCopy.begin

    def begin_late(self, tensors):
        self.source, self.whole = tensors, threading.Event()

    def finish(self):
        time.sleep(0.1)
        begin(self, self.source)
        self.whole.set()

    monkeypatch.setattr(HostCopy, "begin", begin_late)
    monkeypatch.setattr(HostCopy, "finish", finish)
    monkeypatch.setattr(HostCopy, "hold", lambda self: self.whole.wait(30))


def test_the_optimizer_waits_for_a_copy(shards, saved, tmp_path, late_copies):
    train(short(shards, tmp_path / "run", **OVERLAPPING))
    assert names(tmp_path / "run") == names(saved)
    for path in find_checkpoints(tmp_path / "run"):
        weights = [torch.zeros(128, 32), torch.zeros(128, 32)]
        for weight, folder in zip(weights, (tmp_path / "run", saved), strict=True):
            reader = training.storage.SafeReader(folder / "checkpoints" / path.name)
            dcp.load({"model.embedding.weight": weight}, storage_reader=reader, no_dist=True)
        assert torch.equal(*weights)


def test_an_error_right_after_a_save_leaves_the_checkpoint(shards, saved, tmp_path, late_copies, monkeypatch):
    """The optimizer of the next step, which waits for the copy, never comes."""
    config = short(shards, tmp_path / "run", **OVERLAPPING)
    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "_step", raising_after(4, Trainer._step))
        with pytest.raises(RuntimeError, match="the device is gone"):
            train(config)
    assert names(tmp_path / "run") == ["step-2", "step-4"]
    train(config)
    assert losses(tmp_path / "run") == losses(saved)


def raising_after(step, original):
    def raises(self, micro_batches):
        if self.state.step == step:
            raise RuntimeError("the device is gone")
        return original(self, micro_batches)

    return raises


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_window_of_a_checkpoint_is_that_of_its_step(asynchronous, shards, tmp_path):
    """The next step enters the window in place, before its optimizer waits for the copy."""
    train(short(shards, tmp_path / "run", asynchronous=asynchronous, **OVERLAPPING))
    for path in find_checkpoints(tmp_path / "run"):
        entered = torch.zeros((), dtype=torch.int64)
        dcp.load({"skip.entered": entered}, storage_reader=training.storage.SafeReader(path), no_dist=True)
        assert int(entered) == read_marker(path).state.step


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
@pytest.mark.parametrize("method", ["prepare", "begin"])
def test_without_host_memory_for_a_copy_training_waits_and_says_why(
    method, kind, shards, saved, tmp_path, monkeypatch, capsys
):
    def fails(self, tensors=None):
        raise kind("cannot pin 8 GB")

    monkeypatch.setattr(HostCopy, method, fails)
    train(short(shards, tmp_path / "run", keep=None))
    said = f"while training waits: no copy in host memory ({kind.__name__}: cannot pin"
    assert capsys.readouterr().out.count(said) == 1
    assert names(tmp_path / "run") == names(saved)
    for path in find_checkpoints(tmp_path / "run"):
        verify(path)


def test_without_host_memory_the_first_step_does_not_end_the_run(monkeypatch):
    """Where the system promises no memory that it lacks, copies fail as soon as they are laid out."""

    def fails(self, tensors, device):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(HostCopy, "__init__", fails)
    monkeypatch.setattr(training.saver, "checkpoint_tensors", lambda *parts: {"model": {}, "optimizer": {}})
    saver = CheckpointSaver.__new__(CheckpointSaver)  # as on a GPU, before its first step
    saver._world = SimpleNamespace(device=torch.device("cuda"))
    saver._unheld, saver._copy, saver._parts = None, None, ()
    saver.schedule = SimpleNamespace(asynchronous=True)
    saver._before_step()
    assert saver._copy is None


def test_a_file_that_reads_back_wrong_gets_no_marker(shards, tmp_path, monkeypatch, capsys):
    original = training.saver.first_difference
    calls = []

    def difference(folder, checksums, **options):
        calls.append(folder.name)
        if folder.name == "step-4":
            flip(max(folder.glob("*.distcp"), key=os.path.getsize))
        return original(folder, checksums, **options)

    monkeypatch.setattr(training.saver, "first_difference", difference)
    train(short(shards, tmp_path / "run", keep=None))
    assert "step-4 could not be saved" in capsys.readouterr().out
    assert names(tmp_path / "run") == ["step-2", "step-5", "step-7", "step-8"]
    assert calls == ["step-2", "step-4", "step-4", "step-5", "step-7", "step-8"], (
        "tried again at once, then a step later"
    )


def failing_writes(monkeypatch, steps):
    """No space left for files of these steps, as the system says it in the middle of a write."""
    original = training.storage._Checksummed.write

    def write(self, content):
        if any(f"step-{step}/" in str(self._stream.name) for step in steps):
            raise OSError(28, "No space left on device", self._stream.name)
        return original(self, content)

    monkeypatch.setattr(training.storage._Checksummed, "write", write)


def test_a_full_disk_during_a_save_keeps_the_run_going_and_the_checkpoint_before(shards, tmp_path, monkeypatch, capsys):
    failing_writes(monkeypatch, [4])
    config = short(shards, tmp_path / "run", keep=1)
    config.training.stop_at = 5
    train(config)
    printed = capsys.readouterr().out
    assert "step-4 could not be saved (OSError: [Errno 28] No space left on device" in printed
    assert "the checkpoint before it (step 2) stays as it is" in printed
    assert names(tmp_path / "run") == ["step-5"]


def test_a_full_disk_at_the_end_is_an_error_that_names_the_path(shards, saved, tmp_path, monkeypatch):
    failing_writes(monkeypatch, [6, 7, 8])
    config = short(shards, tmp_path / "run", keep=1)
    with pytest.raises(TrainingError, match=r"step-8 could not be saved \(OSError.*continues step 4"):
        train(config)
    assert names(tmp_path / "run") == ["step-4"]
    monkeypatch.undo()
    train(config)
    assert losses(tmp_path / "run") == losses(saved)


def test_where_nothing_was_saved_nothing_is_continued(shards, tmp_path, monkeypatch, capsys):
    failing_writes(monkeypatch, range(9))
    with pytest.raises(TrainingError, match=r"step-8 could not be saved \(OSError.*the same command begins again\.$"):
        train(short(shards, tmp_path / "run"))
    # The first and the last are tried twice, and between them those of steps 3, 5 and 7.
    printed = capsys.readouterr().out
    assert printed.count("; there is none before it") == 7
    assert printed.count("; there is none before it, and training goes on") == 5, "but after the last step"


def test_any_error_of_the_writing_thread_is_a_failure_of_that_save_alone(shards, tmp_path, monkeypatch, capsys):
    original = training.saver.first_difference

    def difference(folder, checksums, **options):
        if folder.name == "step-4":
            raise ValueError("no such thing")
        return original(folder, checksums, **options)

    monkeypatch.setattr(training.saver, "first_difference", difference)
    train(short(shards, tmp_path / "run", keep=None))
    assert "step-4 could not be saved (ValueError: no such thing)" in capsys.readouterr().out
    assert names(tmp_path / "run") == ["step-2", "step-5", "step-7", "step-8"]


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("size_in_bytes", OSError(5, "Input/output error"), "step-4 | size unknown"),
        ("prune", ConfigError("step-2 is damaged"), "step-4 is saved, and old checkpoints of"),
    ],
    ids=["size", "deletion"],
)
def test_what_fails_after_the_marker_is_said(function, error, words, shards, saved, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(training.saver, function, fails)
    train(short(shards, tmp_path / "run", keep=1))
    printed = capsys.readouterr().out
    assert printed.count(words) == 1
    assert str(error) in printed
    assert names(tmp_path / "run") == (names(saved) if function == "prune" else names(saved)[-1:])
    assert losses(tmp_path / "run") == losses(saved)
