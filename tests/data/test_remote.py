"""Shards behind an address: copied once, verified on the way, named when something is wrong. fsspec's memory:// stands
for all storages."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest

from data import remote
from data.remote import localized
from data.shards import DataError, TokenDataset, read_manifest, validation_domains, verify_checksums
from tests.shards import write_shards


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A shards directory with a tokenizer in fsspec's memory."""
    folder = write_shards(tmp_path / "local")
    (folder / "train" / "part").mkdir()  # files may lie in folders of their own
    (folder / "train" / "00002.bin").rename(folder / "train" / "part" / "00002.bin")
    manifest = json.loads((folder / "train" / "manifest.json").read_text())
    manifest["files"][2]["name"] = "part/00002.bin"
    (folder / "train" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "tokenizer.json").write_text("{}")
    name = f"/{uuid.uuid4().hex}/corpus"
    system = fsspec.filesystem("memory")
    system.put(str(folder), name, recursive=True)
    yield f"memory:/{name}"
    system.rm(name, recursive=True)
    remote._found.clear()


def opened(address: str, cache: Path) -> tuple[Path, list[str]]:
    said: list[str] = []
    remote._found.clear()  # as in another process
    return localized(address, cache, said.append), said


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    assert localized(str(tmp_path), None) == tmp_path


def test_a_copy_is_the_same_data_and_is_made_once(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = opened(address, tmp_path / "cache")
    assert len(said) == 1
    assert "copying" in said[0]
    assert folder.name.startswith("corpus-")
    assert validation_domains(folder) == validation_domains(tmp_path / "local")
    assert (folder / "tokenizer.json").read_text() == "{}"
    for name in ("train", "validation/even", "validation/odd"):
        assert read_manifest(folder / name) == read_manifest(tmp_path / "local" / name)
    here, there = (TokenDataset(root / "train", 16) for root in (folder, tmp_path / "local"))
    assert all((here[i] == there[i]).all() for i in range(len(there)))
    assert not list(folder.rglob("*.partial"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")}
    assert opened(address + "/", tmp_path / "cache") == (folder, [])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")} == before
    monkeypatch.setattr(remote, "_Remote", None)
    assert localized(address + "/", tmp_path / "cache") == folder  # this process has looked there before


def test_an_interrupted_copy_goes_on_with_what_it_lacks(address: str, tmp_path: Path) -> None:
    folder, _ = opened(address, tmp_path / "cache")
    kept = folder / "train" / "00000.bin"
    before = kept.stat().st_mtime_ns
    (folder / "train" / "00001.bin").unlink()
    (folder / "train" / "manifest.json").unlink()
    again, said = opened(address, tmp_path / "cache")
    assert again == folder
    assert "copying 1 file (" in said[0]
    read_manifest(folder / "train")
    assert kept.stat().st_mtime_ns == before


def test_hosts_that_copy_into_a_shared_cache_at_one_time_do_not_disturb_each_other(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, others = os.replace, []
    system, _, *rest = os.uname()

    def while_another_host_does_it_too(*arguments: Path) -> None:
        if not others and Path(arguments[1]).is_relative_to(
            tmp_path / "cache"
        ):  # this host has written a file, and not named it yet
            others.append(None)
            with monkeypatch.context() as other:
                other.setattr(os, "uname", lambda: os.uname_result((system, "another", *rest)))
                other.setattr(remote, "host_lock", nullcontext)
                others[0], _ = opened(address, tmp_path / "cache")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", while_another_host_does_it_too)
    monkeypatch.setattr(remote, "CONNECTIONS", 1)
    folder, _ = opened(address, tmp_path / "cache")
    assert folder == others[0]
    verify_checksums(folder / "train")
    assert not list(folder.rglob("*.partial"))


def test_other_data_at_the_same_address_gets_another_folder(address: str, tmp_path: Path) -> None:
    first, _ = opened(address, tmp_path / "cache")
    system = fsspec.filesystem("memory")
    system.put(str(write_shards(tmp_path / "new", seed=1)) + "/", address.removeprefix("memory:/"), recursive=True)
    second, said = opened(address, tmp_path / "cache")
    assert second != first
    assert said
    assert read_manifest(first / "train").fingerprint != read_manifest(second / "train").fingerprint


def test_a_damaged_a_missing_and_an_unfinished_remote_file_are_named(address: str, tmp_path: Path) -> None:
    system, root = fsspec.filesystem("memory"), address.removeprefix("memory:/")
    name = f"{root}/train/00001.bin"
    content = system.cat_file(name)
    system.pipe_file(name, bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=r"corpus/train/00001\.bin is damaged \(its SHA-256"):
        opened(address, tmp_path / "cache")
    system.rm_file(name)
    with pytest.raises(DataError, match=r"corpus/train/00001\.bin is missing"):
        opened(address, tmp_path / "cache")
    system.pipe_file(name, content)
    manifest = f"{root}/train/manifest.json"
    whole = system.cat_file(manifest)
    system.pipe_file(manifest, json.dumps(json.loads(whole) | {"version": 99}).encode())
    with pytest.raises(DataError, match=r"corpus/train/manifest\.json has format version 99"):
        opened(address, tmp_path / "cache")
    system.rm_file(manifest)
    with pytest.raises(DataError, match=r"holds no finished token shards"):
        opened(address, tmp_path / "cache")


def test_a_passing_error_of_the_network_is_tried_again_and_a_lasting_one_named(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fsspec.filesystem("memory")
    original, calls = type(system).cat_file, []

    def flaky(self: object, path: str, *arguments: object, **options: object) -> bytes:
        calls.append(path)
        if len(calls) % 2:
            raise TimeoutError("no answer")
        return original(self, path, *arguments, **options)

    monkeypatch.setattr(type(system), "cat_file", flaky)
    folder, _ = opened(address, tmp_path / "cache")
    assert len(calls) == 8  # three manifests and a tokenizer, twice each
    read_manifest(folder / "train")
    monkeypatch.setattr(type(system), "cat_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer")))
    with pytest.raises(DataError, match=r"train/manifest\.json cannot be read \(no answer\)"):
        opened(address, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_and_an_unknown_storage_are_one_sentence(address: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache"):
        opened(address, tmp_path / "file")
    with pytest.raises(DataError, match=r"data\.path=nowhere://x cannot be opened"):
        opened("nowhere://x", tmp_path)


def test_an_address_that_cannot_be_connected_to_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    def refused(address):
        raise OSError("Name or service not known")

    monkeypatch.setattr("fsspec.core.url_to_fs", refused)
    with pytest.raises(DataError, match=r"data\.path=ftp://nowhere/x cannot be opened \(Name or service not known\)"):
        opened("ftp://nowhere/x", tmp_path)
