"""Files of raw token ids that another tool wrote: what is in them.

In: a headerless little-endian file (OLMo's tools name theirs `.npy`, others `.bin`), the tokenizer that it was made
with. Out: how many documents it holds, how many bytes of text they are, its checksum; and a refusal when its ids cannot
be of that tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards import DTYPES, DataError
from data.tokenize import TextTokenizer

CHUNK = 2**22  # ids read at once
FEW = 16  # ids of which every second may be 0 by chance; in more, they are the upper halves of wider numbers


@dataclass
class TokenFileContent:
    """What a file of ids holds."""

    documents: int  # EOS ids
    text_bytes: int  # UTF-8 bytes that the ids stand for, EOS not counted
    sha256: str


def count_documents(
    path: Path, dtype: str, tokenizer: TextTokenizer, report: Callable[[int], None]
) -> TokenFileContent:
    """Read the whole file, telling `report` how many bytes were read since the last time.

    Raises `DataError` when the file is empty, has a NumPy header, is no whole number of ids, holds an id outside the
    vocabulary, was written with a wider dtype, or holds no EOS though it has over a million ids (then the dtype or the
    tokenizer is another). That some file of a split has an EOS is for the caller to check: a short one may hold none.
    """
    item = DTYPES[dtype].itemsize
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path} is empty: remove it, or get it again.")
    if size % item:
        raise DataError(f"{path} has {size} bytes, no multiple of the {item} of an id of {dtype}: name its dtype.")
    lengths = tokenizer.bytes_of_ids()
    digest = hashlib.sha256()
    documents = text_bytes = done = 0
    with open(path, "rb") as file:
        while content := file.read(CHUNK * item):
            if not done and content.startswith(b"\x93NUMPY"):
                raise DataError(f"{path} has a NumPy header: write it without one, with ids.tofile(...).")
            digest.update(content)
            ids = np.frombuffer(content, DTYPES[dtype])
            if (largest := int(ids.max())) >= tokenizer.vocab_size:
                place = done + int(ids.argmax())
                raise DataError(
                    f"{path} holds the id {largest} at {place}, outside the {tokenizer.vocab_size} of "
                    f"tokenizer={tokenizer.name}: name the tokenizer and the dtype (now {dtype}) it was made with."
                )
            if not done and len(ids) >= FEW and not ids[1::2].any():
                raise DataError(
                    f"every second id of {path} is 0: it was written with a wider dtype than {dtype}, so "
                    f"{'add dtype=uint32' if dtype == 'uint16' else 'write it as uint32'}."
                )
            documents += int(np.count_nonzero(ids == tokenizer.eos_id))
            text_bytes += int(lengths[ids].sum())
            done += len(ids)
            report(len(content))
    if not documents and done > 1_000_000:
        raise DataError(
            f"{path} holds no {tokenizer.eos_token} (id {tokenizer.eos_id}) in {done} ids: name the eos_token, "
            f"tokenizer and dtype (now {dtype}) that it was made with."
        )
    return TokenFileContent(documents, text_bytes, digest.hexdigest())
