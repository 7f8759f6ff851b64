"""The tokenizer of a preparation: the one that was asked for, whether it will do, and its place beside the splits.

In: what the user gave. Out: refusals before any work; a new tokenizer, trained on the first text of the source, where
that was asked for; `tokenizer.json` in the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.readers import Broken
from data.shards import DTYPES, TOKENIZER_NAME, DataError, Manifest, dtype_for, write_atomically
from data.sources import Split, TokenFile
from data.tokenize import TRAINING_BYTES, TextTokenizer, check_vocab_size, first_texts, train_tokenizer

TRAIN_TOKENIZER = "train"  # the value of `tokenizer` that asks for a new one


@dataclass
class TokenizerRequest:
    """Which tokenizer the user asked for."""

    spec: str  # path, hub id, or "train"
    vocab_size: int  # of a trained one
    eos_token: str | None = None  # null: found in the tokenizer
    model_vocab_size: int | None = None  # ids that the model has: a tokenizer with more is refused

    def __post_init__(self) -> None:
        if not self.trained:
            return
        if self.eos_token is not None:
            raise DataError(f"eos_token={self.eos_token} cannot be used with tokenizer=train, which brings its own.")
        check_vocab_size(self.vocab_size)

    @property
    def trained(self) -> bool:
        return self.spec == TRAIN_TOKENIZER


def check_fits(ids: int, request: TokenizerRequest, dtype: str | None) -> None:
    """Raise `DataError` when a tokenizer with so many `ids` has more than the model, or than fit `dtype`."""
    what = f"tokenizer_vocab_size={ids} is" if request.trained else f"tokenizer={request.spec} has {ids} ids,"
    if request.model_vocab_size is not None and ids > request.model_vocab_size:
        raise DataError(
            f"{what} more than model_vocab_size={request.model_vocab_size}: use a model with at least that many, or "
            f"{'a smaller' if request.trained else 'another'} tokenizer."
        )
    if dtype is not None and ids > 2 ** (8 * DTYPES[dtype].itemsize):
        raise DataError(
            f"{what} {'more than fit' if request.trained else 'which do not fit'} dtype={dtype}: use dtype=null or "
            f"{dtype_for(ids)}."
        )


def trained_tokenizer(splits: list[Split], request: TokenizerRequest, on_error: str) -> TextTokenizer:
    """A new tokenizer, trained on the first text of every training split."""
    print(f"training a tokenizer of {request.vocab_size:,} ids", flush=True)
    training = [split for split in splits if split.is_training]
    limit = TRAINING_BYTES // len(training)
    texts = (text for split in training for text in first_texts(_texts(split, on_error), limit))
    return train_tokenizer(texts, request.vocab_size)


def _texts(split: Split, on_error: str) -> Iterator[str]:
    for part in split.parts():
        if isinstance(part, TokenFile):
            raise DataError("tokenizer=train has no text in token files: name the tokenizer that made them.")
        for item, _ in part.read():
            if not isinstance(item, Broken):
                yield item
            elif on_error == "stop":
                raise DataError(item.message)


def check_same_tokenizer(tokenizer: TextTokenizer, finished: dict[str, Manifest], output: Path) -> None:
    """Raise `DataError` when one of the `finished` splits was made with another tokenizer than this."""
    for name, manifest in finished.items():
        if manifest.tokenizer["sha256"] != tokenizer.identity["sha256"]:
            raise DataError(
                f"output={output} holds a finished {name} made with a tokenizer that training gives no longer "
                f"(the text or the tokenizers library changed): remove {output}, or choose another output."
            )


def has_tokenizer(output: Path, finished: dict[str, Manifest]) -> bool:
    """Whether the tokenizer of the `finished` splits lies beside them."""
    folders = {output / name.removesuffix("train").partition("validation/")[0] for name in finished}
    files = [folder / TOKENIZER_NAME for folder in folders]
    digests = {hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None for file in files}
    return digests == {manifest.tokenizer["sha256"] for manifest in finished.values()}


def write_tokenizer(tokenizer: TextTokenizer, splits: list[Split], output: Path) -> None:
    """`tokenizer.json` beside the splits of every source; one that is there already is left alone."""
    for split in splits:
        if split.is_training:
            path = output / split.name.removesuffix("train") / TOKENIZER_NAME
            if not path.exists() or path.read_bytes() != tokenizer.content:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, tokenizer.content)
