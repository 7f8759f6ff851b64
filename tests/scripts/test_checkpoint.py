"""scripts/checkpoint.py: what it shows, checks, copies and deletes is what a run has saved."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from models.decoder import Decoder
from scripts import checkpoint
from scripts.checkpoint import main, tensors
from tests.shards import tiny_config
from tests.training.test_untrusted_checkpoint import crafted_tensors, resealed
from training.checkpoint import MARKER, find_checkpoints, verify
from training.storage import METADATA, read_metadata
from training.trainer import train


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """Six steps with checkpoints of 2, 4 and 6. Read only."""
    config = tiny_config(shards, tmp_path_factory.mktemp("saved") / "run")
    config.training.steps, config.checkpoint.every, config.evaluation.every = 6, 2, 0
    train(config)
    return tmp_path_factory.getbasetemp() / config.run.dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_list_has_a_row_for_each_and_says_what_is_none(run_dir, capsys):
    (run_dir / "checkpoints" / "step-4" / MARKER).unlink()
    assert main(["list", str(run_dir)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["step-2", "step-4", "step-6"]
    assert "its save was interrupted" in rows[1]
    assert rows[0].split()[1] == "128"


def test_verify_reads_every_file(run_dir, capsys):
    assert main(["verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("whole") == 3
    file = max((run_dir / "checkpoints" / "step-4").glob("*.distcp"), key=os.path.getsize)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(run_dir)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("whole") == 2
    assert "step-4 is damaged" in printed.err
    assert main(["verify", str(run_dir / "checkpoints" / "step-4")]) == 1


def test_the_folder_of_checkpoints_means_its_run(run_dir, capsys):
    for command in ("list", "verify"):
        assert main([command, str(run_dir / "checkpoints")]) == 0
        assert "step-6" in capsys.readouterr().out


def test_a_copy_is_not_named_as_a_pickle(saved, tmp_path, capsys):
    assert main(["copy", str(saved), str(tmp_path / "w.pt")]) == 2
    assert "safetensors file: name it w.safetensors" in capsys.readouterr().err
    assert not list(tmp_path.glob("w.*"))


def test_inspect_shows_step_shapes_and_norms(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "step 6, 384 tokens, 24 instances" in printed
    assert "whole: its" in printed
    weights = dict(tensors(find_checkpoints(saved)[-1]))
    norm = weights["model.embedding.weight"].norm().item()
    (row,) = [row for row in printed.splitlines() if row.split()[:1] == ["embedding.weight"]]
    assert row.split()[1:4] == ["128", "×", "32"]
    assert float(row.split()[-1]) == pytest.approx(norm, abs=1e-3)


def test_a_reader_that_has_seen_enough_is_no_error(saved):
    script = Path(__file__).parents[2] / "scripts" / "checkpoint.py"
    command = [sys.executable, "-u", str(script), "inspect", str(saved)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_inspect_shows_nothing_of_a_damaged_checkpoint(run_dir, capsys):
    file = max((run_dir / "checkpoints" / "step-6").glob("*.distcp"), key=os.path.getsize)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["inspect", str(run_dir)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"step-6 is damaged ({file.name} is not what was saved)" in printed.err


def test_a_copy_is_one_file_that_a_decoder_loads(saved, shards, tmp_path):
    file = tmp_path / "weights.safetensors"
    assert main(["copy", str(saved), str(file)]) == 0
    with safe_open(file, framework="pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        assert opened.metadata()["step"] == "6"
        assert json.loads(opened.metadata()["config"])["model"]["num_layers"] == 2
    Decoder(tiny_config(shards, tmp_path).model).load_state_dict(weights)
    everything = tmp_path / "all.safetensors"
    assert main(["copy", "--all", str(saved), str(everything)]) == 0
    with safe_open(everything, framework="pt") as opened:
        assert torch.equal(opened.get_tensor("model.embedding.weight"), weights["embedding.weight"])
        assert opened.get_tensor("optimizer.embedding.weight.step").item() == 6
    assert main(["copy", str(saved), str(file)]) == 2


def test_a_copy_is_readable_for_those_that_may_read_other_files(saved, tmp_path):
    before = os.umask(0o027)
    try:
        assert main(["copy", str(saved), str(tmp_path / "weights.safetensors")]) == 0
        (tmp_path / "other").touch()
        modes = [(tmp_path / name).stat().st_mode for name in ("weights.safetensors", "other")]
    finally:
        os.umask(before)
    assert modes[0] == modes[1]


@pytest.mark.parametrize("command", ["inspect", "copy", "verify"])
def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_called_damaged(
    command, run_dir, tmp_path, monkeypatch, capsys
):
    def deletes(path):
        if path.name == "step-6":
            shutil.rmtree(path)
        return verify(path)

    monkeypatch.setattr(checkpoint, "verify", deletes)
    status = main([command, str(run_dir), *([str(tmp_path / "w.safetensors")] if command == "copy" else [])])
    shown = capsys.readouterr()
    if command == "verify":
        assert (status, shown.err) == (0, "")
        assert f"step-4: whole, 5 files\n{run_dir}/checkpoints/step-6: its run has deleted it meanwhile" in shown.out
    else:
        assert status == 2
        assert shown.err == f"error: {run_dir}/checkpoints/step-6 was deleted by its run while it was read: " + (
            "repeat the command.\n"
        )


def test_prune_keeps_the_newest(run_dir, capsys):
    assert main(["prune", str(run_dir), "--keep", "1"]) == 0
    assert capsys.readouterr().out.count("deleted") == 2
    assert [path.name for path in find_checkpoints(run_dir)] == ["step-6"]
    assert main(["prune", str(run_dir), "--keep", "0"]) == 2


@pytest.mark.parametrize("size", ["the same", "smaller"])
def test_the_newest_is_meant_damaged_or_not_and_prune_says_how_to_go_on(size, run_dir, tmp_path, capsys):
    file = max((run_dir / "checkpoints" / "step-6").glob("*.distcp"), key=os.path.getsize)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if size == "the same" else content[:100])
    for command in (["inspect"], ["copy", str(tmp_path / "new")], ["prune", "--keep", "1"]):
        assert main([command[0], str(run_dir), *command[1:]]) == 2
        assert "step-6 is damaged" in (said := capsys.readouterr().err)
    assert "Nothing is deleted: start the run once, which sets that one aside." in said
    assert len(find_checkpoints(run_dir)) == (3 if size == "the same" else 2)


def test_damaged_checkpoints_that_were_set_aside_are_listed_and_pruned_but_for_the_newest(run_dir, capsys):
    folder = run_dir / "checkpoints"
    for name in ("step-2", "step-4"):
        (folder / name).rename(folder / f"{name}.damaged")
    assert main(["list", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("set aside") == 2
    assert main(["prune", str(run_dir), "--keep", "1"]) == 0
    assert capsys.readouterr().out == f"deleted {folder / 'step-2.damaged'}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["step-4.damaged", "step-6"]


@pytest.mark.parametrize("what", ["", "missing", "file"], ids=["an empty folder", "nothing", "a file"])
def test_what_is_no_run_is_one_sentence(what, tmp_path, capsys):
    (tmp_path / "file").touch()
    path = tmp_path / what if what else tmp_path
    for command in (["list"], ["verify"], ["inspect"], ["copy", str(tmp_path / "new")], ["prune", "--keep", "1"]):
        assert main([command[0], str(path), *command[1:]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"error: {path} ") for line in lines)


def test_a_checkpoint_is_not_pruned_as_a_run(saved, capsys):
    assert main(["prune", str(saved / "checkpoints" / "step-6"), "--keep", "1"]) == 2
    assert "step-6 has no checkpoints: give a run directory" in capsys.readouterr().err


def test_a_copy_that_cannot_be_written_leaves_nothing_and_is_one_sentence(saved, tmp_path, monkeypatch, capsys):
    assert main(["copy", str(saved), str(tmp_path / "nowhere" / "new")]) == 2
    with monkeypatch.context() as patched:
        patched.setattr("scripts.checkpoint.os.access", lambda path, mode: False)
        patched.setattr("scripts.checkpoint.tensors", lambda path: pytest.fail("tensors were read"))
        assert main(["copy", str(saved), str(tmp_path / "new")]) == 2

    def full(tensors, file, metadata):
        file.touch()
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("scripts.checkpoint.save_file", full)
    assert main(["copy", str(saved), str(tmp_path / "new")]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"error: {tmp_path}/") and "new cannot be written (" in line for line in printed] == [
        True
    ] * 3
    assert list(tmp_path.iterdir()) == []


def test_crafted_tensors_are_refused_in_one_sentence(run_dir, tmp_path, capsys):
    path = run_dir / "checkpoints" / "step-6"
    crafted_tensors(path, str(tmp_path / "executed"))
    resealed(path)
    for command in (["inspect"], ["copy", str(tmp_path / "new")]):
        assert main([command[0], str(path), *command[1:]]) == 2
        assert f"error: {path} cannot be read (a file of it holds something other" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_a_crafted_size_is_one_sentence(run_dir, capsys):
    path = run_dir / "checkpoints" / "step-6"
    metadata = read_metadata(path)
    for entry in metadata.state_dict_metadata.values():
        entry.size = torch.Size([10**16])
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    resealed(path)
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} cannot be read: ")
