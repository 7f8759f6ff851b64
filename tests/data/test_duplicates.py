"""Of equal texts the first stays, however the split is cut and however much is compared at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.duplicates import HashPart, find_repeats, repeats_path
from data.sources import Files
from data.tokenize import TextTokenizer


@pytest.mark.parametrize("range_documents", [1, 7, 10**6])
@pytest.mark.parametrize("part_megabytes", [1e-6, 64.0])
def test_every_document_after_its_first_is_named(
    tmp_path: Path,
    write_c4: Callable,
    tokenizer: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    range_documents: int,
    part_megabytes: float,
) -> None:
    monkeypatch.setattr("data.duplicates.RANGE_DOCUMENTS", range_documents)
    texts = [f"text {number}" for number in np.random.default_rng(1).integers(0, 40, 100)]
    for i in range(5):
        write_c4(tmp_path / "in" / f"{i}.json.gz", ["", *texts[20 * i : 20 * i + 20]])  # an empty text has no number
    parts = Files(str(tmp_path / "in"), part_megabytes=part_megabytes).splits()[-1].parts()
    for index, part in enumerate(parts):
        HashPart(part, tmp_path / f"{index}.npy").run(tokenizer, lambda *_: None)  # type: ignore[arg-type]
    find_repeats([tmp_path / f"{index}.npy" for index in range(len(parts))], tmp_path / "repeats")
    repeats = [np.load(repeats_path(tmp_path / "repeats", index)).tolist() for index in range(len(parts))]
    documents = 100 // len(parts)
    found = [index * documents + number for index, numbers in enumerate(repeats) for number in numbers]
    assert len(parts) == (5 if part_megabytes < 1 else 1)
    assert found == [i for i, text in enumerate(texts) if text in texts[:i]]
    assert not list(tmp_path.glob("*.partial"))
