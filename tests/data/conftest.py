"""Small material for the data tests: texts, files in C4's format, a tokenizer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.tokenize import TextTokenizer, train_tokenizer

TEXTS = [
    f"Document {i}: the quick brown fox jumps over {i % 7} lazy dogs. Ünïcödé {'na ' * (i % 5)}✓" for i in range(60)
]


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def write_c4() -> Callable[[Path, list[str]], Path]:
    def write(path: Path, texts: list[str]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")
        return path

    return write


@pytest.fixture
def c4_folder(tmp_path: Path, write_c4: Callable[[Path, list[str]], Path]) -> Path:
    """Two training files and two validation domains."""
    folder = tmp_path / "c4"
    write_c4(folder / "part.0.json.gz", TEXTS[:30])
    write_c4(folder / "part.1.json.gz", TEXTS[30:])
    write_c4(folder / "validation" / "books.json.gz", TEXTS[:5])
    write_c4(folder / "validation" / "news.json.gz", TEXTS[5:8])
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS
