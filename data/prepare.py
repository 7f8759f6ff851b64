"""A whole preparation: every split of a source tokenized into one shards directory, safe to interrupt and to repeat.

In: a source, a tokenizer request, an output folder. Out: the shards directory described in `data.shards`.

A split is finished when its manifest exists. Repeating a command checks and keeps finished splits and makes the others
from the start. Output made with other settings is refused, never mixed and never overwritten.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DataError,
    Manifest,
    read_manifest,
    verify_checksums,
    write_atomically,
)
from data.sources import Source, Split
from data.tokenize import TextTokenizer, load_tokenizer, tokenize_split, train_tokenizer

TRAIN_TOKENIZER = "train"  # the value of `tokenizer` that asks for a new one


@dataclass
class TokenizerRequest:
    """Which tokenizer the user asked for."""

    spec: str  # path, hub id, or "train"
    vocab_size: int  # of a trained one
    eos_token: str | None = None  # null: found in the tokenizer

    def __post_init__(self) -> None:
        if self.trained and self.eos_token is not None:
            raise DataError(f"eos_token={self.eos_token} cannot be used with tokenizer=train, which brings its own.")

    @property
    def trained(self) -> bool:
        return self.spec == TRAIN_TOKENIZER


def prepare(source: Source, request: TokenizerRequest, output: Path, *, tokens_per_file: int) -> dict[str, Manifest]:
    """Prepare every split of `source`; returns the manifests by split name (`train`, `validation/DOMAIN`).

    Validation is written first and `train` last, so a directory with `train/manifest.json` is whole. Raises `DataError`
    before any work when `output` holds splits with other settings, and for broken input during it.
    """
    if tokens_per_file < 1:
        raise DataError(f"tokens_per_file={tokens_per_file} cannot be used: use a positive integer.")
    if output.exists() and not output.is_dir():
        raise DataError(f"output={output} is a file: name a folder.")
    splits = source.splits()
    tokenizer = None if request.trained else load_tokenizer(request.spec, request.eos_token)
    common = {"tokenizer": _tokenizer_settings(request, tokenizer), "tokens_per_file": tokens_per_file}
    settings = {split.name: {"source": split.settings, **common} for split in splits}
    finished = _finished(output, settings)
    for name in finished:
        print(f"{name}: finished before, checking its checksums", flush=True)
        finished[name] = verify_checksums(output / name)
    unfinished = [split for split in splits if split.name not in finished]
    if unfinished or not _has_tokenizer(output, finished):
        tokenizer = tokenizer or _train(splits, request.vocab_size)
        _check_same_tokenizer(tokenizer, finished, output)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / TOKENIZER_NAME, tokenizer.content)
    for split in unfinished:
        assert tokenizer is not None
        begun = time.monotonic()
        finished[split.name] = tokenize_split(
            split.open(),
            tokenizer,
            output / split.name,
            tokens_per_file=tokens_per_file,
            preparation=settings[split.name],
            label=split.name,
        )
        print(f"{split.name}: {summary(finished[split.name])}, {time.monotonic() - begun:.1f} s", flush=True)
    return finished


def summary(manifest: Manifest) -> str:
    """A token dataset in a few words."""
    return (
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.bytes / 1e6:,.1f} MB of text "
        f"({manifest.bytes_per_token:.2f} bytes a token)"
    )


def _tokenizer_settings(request: TokenizerRequest, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"trained_vocab_size": request.vocab_size}
    return {"sha256": tokenizer.identity["sha256"], "eos_token": tokenizer.eos_token}


def _finished(output: Path, settings: dict[str, dict[str, Any]]) -> dict[str, Manifest]:
    """Manifests of the splits that are done, all of which must have been asked for with the same settings."""
    found: dict[str, Manifest] = {}
    for folder in [*sorted((output / "validation").glob("*/")), output / "train"]:
        name = folder.relative_to(output).as_posix()
        if not (folder / MANIFEST_NAME).exists():
            if name in settings or not folder.is_dir():
                continue
            raise DataError(
                f"output={output} holds an unfinished {name}, which this source does not have: remove {folder}, or "
                "choose another output."
            )
        manifest = read_manifest(folder)
        if name not in settings:
            difference = "which this source does not have"
        elif manifest.preparation != settings[name]:
            keys = [key for key in settings[name] if manifest.preparation.get(key) != settings[name][key]]
            difference = f"made with another {' and another '.join(keys)}"
        else:
            found[name] = manifest
            continue
        raise DataError(
            f"output={output} holds a finished {name} {difference}: remove {output}, or choose another output."
        )
    return found


def _has_tokenizer(output: Path, finished: dict[str, Manifest]) -> bool:
    path = output / TOKENIZER_NAME
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    return all(manifest.tokenizer["sha256"] == digest for manifest in finished.values())


def _check_same_tokenizer(tokenizer: TextTokenizer, finished: dict[str, Manifest], output: Path) -> None:
    for name, manifest in finished.items():
        if manifest.tokenizer["sha256"] != tokenizer.identity["sha256"]:
            raise DataError(
                f"output={output} holds a finished {name} made with a tokenizer that training gives no longer "
                "(the text or the tokenizers library changed): remove {output}, or choose another output."
            )


def _train(splits: list[Split], vocab_size: int) -> TextTokenizer:
    train = next(split for split in splits if split.name == "train")
    documents = train.open()
    print(f"training a tokenizer of {vocab_size:,} tokens", flush=True)
    begun = time.monotonic()
    tokenizer = train_tokenizer((text for text, _ in documents.items), vocab_size)
    print(f"tokenizer: {time.monotonic() - begun:.1f} s", flush=True)
    return tokenizer
