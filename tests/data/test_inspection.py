"""What scripts/inspect_data.py counts: overlap against a plain set of n-grams, statistics against a plain count."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data.overlap
from data.overlap import OverlapFinder
from data.picture import document_shades, draw_batch
from data.shard_writer import ShardWriter
from data.shards import TokenStream
from data.statistics import statistics

EOS = 0
Documents = list[list[int]]


def write(folder: Path, documents: Documents, tokens_per_file: int = 40, vocab_size: int = 50) -> TokenStream:
    with ShardWriter(folder, vocab_size=vocab_size, eos_id=EOS, tokens_per_file=tokens_per_file) as writer:
        writer.write(documents, text_bytes=1)
        writer.finish(tokenizer={"name": "t", "sha256": "0"}, preparation={})
    return TokenStream(folder)


def random_documents(seed: int, count: int, ids: int) -> Documents:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, ids, size=generator.integers(0, 15)).tolist() for _ in range(count)]


def ngrams(document: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(document[i : i + n]) for i in range(len(document) - n + 1)]


@pytest.mark.parametrize("colliding", [False, True])
@pytest.mark.parametrize("ngram", [1, 2, 4])
def test_overlap_equals_that_of_plain_sets_over_files_and_chunks(
    tmp_path: Path, ngram: int, colliding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, validation = random_documents(1, 60, 7), random_documents(2, 25, 9)
    train_stream, stream = write(tmp_path / "train", train), write(tmp_path / "validation", validation)
    chunks = TokenStream.chunks
    monkeypatch.setattr(TokenStream, "chunks", lambda self, size=11: chunks(self, 11))
    if colliding:  # hashes that say nothing: the ids themselves are compared
        monkeypatch.setattr(data.overlap, "mix", lambda x: x & np.uint64(1))
    finder = OverlapFinder(stream, ngram)
    finder.scan(train_stream)
    found = finder.report(worst=100)
    seen = {gram for document in train for gram in ngrams(document, ngram)}
    grams = [ngrams(document, ngram) for document in validation]
    hits = [sum(gram in seen for gram in document) for document in grams]
    if colliding:  # one candidate of each hash and chunk is looked at, so some may be missed, none wrongly found
        assert found.found <= sum(hits)
        return
    assert 0 < sum(hits) < sum(map(len, grams)), "the case must tell"
    assert (found.ngrams, found.found) == (sum(map(len, grams)), sum(hits))
    assert (found.documents, found.touched) == (sum(map(bool, grams)), sum(map(bool, hits)))
    assert found.covered == sum(2 * hit >= len(gram) > 0 for hit, gram in zip(hits, grams, strict=True))
    shares = sorted((hit / len(gram) for hit, gram in zip(hits, grams, strict=True) if hit), reverse=True)
    assert [share for share, _, _ in found.worst] == pytest.approx(shares)
    for share, begin, length in found.worst:
        ids = np.empty(length, dtype=np.int64)
        stream.read(begin, ids)
        number = validation.index(ids.tolist()[:-1])
        assert share == hits[number] / len(grams[number])


def test_a_document_copied_into_training_is_found_and_words_across_documents_are_not(tmp_path: Path) -> None:
    stream = write(tmp_path / "validation", [[1, 2, 3, 4, 5], [11, 12, 13, 14], [21, 22, 23, 24]])
    finder = OverlapFinder(stream, 3)
    finder.scan(write(tmp_path / "train", [[9, 11, 12, 13, 14, 9], [3, 4], [5, 21, 22], [23, 24]]))
    found = finder.report()
    assert (found.ngrams, found.found, found.documents, found.touched, found.covered) == (7, 2, 3, 1, 1)
    assert found.worst == [(1.0, 6, 5)]
    with pytest.raises(ValueError, match="ngram=0"):
        OverlapFinder(stream, 0)


def test_statistics_equal_a_plain_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(3, 200, 50)
    stream = write(tmp_path, documents)
    chunks = TokenStream.chunks
    monkeypatch.setattr(TokenStream, "chunks", lambda self, size=11: chunks(self, 11))
    found = statistics(stream)
    count = Counter(token for document in documents for token in [*document, EOS])
    assert found.problems == []
    assert found.most_frequent(1000) == sorted(count.items(), key=lambda pair: (-pair[1], pair[0]))
    assert (found.documents, found.used) == (200, len(count))
    assert found.longest == max(len(document) + 1 for document in documents)
    lengths = Counter((len(document) + 1).bit_length() - 1 for document in documents)
    assert {i: n for i, n in enumerate(found.lengths.tolist()) if n} == lengths
    p = np.array(list(count.values())) / count.total()
    assert found.entropy() == pytest.approx(-(p * np.log(p)).sum())


def test_data_that_contradicts_its_manifest_is_a_problem_each(tmp_path: Path) -> None:
    stream = write(tmp_path, [[1, 2, 3], [4, 5]], vocab_size=6)
    stream.manifest.documents, stream.manifest.eos_id, stream.manifest.vocab_size = 5, 4, 5
    assert statistics(stream).problems == [
        "1 EOS ids were found and the manifest has 5 documents",
        "the last 2 ids have no EOS after them",
        "the id 5 occurs and the tokenizer has 5",
    ]


def test_a_damaged_id_of_four_billion_is_named_and_takes_no_memory(tmp_path: Path) -> None:
    stream = write(tmp_path, [[1, 2, 3], [4, 5]], vocab_size=70_000)
    path = tmp_path / "00000.bin"
    path.write_bytes(b"\xff" * 4 + path.read_bytes()[4:])
    found = statistics(TokenStream(tmp_path))
    assert found.problems == ["the id 4294967295 occurs and the tokenizer has 70,000"]
    assert (found.counts.sum(), len(found.counts)) == (len(stream) - 1, 70_000)


def test_a_picture_shows_documents_in_turn_and_padding_apart(tmp_path: Path) -> None:
    rows = np.array([[1, 2, EOS, 4, 5, EOS, 7], [~1, EOS, ~3, EOS, ~EOS, ~EOS, ~EOS]])
    assert document_shades(rows, EOS).tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, -1, -1]]
    draw_batch([("a batch", rows, np.array([0, 1]))], ["web", "code"], EOS, tmp_path / "batch.png")
    assert (tmp_path / "batch.png").read_bytes().startswith(b"\x89PNG")
