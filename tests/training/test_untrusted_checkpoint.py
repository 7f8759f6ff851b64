"""A checkpoint that somebody else wrote: nothing in it is executed, and what is not of this model is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

import training.storage
from models.config import ConfigError
from training.checkpoint import MARKER, find_checkpoints, sealed, verify
from training.storage import METADATA, UnsafeCheckpointError, read_metadata
from training.trainer import train


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def resealed(path):
    """The checksums of a checkpoint, as one who can write all files would set them."""
    content = json.loads((path / MARKER).read_text())
    for name in content["bytes"]:
        content["bytes"][name] = (path / name).stat().st_size
        content["sha256"][name] = training.storage.checksum(path / name)
    (path / MARKER).write_text(json.dumps(sealed(content)))


def crafted_metadata(path, target):
    (path / METADATA).write_bytes(pickle.dumps(Payload(target)))


def crafted_entry(path, target):
    """Metadata that dcp would follow to bytes which it unpickles: plain classes only."""
    metadata = read_metadata(path)
    key = next(iter(metadata.state_dict_metadata))
    (path / METADATA).write_bytes(
        pickle.dumps(
            Metadata(
                {**metadata.state_dict_metadata, key: BytesStorageMetadata()},
                metadata.planner_data,
                metadata.storage_data,
                StorageMeta(),
            )
        )
    )


def crafted_tensors(path, target):
    """Tensor files whose every entry is a pickle with the payload."""
    metadata = read_metadata(path)
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        (path / name).unlink()
    for info in metadata.storage_data.values():
        with open(path / info.relative_path, "ab") as file:
            info.offset = file.tell()
            torch.save(Payload(target), file)
            info.length = file.tell() - info.offset
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def crafted_shapes(path, target):
    """No code, but tensors that the model does not have."""
    metadata = read_metadata(path)
    for entry in metadata.state_dict_metadata.values():
        entry.size = torch.Size([10**9])
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def crafted_path(path, target):
    metadata = read_metadata(path)
    next(iter(metadata.storage_data.values())).relative_path = "../../../etc/passwd"
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def without_a_tensor(path, target):
    """Whole, but of another model."""
    metadata = read_metadata(path)
    del metadata.state_dict_metadata["model.embedding.weight"]
    (path / METADATA).write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "craft", [crafted_metadata, crafted_entry, crafted_tensors, crafted_shapes, crafted_path, without_a_tensor]
)
def test_a_crafted_checkpoint_is_refused_and_runs_nothing(craft, run, tmp_path):
    path = Path(run.run.dir) / "checkpoints" / "step-6"
    shutil.rmtree(path.with_name("step-8"))
    craft(path, str(tmp_path / "executed"))
    resealed(path)
    with pytest.raises(
        ConfigError, match=r"step-6 is not loaded: [^.].*[^.]\. Use a checkpoint that train\.py has written\.$"
    ):
        train(run)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({"a": 1}),
        pickle.dumps(os.system),
        b"\x80\x02X\x01\0\0\0\x80.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_metadata_that_is_something_else_is_refused(content, tmp_path):
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(UnsafeCheckpointError):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["state"].update(sources=[1]),
        lambda content: content["state"].update(unrecorded={"train/loss": "b"}),
        lambda content: content.update(sha256={}),
        lambda content: content.update(bytes={}, sha256={}),
    ],
    ids=["sources", "unrecorded", "no checksums", "no files"],
)
def test_a_marker_that_is_sealed_and_makes_no_sense_is_damaged(change, run):
    path = find_checkpoints(Path(run.run.dir))[-1]
    content = json.loads((path / MARKER).read_text())
    change(content)
    (path / MARKER).write_text(json.dumps(sealed(content)))
    with pytest.raises(ConfigError, match="is damaged"):
        verify(path)


def test_a_marker_of_brackets_is_damaged_and_the_checkpoint_before_is_taken(run, capsys):
    path = find_checkpoints(Path(run.run.dir))[-1]
    (path / MARKER).write_text("[" * 100_000)
    train(run)
    assert f"{path} is damaged" in capsys.readouterr().err
