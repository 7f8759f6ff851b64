"""Tokenizers: which one, how it is called, how a new one is trained.

In: a file, a folder, a hub id, or texts to train on. Out: a `TextTokenizer`.

Documents are encoded without special tokens, and the *names* of special tokens inside a text are plain text: a document
that speaks of "<|endoftext|>" does not contain one. What ends a document, `data.shards` writes: one EOS id, always.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.shards import TOKENIZER_NAME, DataError

KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
TRAINED_EOS = "<|endoftext|>"
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 257, 2**24  # the 256 bytes and EOS; memory is taken for as many as are asked for
TRAINING_BYTES = 64_000_000  # text a tokenizer is trained on, from the start of the training splits

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's byte fallback


class TextTokenizer:
    """A `tokenizers` tokenizer set up for pretraining data: its file, its EOS, and nothing added to a text."""

    def __init__(self, content: bytes, name: str, eos_token: str) -> None:
        self.content = content  # of tokenizer.json, kept as it came
        self.name = name
        self._tokenizer = Tokenizer.from_str(content.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_token = eos_token
        eos_id = self._tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(
                f"eos_token={eos_token} is not in the vocabulary of tokenizer={name}: name a token that is."
            )
        self.eos_id = eos_id
        apart = eos_id in self._tokenizer.get_added_tokens_decoder()  # from the words of a text, by the file itself
        self._tokenizer.add_special_tokens([eos_token])  # in the vocabulary already; from now on marked as special
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are spelled out like any other word
        if not apart and self._is_text(eos_token):
            raise DataError(
                f"eos_token={eos_token} is a word of tokenizer={name} that texts have too, so it ends no document: "
                "name its end-of-text token."
            )
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _is_text(self, token: str) -> bool:
        """Whether the EOS comes from a text of `token` or of what its id means, alone or after a line's end."""
        texts = (token, self._tokenizer.decode([self.eos_id], skip_special_tokens=False))
        if "\ufffd" in texts[1]:
            return True  # bytes of a character
        return any(self.eos_id in self.encode([before + text])[0] for before in ("", "\n") for text in texts)

    @property
    def identity(self) -> dict[str, str]:
        """The manifest's `tokenizer` entry."""
        return {"name": self.name, "sha256": hashlib.sha256(self.content).hexdigest()}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, no EOS. Uses all threads that the process gives the `tokenizers` library."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def bytes_of_ids(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, 0 for EOS: int64 [vocab_size].

        Exact for byte-level tokenizers; those of SentencePiece add the blank that some put before a text. Raises
        `DataError` for others, whose tokens do not say what text they came from.
        """
        decoder = json.dumps(json.loads(self.content).get("decoder"), ensure_ascii=False)
        byte_level = '"ByteLevel"' in decoder
        if not byte_level and "\u2581" not in decoder:
            raise DataError(
                f"tokenizer={self.name} is neither byte-level nor of SentencePiece, so the text behind its ids cannot "
                "be counted: tokenize the text itself."
            )
        added = {id_: token.content for id_, token in self._tokenizer.get_added_tokens_decoder().items()}
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, id_ in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id_ in added or not byte_level:
                plain = token.replace("\u2581", " ")
                lengths[id_] = 1 if _BYTE_TOKEN.fullmatch(token) else len(plain.encode())
            else:
                lengths[id_] = len(token)  # a character of the byte-level alphabet is a byte
        lengths[self.eos_id] = 0
        return lengths


def load_tokenizer(spec: str, eos_token: str | None) -> TextTokenizer:
    """A tokenizer from a `tokenizers` JSON file, from a folder with tokenizer.json, or from the Hugging Face hub.

    The EOS is `eos_token`, else what tokenizer_config.json beside the tokenizer says, else the first of `KNOWN_EOS` in
    the vocabulary. Raises `DataError` when there is no such tokenizer, when it cannot be read, or when no EOS is known.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        file, config = path / TOKENIZER_NAME, path / "tokenizer_config.json"
        if not file.exists():
            raise DataError(f"tokenizer={spec} has no {TOKENIZER_NAME}: give a folder or file of a fast tokenizer.")
    elif path.is_file():
        file, config = path, path.with_name("tokenizer_config.json")
    elif path.suffix == ".json" or spec.startswith(("/", ".", "~")) or spec.count("/") > 1:
        raise DataError(f"tokenizer={spec} does not exist: give a file, a folder with {TOKENIZER_NAME} or a hub id.")
    else:
        file, config = _from_hub(spec)
    try:
        content = file.read_bytes()
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"tokenizer={spec} is not a tokenizer file of the tokenizers library ({error}).") from error
    if eos_token is None:
        stated = _stated_eos(config)
        candidates = [stated] if stated else list(KNOWN_EOS)
        eos_token = next((token for token in candidates if tokenizer.token_to_id(token) is not None), None)
        if eos_token is None:
            raise DataError(
                f"tokenizer={spec} has no known end-of-text token ({', '.join(candidates)}): name it with eos_token=..."
            )
    return TextTokenizer(content, spec if file != path else path.name, eos_token)


def _stated_eos(config: Path) -> str | None:
    """The `eos_token` of a tokenizer_config.json, which may be a string, an object with `content`, or absent."""
    try:
        stated = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
    except ValueError as error:
        raise DataError(f"{config} is not JSON ({error}).") from error
    return stated.get("content") if isinstance(stated, dict) else stated


def _from_hub(name: str) -> tuple[Path, Path]:
    """tokenizer.json and tokenizer_config.json (perhaps missing) of a hub repository, from its cache where possible."""
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(name, TOKENIZER_NAME))
    except Exception as error:  # offline, unknown, private, gated: the library has an exception for each
        raise DataError(
            f"tokenizer={name} is no file here and could not be had from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or give the path of a tokenizer.json."
        ) from error
    try:
        return file, Path(hf_hub_download(name, "tokenizer_config.json"))
    except Exception:
        return file, file.with_name("tokenizer_config.json")


def check_vocab_size(size: int) -> None:
    """Raise `DataError` for a number of ids that no tokenizer can be trained to."""
    if size < MIN_VOCAB_SIZE:
        raise DataError(f"tokenizer_vocab_size={size} is too small: use at least {MIN_VOCAB_SIZE}.")
    if size > MAX_VOCAB_SIZE:
        raise DataError(f"tokenizer_vocab_size={size} is too large: use at most {MAX_VOCAB_SIZE:,}.")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of `vocab_size` ids, EOS `<|endoftext|>` among them, trained on all `texts` (`first_texts`).

    The same texts give the same file. Raises `DataError` when `vocab_size` is too small for the bytes or too large for
    the texts.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TRAINED_EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    held = list(texts)  # read here: a signal that comes while the library's threads read has to wait for their end
    tokenizer.train_from_iterator(held, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"tokenizer_vocab_size={vocab_size} is too large for this text, which gives "
            f"{tokenizer.get_vocab_size()} tokens: use at most that."
        )
    return TextTokenizer(tokenizer.to_str().encode(), f"trained-{vocab_size}", TRAINED_EOS)


def first_texts(texts: Iterable[str], limit: int) -> Iterator[str]:
    """`texts` up to the one that reaches `limit` UTF-8 bytes."""
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return
