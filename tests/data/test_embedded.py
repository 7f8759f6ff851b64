"""The embedded corpus: prose only, no repeats, nothing of validation in training, the same bytes each time."""

from __future__ import annotations

import gzip
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import data.embedded
from data.embedded import DOMAINS, Document, _read_docstrings, _select, build_corpus, prose
from data.readers import Piece, read_piece
from data.shards import DataError
from data.sources import Embedded

PROSE = "The queue is read by a second thread, which waits until the first one has written to it."


def documents(count: int, kind: str = "docstrings") -> Iterator[Document]:
    source = random.Random(kind)
    for i in range(count):
        words = ["".join(source.choices(string.ascii_lowercase, k=5)) for _ in range(80)]
        yield Document(f"package/{kind}_{i}.py", kind, [f"This is the text of {' '.join(words)}", PROSE])


def machine(library: int = 20) -> Iterator[Document]:
    """A small stand-in for an installation, 1.8 MB."""
    yield from documents(library, "library")
    yield from documents(40, "documentation")
    yield from documents(3500, "docstrings")


def test_prose_is_kept_and_everything_else_left_out() -> None:
    text = f"""
    {PROSE}

    Parameters
    ----------
    size : int
        How many of the items are read at once.

    >>> the prompt of a session is not for reading

    Copyright 2020 by the authors of this and of that, all rights reserved.

    ```python
    result = the_answer(to, a, question, of, this, kind)
    ```

    a[0] = {{1: 2, 3: 4}}; b = (a[1] + 3) * 4 // 5 - the[7]

    Write to someone@example.com if this is not what you want.

    Short words.
    """
    kept = prose(text)
    assert kept == [PROSE, "Parameters\nsize : int\n    How many of the items are read at once."]


def test_docstrings_come_in_source_order_under_their_names(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        f'"""{PROSE}"""\n'
        "class A:\n"
        f'    """First: {PROSE}"""\n'
        "    def method(self):\n"
        f'        """Second: {PROSE}"""\n'
        f'        def inner():\n            """Hidden: {PROSE}"""\n'
        'x = """This is a string of the program and is not a documentation of it."""\n'
        "add_docstr(f, r'''\n    Third: "
        f"{PROSE}\n    ''')\n"
    )
    document = _read_docstrings((str(path), "package/module.py", "docstrings"))
    assert document is not None
    assert document.paragraphs == [
        PROSE,
        f"A\nFirst: {PROSE}",
        f"A.method\nSecond: {PROSE}",
        f"Third: {PROSE}",
    ]
    path.write_text('"""not Python')
    assert _read_docstrings((str(path), "package/module.py", "docstrings")) is None


def test_repeats_and_near_repeats_are_dropped() -> None:
    long = (
        "In this paragraph there are enough words of the language to find that another one is nearly the same as it is"
    )
    paragraphs = [long, long.upper(), long + " today", "Quite another thing, with the other words that it needs. " * 5]
    train, _ = _select([Document("a", "docstrings", paragraphs)], 10_000)
    assert train[0].paragraphs == [paragraphs[0], paragraphs[3]]


def test_no_paragraph_of_validation_is_in_training_and_all_domains_have_text() -> None:
    train, validation = _select(machine(), 1_100_000)
    assert set(validation) == set(DOMAINS)
    seen = {paragraph for document in train for paragraph in document.paragraphs}
    for domain in DOMAINS:
        held_out = {paragraph for document in validation[domain] for paragraph in document.paragraphs}
        assert held_out
        assert not held_out & seen
    assert 1_100_000 <= sum(len(document.text) for document in train) < 1_101_000


def test_the_corpus_is_the_same_each_time_kept_when_whole_and_never_written_over_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.embedded, "_all_documents", machine)
    for name in ("a", "b"):
        build_corpus(tmp_path / name, 1)
    paths = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [path.as_posix() for path in paths[-3:]] == [f"validation/{domain}.json.gz" for domain in sorted(DOMAINS)]
    for path in paths:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    first_line = gzip.decompress((tmp_path / "a" / "validation" / "docstrings.json.gz").read_bytes()).splitlines()[0]
    row = json.loads(first_line)
    assert set(row) == {"text", "timestamp", "url"}

    monkeypatch.setattr(data.embedded, "_all_documents", None)
    build_corpus(tmp_path / "a", 1)  # whole already: nothing is read again
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(DataError, match="holds other files"):
        build_corpus(tmp_path / "mine", 1)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_source_gives_the_files_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.embedded, "_all_documents", machine)
    splits = Embedded(str(tmp_path / "text"), 1).splits()
    assert not (tmp_path / "text").exists()  # listing splits is cheap
    assert [split.name for split in splits] == [f"validation/{domain}" for domain in sorted(DOMAINS)] + ["train"]
    texts = [text for part in splits[-1].parts() for text, _ in part.read()]  # type: ignore[union-attr]
    files = sorted((tmp_path / "text").glob("*.json.gz"))
    assert texts == [text for path in files for text, _ in read_piece(Piece(str(path), 0), "text", "file")]
    assert sum(map(len, texts)) >= 1_000_000


def test_too_little_text_or_too_small_a_corpus_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.embedded, "_all_documents", lambda: documents(5))
    with pytest.raises(DataError, match=r"only 0\.0 MB of documentation was found"):
        build_corpus(tmp_path / "text", 1)
    assert not (tmp_path / "text").exists()
    with pytest.raises(DataError, match=r"source\.max_megabytes=0\.5"):
        build_corpus(tmp_path / "text", 0.5)
