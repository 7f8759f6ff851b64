"""What is written is read back; unfinished and damaged folders are refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import data.shards
from data.shard_writer import ShardWriter
from data.shards import (
    DataError,
    Manifest,
    TokenDataset,
    TokenStream,
    dtype_for,
    read_manifest,
    validation_domains,
    verify_checksums,
    verify_checksums_once,
    write_atomically,
)

EOS = 9


def write(folder: Path, documents: list[list[int]], *, vocab_size: int = 10, tokens_per_file: int = 7) -> Manifest:
    with ShardWriter(folder, vocab_size=vocab_size, eos_id=EOS, tokens_per_file=tokens_per_file) as writer:
        writer.write(documents, text_bytes=100)
        return writer.finish(tokenizer={"name": "t", "sha256": "0"}, preparation={"source": "test"})


def stream(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in [*document, EOS]]


DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 1, 2], [], [3, 3], [4, 5, 6, 7, 8]]


def test_ids_and_eos_are_written_in_order_over_several_files(tmp_path: Path) -> None:
    manifest = write(tmp_path, DOCUMENTS)
    assert len(manifest.files) > 1
    raw = b"".join((tmp_path / file.name).read_bytes() for file in manifest.files)
    assert np.frombuffer(raw, "<u2").tolist() == stream(DOCUMENTS)
    assert manifest.tokens == len(stream(DOCUMENTS)) == sum(file.tokens for file in manifest.files)
    assert manifest.documents == len(DOCUMENTS)
    assert manifest.bytes == 100
    assert manifest.bytes_per_token == 100 / manifest.tokens
    for file in manifest.files:
        content = (tmp_path / file.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.sha256
        assert len(content) == file.bytes
    assert read_manifest(tmp_path) == manifest == verify_checksums(tmp_path)


@pytest.mark.parametrize(("vocab_size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_largest_id_survives_in_the_narrowest_type(tmp_path: Path, vocab_size: int, name: str) -> None:
    manifest = write(tmp_path, [[vocab_size - 1, 0]], vocab_size=vocab_size)
    assert manifest.dtype == name == dtype_for(vocab_size)
    assert TokenDataset(tmp_path, 2)[0].tolist() == [vocab_size - 1, 0, EOS]


@pytest.mark.parametrize("tokens_per_file", [1, 4, 7, 1000])
@pytest.mark.parametrize("length", [1, 2, 5, 20])
def test_instances_are_windows_of_the_whole_stream_whatever_the_files(
    tmp_path: Path, length: int, tokens_per_file: int
) -> None:
    write(tmp_path, DOCUMENTS, tokens_per_file=tokens_per_file)
    dataset = TokenDataset(tmp_path, length)
    whole = stream(DOCUMENTS)
    assert len(dataset) == (len(whole) - 1) // length
    for i in range(len(dataset)):
        assert dataset[i].dtype == np.int64
        assert dataset[i].tolist() == whole[i * length : i * length + length + 1]
    targets = [token for i in range(len(dataset)) for token in dataset[i][1:].tolist()]
    assert targets == whole[1 : len(targets) + 1]
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]


def test_a_sequence_longer_than_the_data_is_refused_by_name(tmp_path: Path) -> None:
    tokens = write(tmp_path, DOCUMENTS).tokens
    assert len(TokenDataset(tmp_path, tokens - 1)) == 1
    with pytest.raises(DataError, match=rf"data.sequence_length={tokens} is longer .* at most {tokens - 1}"):
        TokenDataset(tmp_path, tokens)
    with pytest.raises(DataError, match=r"data\.sequence_length=0"):
        TokenDataset(tmp_path, 0)


def test_an_interrupted_writer_leaves_nothing_that_passes_for_finished(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, vocab_size=10, eos_id=EOS, tokens_per_file=3) as writer:
            writer.write(DOCUMENTS, text_bytes=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(DataError, match="did not finish"):
        TokenDataset(tmp_path, 2)
    (tmp_path / "99999.bin").write_bytes(b"left over")
    manifest = write(tmp_path, DOCUMENTS)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == [file.name for file in manifest.files]


def test_starting_again_over_a_finished_folder_takes_its_manifest_away_first(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    ShardWriter(tmp_path, vocab_size=10, eos_id=EOS, tokens_per_file=3)
    with pytest.raises(DataError, match="did not finish"):
        read_manifest(tmp_path)


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document"):
        write(tmp_path, [])
    assert not (tmp_path / "manifest.json").exists()


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    manifest = write(tmp_path, DOCUMENTS)
    path = tmp_path / manifest.files[0].name
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"00000.bin is \d+ bytes long"):
        read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"00000.bin is missing"):
        read_manifest(tmp_path)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    read_manifest(tmp_path)  # sizes are right
    with pytest.raises(DataError, match=r"00000.bin is damaged"):
        verify_checksums(tmp_path)


def test_an_altered_file_is_found_at_the_first_opening_and_after_a_change_and_no_time_lost_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(tmp_path, DOCUMENTS)
    path = tmp_path / manifest.files[1].name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"00001.bin is damaged \(its SHA-256"):
        verify_checksums_once(tmp_path)
    path.write_bytes(content)
    said: list[str] = []
    monkeypatch.setattr(data.shards, "WORTH_A_LINE", 0)
    for _ in range(3):
        assert verify_checksums_once(tmp_path, said.append) == manifest
    assert len(said) == 1
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"00001.bin is damaged"):
        verify_checksums_once(tmp_path)
    path.write_bytes(content)
    verify_checksums_once(tmp_path, said.append)
    write(tmp_path, DOCUMENTS[1:])  # another preparation in the same place
    verify_checksums_once(tmp_path, said.append)
    assert len(said) == 3


@pytest.mark.parametrize("cache", [True, False], ids=["noted in the cache", "each time"])
def test_a_folder_that_cannot_be_written_is_verified_all_the_same(
    cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    write(folder, DOCUMENTS)

    def refuse(path: Path, content: bytes) -> None:
        if not cache or path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied")
        write_atomically(path, content)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data.shards, "write_atomically", refuse)
    monkeypatch.setattr(data.shards, "WORTH_A_LINE", 0)
    said: list[str] = []
    for _ in range(3):
        verify_checksums_once(folder, said.append)
    assert len(said) == (1 if cache else 3)
    path = folder / "00001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"00001.bin is damaged"):
        verify_checksums_once(folder)


def test_a_stream_is_read_in_chunks_that_cover_it(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    chunks = list(TokenStream(tmp_path).chunks(3))
    assert max(map(len, chunks)) == 3
    assert np.concatenate(chunks).tolist() == stream(DOCUMENTS)
    assert len(TokenStream(tmp_path)) == len(stream(DOCUMENTS))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "files": 3}'])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, content: str) -> None:
    write(tmp_path, DOCUMENTS)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eos_id": "zero"}, 'eos_id is "zero", not an integer of at least 0'),
        ({"eos_id": 10}, "eos_id is 10, not below vocab_size 10"),
        ({"eos_id": True}, "eos_id is true, not an integer"),
        ({"vocab_size": 0}, "vocab_size is 0, not an integer of at least 1"),
        ({"vocab_size": "10"}, 'vocab_size is "10", not'),
        ({"documents": None}, "documents is null, not"),
        ({"tokens": 25.0}, r"tokens is 25\.0, not an integer"),
        ({"bytes": -1}, "bytes is -1, not"),
        ({"dtype": "int8"}, 'dtype is "int8", not uint16 or uint32'),
        ({"dtype": ["uint16"]}, r'dtype is \["uint16"\], not'),
        ({"tokenizer": "gpt2"}, 'tokenizer is "gpt2", not the strings name and sha256'),
        ({"tokenizer": {"name": "t"}}, r"tokenizer is \{.*\}, not"),
        ({"preparation": 3}, "preparation is 3, not settings by name"),
        ({"filtered": {"length": "many"}}, 'filtered is {"length": "many"}, not counts by name'),
        ({"broken": []}, r"broken is \[\], not counts"),
        ({"files": {}}, r"files is \{\}, not a list"),
        ({"files": ["00000.bin"]}, r"name of files\[0\] is null, not the name of a file"),
        (
            {"files": [{"name": "../a.bin", "tokens": 1, "bytes": 2, "sha256": ""}]},
            r'name of files\[0\] is "\.\./a.bin"',
        ),
        ({"files": [{"name": "a.bin", "tokens": "1", "bytes": 2, "sha256": ""}]}, r'tokens of files\[0\] is "1", not'),
        ({"files": [{"name": "a.bin", "tokens": 1, "bytes": 2}]}, r"sha256 of files\[0\] is null, not a string"),
    ],
)
def test_a_manifest_with_a_wrong_value_names_the_field_and_the_value(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    write(tmp_path, DOCUMENTS)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=rf"manifest\.json is damaged \({says}.*\): remove .* and prepare it again\."):
        read_manifest(tmp_path)


def test_a_manifest_with_a_field_that_a_later_version_added_is_read(tmp_path: Path) -> None:
    manifest = write(tmp_path, DOCUMENTS)
    path = tmp_path / "manifest.json"
    raw = json.loads(path.read_text())
    raw["files"][0]["added"] = raw["added"] = 1
    path.write_text(json.dumps(raw))
    assert read_manifest(tmp_path) == manifest


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    raw = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        read_manifest(tmp_path)


def test_a_missing_folder_names_the_script_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"scripts/prepare_data\.py"):
        read_manifest(tmp_path / "nothing")


def test_the_fingerprint_follows_the_content_not_the_place_or_the_settings(tmp_path: Path) -> None:
    first = write(tmp_path / "a", DOCUMENTS)
    same = write(tmp_path / "b", DOCUMENTS)
    same.preparation = {"source": "elsewhere"}
    assert first.fingerprint == same.fingerprint
    assert write(tmp_path / "c", DOCUMENTS[:-1]).fingerprint != first.fingerprint
    assert write(tmp_path / "d", [[1, 2, 4], *DOCUMENTS[1:]]).fingerprint != first.fingerprint


def test_validation_domains_are_sorted_and_an_unfinished_one_is_an_error(tmp_path: Path) -> None:
    assert validation_domains(tmp_path) == []
    for name in ("news", "books"):
        write(tmp_path / "validation" / name, DOCUMENTS)
    assert validation_domains(tmp_path) == ["books", "news"]
    (tmp_path / "validation" / "news" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"validation/news"):
        validation_domains(tmp_path)


def test_a_file_that_cannot_be_written_is_named_and_nothing_of_it_stays(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(tmp_path / "file", b"new")
    assert caught.value.filename == str(tmp_path / "file")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
