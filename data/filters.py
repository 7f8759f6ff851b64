"""Document filters: plug-ins that leave documents out of a preparation, each with a reason that is counted.

In: the `filters` list of scripts/prepare_data.py, for example `filters=[{name: length, min_characters: 200}]`. Out: for
each document nothing, or why it goes. A filter of your own is a subclass of `DocumentFilter` that Python can import;
its name in the list is `package.module.Class`, its options are its fields.

A verdict depends on the document alone, so that it is the same in every process. `duplicate`, which compares
documents, is therefore only declared here: `data.duplicates` finds the repeats before anything is tokenized.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from data.shards import DataError


class DocumentFilter:
    """What a filter may look at. Both methods return the reason to leave a document out, or None to keep it."""

    def reject_text(self, text: str) -> str | None:
        """Judges the text, before it is tokenized. The reason is a category to count by: no figures of the document."""
        return None

    def reject_ids(self, ids: np.ndarray) -> str | None:
        """Judges the token ids, int64 [tokens], without EOS."""
        return None


@dataclass
class Length(DocumentFilter):
    """Leaves out what is too short or too long."""

    min_characters: int | None = None  # fewer are too few
    max_characters: int | None = None  # more are too many
    min_tokens: int | None = None  # EOS not counted
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        limits = {field.name: getattr(self, field.name) for field in fields(self)}
        if all(value is None for value in limits.values()):
            raise DataError(f"the filter length has no limit: give it {', '.join(limits)}, or leave it out.")
        for name, value in limits.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise DataError(f"the filter length cannot use {name}={value}: give a positive integer.")
        for unit in ("characters", "tokens"):
            least, most = limits[f"min_{unit}"], limits[f"max_{unit}"]
            if least is not None and most is not None and least > most:
                raise DataError(
                    f"the filter length cannot use min_{unit}={least} with max_{unit}={most}: no document has both."
                )

    def reject_text(self, text: str) -> str | None:
        return self._outside(len(text), self.min_characters, self.max_characters, "characters")

    def reject_ids(self, ids: np.ndarray) -> str | None:
        return self._outside(len(ids), self.min_tokens, self.max_tokens, "tokens")

    @staticmethod
    def _outside(size: int, least: int | None, most: int | None, unit: str) -> str | None:
        if least is not None and size < least:
            return f"fewer than {least} {unit}"
        if most is not None and size > most:
            return f"more than {most} {unit}"
        return None


@dataclass
class Repetition(DocumentFilter):
    """Leaves out documents in which an n-gram of tokens follows itself again and again.

    OLMo 2 (arXiv:2501.00656, section 3.1) drops sequences of 32 or more repeats of an n-gram of 1 to 13 tokens, which
    go with spikes of the loss.
    """

    max_ngram: int = 13  # tokens of the longest n-gram looked at
    repeats: int = 32  # so many in a row, or more, are too many

    def __post_init__(self) -> None:
        for name, least in (("max_ngram", 1), ("repeats", 2)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise DataError(
                    f"the filter repetition cannot use {name}={value}: give an integer of at least {least}."
                )

    def reject_ids(self, ids: np.ndarray) -> str | None:
        for period in range(1, self.max_ngram + 1):
            # `repeats` copies of an n-gram of n tokens: (repeats - 1) * n places in a row equal the one n before
            needed = (self.repeats - 1) * period
            if len(ids) - period < needed:
                break
            equal = ids[period:] == ids[:-period]
            if np.count_nonzero(equal) < needed:
                continue
            breaks = np.flatnonzero(~equal)
            runs = np.diff(breaks, prepend=-1, append=len(equal)) - 1
            if runs.max() >= needed:
                return f"an n-gram of 1 to {self.max_ngram} tokens {self.repeats} times in a row"
        return None


@dataclass
class Duplicate(DocumentFilter):
    """Leaves out documents whose text is exactly that of an earlier one in the same split (`data.duplicates`)."""


FILTERS: dict[str, type[DocumentFilter]] = {"length": Length, "repetition": Repetition, "duplicate": Duplicate}


def build_filters(settings: list[dict[str, Any]]) -> list[tuple[str, DocumentFilter]]:
    """Names and filters of the `filters` list, in its order. Raises `DataError` for names and options unknown."""
    built = []
    for entry in settings:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise DataError(f"filters cannot use {entry}: write each as {{name: NAME, option: value}}.")
        options = {key: value for key, value in entry.items() if key != "name"}
        kind = _filter_type(entry["name"])
        known = [field.name for field in fields(kind)] if is_dataclass(kind) else None
        for key in options:
            if known is not None and key not in known:
                what = f"knows {', '.join(known)}" if known else "has no options"
                raise DataError(f"the filter {entry['name']} has no option {key}: it {what}.")
        try:
            built.append((entry["name"], kind(**options)))
        except TypeError as error:
            raise DataError(f"the filter {entry['name']} cannot be made with {options} ({error}).") from error
    names = [name for name, _ in built]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"filters name {repeated[0]} twice: give each filter once.")
    return built


def _filter_type(name: str) -> type[DocumentFilter]:
    if name in FILTERS:
        return FILTERS[name]
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise DataError(f"{name} is not a filter: choose {', '.join(FILTERS)}, or package.module.Class of your own.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"the filter {name} cannot be imported ({error}): is its folder on PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, DocumentFilter)):
        raise DataError(f"{name} is not a filter: derive it from data.filters.DocumentFilter.")
    if found.reject_text is DocumentFilter.reject_text and found.reject_ids is DocumentFilter.reject_ids:
        raise DataError(f"{name} keeps every document: give it a method reject_text or reject_ids.")
    return found
