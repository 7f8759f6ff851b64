"""Filters leave out what they say, for a reason that can be counted, and a plug-in is taken like one of ours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from data.filters import DocumentFilter, Length, Repetition, build_filters
from data.shards import DataError


@dataclass
class NoShouting(DocumentFilter):
    """A filter of a user's own."""

    share: float = 0.5

    def reject_text(self, text: str) -> str | None:
        return "capitals" if sum(map(str.isupper, text)) > self.share * len(text) else None


@pytest.mark.parametrize(
    ("text", "reason"),
    [("ab", "fewer than 3 characters"), ("abc", None), ("✓✓✓✓✓", None), ("abcdef", "more than 5 characters")],
)
def test_length_counts_characters(text: str, reason: str | None) -> None:
    assert Length(min_characters=3, max_characters=5).reject_text(text) == reason


def test_length_counts_tokens() -> None:
    length = Length(min_tokens=2, max_tokens=3)
    assert [length.reject_ids(np.arange(n)) for n in (1, 2, 3, 4)] == [
        "fewer than 2 tokens", None, None, "more than 3 tokens",
    ]  # fmt: skip
    assert length.reject_text("") is None


def brute_force(ids: list[int], max_ngram: int, repeats: int) -> bool:
    for n in range(1, max_ngram + 1):
        for start in range(len(ids) - n * repeats + 1):
            if ids[start : start + n] * repeats == ids[start : start + n * repeats]:
                return True
    return False


def test_repetition_finds_what_comparing_every_run_finds() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        ids = generator.integers(0, 2, generator.integers(0, 30)).tolist()
        max_ngram, repeats = int(generator.integers(1, 5)), int(generator.integers(2, 6))
        rejected = Repetition(max_ngram, repeats).reject_ids(np.array(ids, dtype=np.int64)) is not None
        assert rejected == brute_force(ids, max_ngram, repeats), (ids, max_ngram, repeats)
        found.append(rejected)
    assert 50 < sum(found) < 350


def test_repetition_by_default_is_olmos_limit() -> None:
    ids = list(range(100, 200))
    for n in (1, 5, 13, 14):
        once = list(range(n))
        assert Repetition().reject_ids(np.array(ids + once * 31 + ids)) is None
        assert (Repetition().reject_ids(np.array(ids + once * 32 + ids)) is not None) == (n <= 13)


def test_filters_are_built_in_order_and_a_plug_in_is_imported_by_its_name() -> None:
    name = f"{__name__}.NoShouting"
    built = build_filters([{"name": "length", "min_tokens": 3}, {"name": name, "share": 0.2}, {"name": "repetition"}])
    assert [entry[0] for entry in built] == ["length", name, "repetition"]
    assert built[1][1].reject_text("HELLO you") == "capitals"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["length"], "filters cannot use length: write each as"),
        ([{"min_tokens": 3}], "write each as {name: NAME"),
        ([{"name": "lenght"}], "lenght is not a filter: choose length, repetition, duplicate"),
        ([{"name": "length"}], "length has no limit"),
        ([{"name": "length", "min_words": 3}], "length has no option min_words: it knows min_characters"),
        ([{"name": "length", "min_tokens": -1}], "cannot use min_tokens=-1"),
        ([{"name": "repetition", "repeats": 1}], "cannot use repeats=1"),
        ([{"name": "duplicate", "fuzzy": True}], "duplicate has no option fuzzy: it has no options"),
        ([{"name": "repetition"}, {"name": "repetition"}], "name repetition twice"),
        ([{"name": "no_such_module.Filter"}], "no_such_module.Filter cannot be imported"),
        ([{"name": "json.JSONDecoder"}], "json.JSONDecoder is not a filter: derive it"),
    ],
)
def test_a_mistake_in_filters_is_one_sentence(settings: list, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        build_filters(settings)
    assert sentence in str(error.value)


def test_a_plug_in_that_judges_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.filters\.DocumentFilter keeps every document: give it a method"):
        build_filters([{"name": "data.filters.DocumentFilter"}])
