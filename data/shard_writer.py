"""How a token dataset (`data.shards`) is written.

In: documents as ids, in order. Out: files of ids, each document ended by EOS, and last of all their manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from data.shards import DTYPES, MANIFEST_NAME, DataError, Manifest, ShardFile, dtype_for, write_manifest


class ShardWriter:
    """Writes one token dataset: a context manager that takes documents in order and ends with `finish`.

    Whatever an interrupted attempt left in `folder` is removed first, its manifest before all else. Leaving the context
    without `finish` leaves a folder without a manifest, which no reader accepts.
    """

    def __init__(
        self, folder: Path, *, vocab_size: int, eos_id: int, tokens_per_file: int, dtype: str | None = None
    ) -> None:
        self.folder = folder
        self.dtype_name = dtype or dtype_for(vocab_size)
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.tokens_per_file = tokens_per_file
        self.documents = 0
        self.tokens = 0
        self.text_bytes = 0
        self._files: list[ShardFile] = []
        self._stream: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._tokens_in_file = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for old in [*folder.glob("*.bin"), *folder.glob("*.partial")]:
            old.unlink()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def write(self, documents: Iterable[list[int] | np.ndarray], text_bytes: int) -> None:
        """Append documents (ids without EOS) whose texts have `text_bytes` UTF-8 bytes together; EOS is added here.

        A file is closed after the document that fills it, so each but the last holds `tokens_per_file` ids or more.
        """
        for ids in documents:
            chunk = np.empty(len(ids) + 1, dtype=DTYPES[self.dtype_name])
            chunk[:-1] = ids
            chunk[-1] = self.eos_id
            self._append(chunk)
            self.documents += 1
        self.text_bytes += text_bytes

    def adopt(self, file: ShardFile, documents: int, text_bytes: int) -> None:
        """Count a finished file, which lies in the folder by its name already, as the next one."""
        self._files.append(file)
        self.documents += documents
        self.tokens += file.tokens
        self.text_bytes += text_bytes

    def _append(self, chunk: np.ndarray) -> None:
        if self._stream is None:
            self._stream = open(self.folder / f"{len(self._files):05d}.bin", "wb")  # noqa: SIM115 (closed in __exit__)
        content = chunk.tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self._tokens_in_file += len(chunk)
        self.tokens += len(chunk)
        if self._tokens_in_file >= self.tokens_per_file:
            self._close_file()

    def _close_file(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        name = Path(self._stream.name).name
        size = self._tokens_in_file * DTYPES[self.dtype_name].itemsize
        self._files.append(ShardFile(name, self._tokens_in_file, size, self._digest.hexdigest()))
        self._stream = None
        self._digest = hashlib.sha256()
        self._tokens_in_file = 0

    def finish(
        self,
        *,
        tokenizer: dict[str, str],
        preparation: dict[str, Any],
        filtered: dict[str, int] | None = None,
        broken: dict[str, int] | None = None,
        allow_empty: bool = False,
    ) -> Manifest:
        """Close the last file and write the manifest. Raises `DataError` when no document was written.

        `allow_empty` is for a part of a dataset, of which filters may leave nothing.
        """
        if self._stream is not None:
            self._close_file()
        if not self.documents and not allow_empty:
            raise DataError(f"no document was found for {self.folder}: the source has no text.")
        manifest = Manifest(
            dtype=self.dtype_name,
            vocab_size=self.vocab_size,
            tokenizer=tokenizer,
            eos_id=self.eos_id,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.text_bytes,
            files=self._files,
            preparation=preparation,
            filtered=filtered or {},
            broken=broken or {},
        )
        write_manifest(self.folder, manifest)
        return manifest
