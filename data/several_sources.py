"""Several sources prepared by one command, with one tokenizer and the weights that a run reads them with.

In: a YAML file, for each source a name, a weight, and the keys of its own `source` group:

    web:  {source: files, path: "c4/*.json.gz", weight: 0.7}
    code: {source: datasets, name: some/code, weight: 0.3}

Out: the splits of each below its name, `web/train` and so on: each `output/NAME` is a shards directory of its own. The
weights change nothing here; a run mixes the directories in these proportions (`data.mixture`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data.hub_datasets import HuggingFaceDataset
from data.shards import DataError
from data.sources import Embedded, Files, Source, Split, TokenFiles

SINGLE_SOURCES: dict[str, type[Source]] = {
    "files": Files,
    "datasets": HuggingFaceDataset,
    "embedded": Embedded,
    "token_files": TokenFiles,
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_RESERVED = ("train", "validation")


@dataclass
class SeveralSources:
    """The sources of a YAML file."""

    file: str

    def splits(self) -> list[Split]:
        """Validation of all sources first. Raises `DataError` for a mistake in the file, or of a source."""
        found = []
        for name, (source, _) in self._read().items():
            try:
                splits = source.splits()
            except DataError as error:
                raise DataError(f"{self.file}, {name}: {error}") from error
            found += [Split(f"{name}/{split.name}", split.settings, split.parts, split.unit) for split in splits]
        return sorted(found, key=lambda split: split.is_training)

    def check_output(self, output: Path) -> None:
        """Raises `DataError` when the files of one of the sources lie in `output`."""
        for name, (source, _) in self._read().items():
            try:
                source.check_output(output)
            except DataError as error:
                raise DataError(f"{self.file}, {name}: {error}") from error

    def weights(self) -> dict[str, float]:
        """The weight of each source by its name."""
        return {name: weight for name, (_, weight) in self._read().items()}

    def _read(self) -> dict[str, tuple[Source, float]]:
        path = Path(self.file).expanduser()
        try:
            raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise DataError(
                f"source.file={self.file} cannot be read ({reason}): give a YAML file of sources."
            ) from error
        if not isinstance(raw, dict) or not raw:
            raise DataError(
                f"source.file={self.file} holds no sources: write `NAME: {{source: ..., weight: ...}}` lines."
            )
        return {str(name): self._source(str(name), entry) for name, entry in raw.items()}

    def _source(self, name: str, entry: Any) -> tuple[Source, float]:
        where = f"{self.file}, {name}"
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise DataError(f"{where}: cannot be the name of a folder of sources: rename it.")
        options = dict(entry) if isinstance(entry, dict) else {}
        kind, weight = options.pop("source", None), options.pop("weight", None)
        if kind not in SINGLE_SOURCES:
            raise DataError(f"{where}: source={kind} is not a source: choose {', '.join(SINGLE_SOURCES)}.")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
            raise DataError(f"{where}: weight={weight} cannot be used: give a positive number.")
        known = [field.name for field in fields(SINGLE_SOURCES[kind])]  # type: ignore[arg-type]  # all are dataclasses
        for key in options:
            if key not in known:
                raise DataError(f"{where}: {key} is not a key of source={kind}: it has {', '.join(known)}.")
        try:
            typed = OmegaConf.merge(OmegaConf.structured(SINGLE_SOURCES[kind]), options)
            return OmegaConf.to_object(typed), weight  # type: ignore[return-value]  # the dataclass that is its type
        except OmegaConfBaseException as error:
            raise DataError(f"{where}: {str(error).splitlines()[0]}.") from error
