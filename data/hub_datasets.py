"""Text of the Hugging Face `datasets` library, streamed: a source like those of `data.sources`.

In: a dataset by its hub name or folder. Out: splits, with a part for each file. What `source.revision` names, a
branch or the newest commit, can change while a preparation goes on or is interrupted. So the commit is looked up when a
command begins, is what all its processes read, and is among the settings that a continuation must have.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.readers import Broken, Item
from data.shards import DataError
from data.sources import TRAIN, Split, check_apart, found_files

_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")  # in the address of a file on the hub


@dataclass(frozen=True)
class DatasetPart:
    """One of `count` runs of the files of a streamed dataset, or with a `limit` the first documents of all."""

    name: str
    config: str | None
    revision: str | None  # the commit, of a dataset on the hub
    split: str
    files: str  # digest of what the split is made of
    text_field: str
    index: int
    count: int
    limit: int | None

    @property
    def size(self) -> int | None:
        return self.limit

    @property
    def identity(self) -> list[Any]:
        return [self.files, self.index, self.count]

    def open(self) -> Any:
        """The `datasets.IterableDataset` of the whole split. Raises `DataError`."""
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # offline, unknown name, config or split, unreadable files: one exception each
            raise DataError(f"{_where(self)} cannot be opened: {_one_line(error)}") from error

    def read(self) -> Iterator[Item]:
        stream = self.open()
        place = _where(self) if self.count == 1 else f"{_where(self)}, shard {self.index + 1} of {self.count}"
        number = 0
        try:
            stream = stream if self.count == 1 else stream.shard(self.count, self.index)
            for row in stream if self.limit is None else stream.take(self.limit):
                number += 1
                text = row.get(self.text_field)
                if isinstance(text, str):
                    yield text, number
                else:
                    remedy = f"choose source.text_field from {', '.join(row)}."
                    message = f"{place}, document {number}: no string field {self.text_field}: {remedy}"
                    yield Broken("no text", message), number
        except Exception as error:  # from the network, a decoder or a parser, after any number of retries inside
            message = f"{place}, after document {number}: cannot be read: {_one_line(error)}"
            yield Broken("unreadable file", message), number


@dataclass
class HuggingFaceDataset:
    """Any text dataset the `datasets` library can stream, by hub name or local path."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = TRAIN
    validation_split: str | None = None
    text_field: str = "text"
    max_documents: int | None = None
    max_validation_documents: int | None = None

    def splits(self) -> list[Split]:
        """The training split, and the validation split as a domain named after the dataset."""
        for key in ("max_documents", "max_validation_documents"):
            limit = getattr(self, key)
            if limit is not None and limit < 1:
                raise DataError(f"source.{key}={limit} leaves no text: use null (all) or at least 1.")
        found = self._files()
        splits = []
        if self.validation_split is not None:
            domain = self.name.rstrip("/").rsplit("/", 1)[-1]
            limit = self.max_validation_documents
            splits.append(self._split(f"validation/{domain}", self.validation_split, limit, found))
        return [*splits, self._split(TRAIN, self.split, self.max_documents, found)]

    def check_output(self, output: Path) -> None:
        """A dataset in a local folder must not lie in `output`."""
        if Path(self.name).is_dir():
            check_apart(self.name, "source.name", output)

    def _files(self) -> dict[str, list[str]]:
        """Paths or addresses of the files of each split as they are now."""
        import datasets

        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision)
        except Exception as error:  # offline, unknown name or configuration, unreadable files: one exception each
            where = f"source.name={self.name} (config {self.config})"
            raise DataError(
                f"{where} cannot be opened: look at its name, its configuration and the network ({_one_line(error)})."
            ) from error
        return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}

    def _split(self, name: str, split: str, limit: int | None, found: dict[str, list[str]]) -> Split:
        if not found.get(split):
            raise DataError(
                f"source.name={self.name} (config {self.config}) has no split {split}: choose from {', '.join(found)}."
            )
        commit = _COMMIT.match(found[split][0])
        files: list[list[Any]] = [[address] for address in found[split]]
        if all(os.path.isfile(file) for file in found[split]):
            files = [file.identity for file in found_files([Path(file) for file in found[split]])]
        settings: dict[str, Any] = {"kind": "datasets", "name": self.name, "config": self.config, "split": split}
        settings |= {"revision": commit and commit[1], "text_field": self.text_field, "max_documents": limit}
        whole = DatasetPart(
            name=self.name,
            config=self.config,
            revision=settings["revision"] or self.revision,
            split=split,
            files=hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
            text_field=self.text_field,
            index=0,
            count=1,
            limit=limit,
        )
        return Split(name, settings | {"files": files}, partial(_parts, whole), unit="doc")


def _parts(whole: DatasetPart) -> list[DatasetPart]:
    """A part for each file of the dataset; with a limit one, since only a reader of all counts documents."""
    count = 1 if whole.limit is not None else whole.open().num_shards
    return [replace(whole, index=index, count=count) for index in range(count)]


def _where(part: DatasetPart) -> str:
    return f"source.name={part.name} (config {part.config}, split {part.split})"


def _one_line(error: Exception) -> str:
    """What an exception of another library says, in one line of bearable length."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:297] + "..."
