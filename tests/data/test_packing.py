"""Best-fit packing: every target of every document once, nothing cut that fits, little padding, the same each time."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data.packing
from data.documents import micro_batch
from data.loader import BatchLoader
from data.mixture import InstanceStream
from data.packing import PackedDataset, best_fit
from data.shard_writer import ShardWriter
from data.shards import DataError, TokenDataset

EOS = 0
LENGTH = 16


def write(folder: Path, documents: list[list[int]], tokens_per_file: int = 100) -> Path:
    with ShardWriter(folder, vocab_size=60_000, eos_id=EOS, tokens_per_file=tokens_per_file) as writer:
        writer.write(documents, text_bytes=1)
        writer.finish(tokenizer={"name": "t", "sha256": "0"}, preparation={})
    return folder


def random_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Every id occurs once, so that a target is known by itself."""
    generator = np.random.default_rng(seed)
    ids = iter(range(1, 60_000))
    return [[next(ids) for _ in range(length)] for length in generator.integers(0, longest, size=count)]


def targets_of(dataset: PackedDataset) -> Counter[tuple[int, int]]:
    """Pairs of input and target, over all instances."""
    rows = np.stack([dataset[i] for i in range(len(dataset))])
    batch = micro_batch(rows, None, 1.0)
    counted = batch.targets >= 0
    return Counter(zip(batch.inputs[counted].tolist(), batch.targets[counted].tolist(), strict=True))


@pytest.mark.parametrize("block", [1, 7, 2**20])
@pytest.mark.parametrize("longest", [10, 17, 18, 90])
def test_every_target_of_every_document_is_there_once_after_its_own_document(
    tmp_path: Path, longest: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.packing, "BLOCK", block)
    documents = random_documents(200, longest)
    dataset = PackedDataset(write(tmp_path, documents), LENGTH)
    want = Counter(pair for text in documents for pair in zip([*text, EOS], [*text, EOS][1:], strict=False))
    assert targets_of(dataset) == want
    counts = dataset.target_counts(np.arange(len(dataset)))
    assert counts.sum() == sum(want.values())
    for index in range(len(dataset)):
        row = dataset[index]
        assert row.shape == (LENGTH + 1,)
        assert (row[1:] >= 0).sum() == counts[index]


def test_only_documents_longer_than_an_instance_are_cut_and_windows_cut_more(tmp_path: Path) -> None:
    documents = random_documents(400, 20)
    dataset = PackedDataset(write(tmp_path, documents), LENGTH)
    report = dataset.report
    assert report.documents == 400
    assert report.cut == sum(len(text) + 1 > LENGTH + 1 for text in documents)
    assert report.without_targets == sum(not text for text in documents)
    stream = [i for i, text in enumerate(documents) for _ in range(len(text) + 1)]
    windows = [set(stream[i : i + LENGTH]) for i in range(0, len(stream), LENGTH)]
    assert report.cut_by_windows == sum(n > 1 for n in Counter(i for window in windows for i in window).values())
    assert report.cut_by_windows > 2 * report.cut
    places = len(dataset) * (LENGTH + 1)
    marked = sum((dataset[i] == ~EOS).sum() for i in range(len(dataset)))
    assert report.padding == marked
    assert report.padding_share == marked / places < 0.02
    assert "padding" in str(report)


def test_best_fit_decreasing_fills_the_fullest_bin_that_has_room() -> None:
    assert best_fit(np.array([3, 6, 4, 5, 2]), 10).tolist() == [1, 0, 0, 1, 1]
    generator = np.random.default_rng(1)
    for _ in range(30):
        capacity = int(generator.integers(1, 70))
        lengths = generator.integers(1, capacity + 1, size=int(generator.integers(0, 300)))
        bins = best_fit(lengths, capacity)
        used = np.bincount(bins, weights=lengths) if len(bins) else np.zeros(0)
        assert (used <= capacity).all()
        assert (used > 0).all()
        assert len(used) <= 11 / 9 * -(-lengths.sum() // capacity) + 4 or (np.sort(used)[:2].sum() > capacity)
        room = {}  # the rule itself, slowly
        for piece in np.argsort(-lengths, kind="stable"):
            fitting = [b for b, left in room.items() if left >= lengths[piece]]
            tightest = min((room[b] for b in fitting), default=None)
            expected = capacity if tightest is None else tightest
            assert room.get(int(bins[piece]), capacity) == expected
            room[int(bins[piece])] = expected - int(lengths[piece])


def test_pieces_of_an_instance_stand_as_in_the_stream_and_the_first_id_is_no_target(tmp_path: Path) -> None:
    dataset = PackedDataset(write(tmp_path, [[1, 2], [3, 4, 5, 6, 7, 8], [9]]), LENGTH)
    assert len(dataset) == 1
    assert dataset[0].tolist() == [~1, 2, EOS, ~3, 4, 5, 6, 7, 8, EOS, ~9, EOS, *[~EOS] * 5]
    with pytest.raises(IndexError):
        dataset[1]


def test_the_index_is_kept_and_made_again_for_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = write(tmp_path, random_documents(50, 20))
    first = PackedDataset(folder, LENGTH, said.append)
    rows = [first[i].tolist() for i in range(len(first))]
    assert len(said) == 2
    second = PackedDataset(folder, LENGTH, said.append)
    assert len(said) == 2
    assert [second[i].tolist() for i in range(len(second))] == rows
    assert second.report == first.report
    with pytest.raises(DataError, match=r"sequence_length=0"):
        PackedDataset(folder, 0)
    write(tmp_path, random_documents(50, 20, seed=1))
    third = PackedDataset(folder, LENGTH, said.append)
    assert len(said) == 4
    assert [third[i].tolist() for i in range(len(third))] != rows
    (folder / f"packing-{LENGTH}" / "packing.json").unlink()  # interrupted while it was written
    assert PackedDataset(folder, LENGTH, said.append).report == third.report
    assert len(said) == 6
    for name in ("pieces.bin", "lengths.bin", "ends.bin", "targets.bin"):
        file = folder / f"packing-{LENGTH}" / name
        file.write_bytes(file.read_bytes()[:-8])
        assert PackedDataset(folder, LENGTH, said.append).report == third.report
        file.unlink()
        again = PackedDataset(folder, LENGTH, said.append)
        assert [again[i].tolist() for i in range(len(again))] == [third[i].tolist() for i in range(len(third))]
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"cannot write its index .*No space left.*data\.packing=none"):
        PackedDataset(folder, LENGTH + 1)


@pytest.mark.parametrize("name", ["pieces.bin", "lengths.bin", "ends.bin", "targets.bin"])
def test_an_altered_index_and_one_without_checksums_are_made_again(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    folder = write(tmp_path, random_documents(50, 20))
    first = PackedDataset(folder, LENGTH, said.append)
    rows = [first[i].tolist() for i in range(len(first))]
    file, record = (folder / f"packing-{LENGTH}" / one for one in (name, "packing.json"))
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    again = PackedDataset(folder, LENGTH, said.append)
    assert len(said) == 4
    assert [again[i].tolist() for i in range(len(again))] == rows
    assert file.read_bytes() == content
    report = json.loads(record.read_text())
    del report["sha256"]  # as it was before there were any
    record.write_text(json.dumps(report))
    assert PackedDataset(folder, LENGTH, said.append).report == first.report
    assert len(said) == 6
    PackedDataset(folder, LENGTH, said.append)
    assert len(said) == 6


def test_hosts_that_pack_a_shared_folder_at_one_time_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, random_documents(50, 20))
    pack_block, packed = data.packing._pack_block, []

    def while_another_host_does_it_too(*arguments):
        if not packed:  # this host is in the middle of it
            packed.append(None)
            with monkeypatch.context() as other:
                other.setattr(os, "uname", lambda: SimpleNamespace(nodename="another"))
                other.setattr(data.packing, "host_lock", nullcontext)
                packed[0] = PackedDataset(folder, LENGTH)
        return pack_block(*arguments)

    monkeypatch.setattr(data.packing, "_pack_block", while_another_host_does_it_too)
    dataset = PackedDataset(folder, LENGTH)
    assert dataset.report == packed[0].report
    assert targets_of(dataset) == targets_of(packed[0])
    assert sorted(path.name for path in folder.glob("packing*")) == [f"packing-{LENGTH}"]


def test_a_last_document_without_eos_is_packed_too(tmp_path: Path) -> None:
    folder = write(tmp_path, [[1, 2, 3], [4, 5]])
    path, manifest = folder / "00000.bin", json.loads((folder / "manifest.json").read_text())
    path.write_bytes(path.read_bytes()[:-2])
    manifest["tokens"] -= 1
    manifest["files"][0]["tokens"] -= 1
    manifest["files"][0]["bytes"] -= 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert targets_of(PackedDataset(folder, LENGTH)) == Counter([(1, 2), (2, 3), (3, EOS), (4, 5)])


def test_data_without_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing can be packed"):
        PackedDataset(write(tmp_path, [[], []]), LENGTH)


def test_weights_of_micro_batches_are_their_shares_of_the_targets_on_any_number_of_ranks(tmp_path: Path) -> None:
    folder = write(tmp_path, random_documents(300, 15))
    datasets = [PackedDataset(folder, LENGTH), TokenDataset(folder, LENGTH)]
    for micro, world in ((12, 1), (2, 3), (1, 12)):
        parts = []
        for rank in range(world):
            loader = BatchLoader(InstanceStream(datasets, [2, 1], 0), 12, micro, rank, world)
            parts += loader.batch(24)
            loader.close()
        counts = [int((part.targets >= 0).sum()) for part in parts]
        assert len(set(counts)) > 1 or len(counts) == 1
        for part, count in zip(parts, counts, strict=True):
            assert part.weight == pytest.approx(count * world / sum(counts), rel=1e-12)
