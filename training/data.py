"""The data of a run, from its configuration: the stream of training instances, and the validation domains.

In: the `data` section. Out: datasets ready to be read, or `DataError` or `ConfigError` in one sentence. No torch here:
a mistake is answered before its import.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from data.mixture import InstanceStream, difference
from data.packing import PackedDataset
from data.remote import localized
from data.shards import (
    DataError,
    Instances,
    TokenDataset,
    check_shards_dir,
    check_tokenizer,
    validation_domains,
    verify_checksums_once,
)
from models.config import ConfigError
from training.config import Config, DataConfig


def open_stream(config: Config, say: Callable[[str], None] = lambda line: None) -> InstanceStream:
    """The instances that `config` trains on. Raises `DataError` when they are missing, damaged or do not fit together.

    `say` gets a line for what takes long: copying remote data, verifying checksums, packing.
    """
    data = config.data
    datasets: list[Instances] = []
    for path in data.paths:
        root = _root(data, path, say)
        check_shards_dir(root)
        folder = root / "train"
        if not folder.is_dir():
            output = f"output={path}"
            prepare = data.prepare.replace(output, shlex.quote(output))
            command = f"\n  {prepare}" if prepare else " scripts/prepare_data.py"
            raise DataError(
                f"data.path={path} holds no token shards ({folder} does not exist): set data.path to a prepared "
                f"folder, or prepare it with{command}"
            )
        check_tokenizer(root)
        if data.packing == "best_fit":
            datasets.append(PackedDataset(folder, data.sequence_length, say))
        else:
            datasets.append(TokenDataset(folder, data.sequence_length))
    return InstanceStream(datasets, [entry.weight for entry in data.mixture] or [1.0], config.training.seed)


def verify(config: Config, say: Callable[[str], None]) -> None:
    """Compare every file that the run will read with its checksum, once for as long as the files do not change.

    Raises `DataError` with the name of the first that is damaged.
    """
    folders = [_root(config.data, path) / "train" for path in config.data.paths]
    if config.evaluation.every:
        folders += validation_folders(config.data).values()
    for folder in folders:
        verify_checksums_once(folder, say)


def validation_folders(data: DataConfig) -> dict[str, Path]:
    """Folders of the validation domains by name; in a mixture, a name that occurs twice has its dataset's before it."""
    roots = {path: _root(data, path) for path in data.paths}
    domains = {path: validation_domains(root) for path, root in roots.items()}
    every = [domain for names in domains.values() for domain in names]
    folders: dict[str, Path] = {}
    for path, names in domains.items():
        for domain in names:
            name = domain if every.count(domain) == 1 else f"{Path(path.rstrip('/')).name}-{domain}"
            if name in folders:
                raise DataError(f"data.mixture has two validation domains {name}: rename one of the folders.")
            folders[name] = roots[path] / "validation" / domain
    return folders


def _root(data: DataConfig, path: str, say: Callable[[str], None] = lambda line: None) -> Path:
    return localized(path, data.cache, say)


def check_same_data(
    fingerprint: str, sources: Sequence[dict[str, object]], stream: InstanceStream, path: Path, key: str
) -> None:
    """Raise ConfigError, with the difference in it, when a checkpoint was trained on other data than `stream`.

    Args:
        fingerprint, sources: of the data, as the checkpoint holds them.
        path: of the checkpoint.
        key: of the configuration, which gives another run directory.
    """
    if fingerprint == stream.fingerprint:
        return
    changed = difference(sources, stream.sources) or f"fingerprint {fingerprint} → {stream.fingerprint}"
    raise ConfigError(
        f"{path} was trained on other data than this ({changed}): give the same data, start a new run with another "
        f"{key}, or add checkpoint.allow_changes=[data] to continue on this."
    )
