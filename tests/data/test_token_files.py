"""Token files of other tools are counted, checked and linked to; what cannot be of the tokenizer is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from data.prepare import PrepareOptions, prepare
from data.shards import DataError, TokenDataset, read_manifest
from data.sources import Files, TokenFiles
from data.tokenize import TextTokenizer
from data.tokenizer_choice import TokenizerRequest


@pytest.fixture
def saved(tmp_path: Path, tokenizer: TextTokenizer) -> TokenizerRequest:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    return TokenizerRequest(str(tmp_path / "tokenizer.json"), 300)


def write_ids(path: Path, tokenizer: TextTokenizer, texts: list[str], dtype: str = "<u2") -> Path:
    path.parent.mkdir(exist_ok=True)
    np.array([i for ids in tokenizer.encode(texts) for i in [*ids, tokenizer.eos_id]], dtype=dtype).tofile(path)
    return path


def test_adopted_files_are_what_preparing_the_text_gives(
    tmp_path: Path, c4_folder: Path, texts: list[str], tokenizer: TextTokenizer, saved: TokenizerRequest
) -> None:
    ids = tmp_path / "ids"
    write_ids(ids / "part-0.npy", tokenizer, texts[:30])
    write_ids(ids / "part-1.npy", tokenizer, texts[30:])
    (ids / "validation").mkdir()
    write_ids(ids / "validation" / "books.npy", tokenizer, texts[:5])
    before = {path: path.read_bytes() for path in ids.rglob("*.npy")}
    adopted = prepare(TokenFiles(str(ids)), saved, tmp_path / "adopted", PrepareOptions())
    prepared = prepare(Files(str(c4_folder)), saved, tmp_path / "prepared", PrepareOptions())
    for name in ("validation/books", "train"):
        for field in ("documents", "tokens", "bytes", "eos_id", "dtype", "vocab_size", "tokenizer"):
            assert getattr(adopted[name], field) == getattr(prepared[name], field), field
    one, other = TokenDataset(tmp_path / "adopted" / "train", 16), TokenDataset(tmp_path / "prepared" / "train", 16)
    assert [row.tolist() for row in one] == [row.tolist() for row in other]
    assert before == {path: path.read_bytes() for path in ids.rglob("*.npy")}
    assert sum(path.stat().st_size for path in (tmp_path / "adopted").rglob("*.npy") if not path.is_symlink()) == 0
    assert prepare(TokenFiles(str(ids)), saved, tmp_path / "adopted", PrepareOptions()) == adopted
    (ids / "part-1.npy").unlink()
    with pytest.raises(DataError, match=r"00001/00000\.npy is missing"):
        read_manifest(tmp_path / "adopted" / "train")


def test_wrong_files_are_refused_and_can_be_skipped(
    tmp_path: Path, tokenizer: TextTokenizer, texts: list[str], saved: TokenizerRequest
) -> None:
    def adopt(on_error: str = "stop"):
        options = PrepareOptions(on_error=on_error)
        return prepare(TokenFiles(str(tmp_path / "ids" / "*.npy")), saved, tmp_path / "out", options)

    path = tmp_path / "ids" / "a.npy"
    path.parent.mkdir()
    np.array([5, 299, 300, 4], "<u2").tofile(path)
    with pytest.raises(DataError, match=r"a\.npy holds the id 300 at 2, outside the 300 of tokenizer="):
        adopt()
    path.write_bytes(b"\1\2\3")
    with pytest.raises(DataError, match=r"a\.npy has 3 bytes, no multiple of the 2 of an id of uint16"):
        adopt()
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.npy is empty"):
        adopt()
    np.save(path, np.array([1, 2], "<u2"))
    with pytest.raises(DataError, match=r"a\.npy has a NumPy header"):
        adopt()
    np.full(1_000_001, 7, "<u2").tofile(path)
    with pytest.raises(DataError, match=r"a\.npy holds no <\|endoftext\|> \(id 0\) in 1000001 ids"):
        adopt()
    write_ids(tmp_path / "ids" / "b.npy", tokenizer, texts)
    manifest = adopt(on_error="skip")["train"]
    assert manifest.broken == {"token file": 1}
    assert manifest.documents == 60
    assert "a.npy holds no" in (tmp_path / "out" / "train" / "00000" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    ("written", "read", "remedy"), [("<u4", "uint16", "add dtype=uint32"), ("<u8", "uint32", "as")]
)
def test_ids_written_with_a_wider_dtype_are_refused_not_read_with_zeros_between(
    tmp_path: Path, tokenizer: TextTokenizer, saved: TokenizerRequest, written: str, read: str, remedy: str
) -> None:
    write_ids(tmp_path / "ids" / "a.npy", tokenizer, ["Each of these ids is small, and so is its upper half."], written)
    with pytest.raises(
        DataError, match=rf"every second id of .*a\.npy is 0: .* wider dtype than {read}, so .*{remedy}"
    ):
        prepare(TokenFiles(str(tmp_path / "ids")), saved, tmp_path / "out", PrepareOptions(dtype=read))


def test_a_split_in_which_no_document_ends_is_refused_but_a_file_may_hold_the_middle_of_one(
    tmp_path: Path, tokenizer: TextTokenizer, saved: TokenizerRequest
) -> None:
    ids = tmp_path / "ids"
    ids.mkdir()
    np.full(100, 7, "<u2").tofile(ids / "a.npy")
    with pytest.raises(DataError, match=r"no document ends in the 100 tokens of .*train: .* <\|endoftext\|> \(id 0\)"):
        prepare(TokenFiles(str(ids)), saved, tmp_path / "out", PrepareOptions())
    write_ids(ids / "b.npy", tokenizer, ["the end of it"])
    assert prepare(TokenFiles(str(ids)), saved, tmp_path / "both", PrepareOptions())["train"].documents == 1


def test_filters_on_token_files_are_refused(tmp_path: Path, tokenizer: TextTokenizer, saved: TokenizerRequest) -> None:
    write_ids(tmp_path / "ids" / "a.npy", tokenizer, ["x"])
    options = PrepareOptions(filters=[{"name": "duplicate"}])
    with pytest.raises(DataError, match="filters cannot be used with source=token_files"):
        prepare(TokenFiles(str(tmp_path / "ids")), saved, tmp_path / "out", options)


def test_bytes_of_ids_add_up_to_the_text(tokenizer: TextTokenizer, texts: list[str]) -> None:
    lengths = tokenizer.bytes_of_ids()
    for text in texts:
        assert lengths[tokenizer.encode([text])[0]].sum() == len(text.encode())
    assert lengths[tokenizer.eos_id] == 0


def test_bytes_of_sentencepiece_ids_and_refusal_of_others() -> None:
    vocabulary = {"</s>": 0, "<0xE2>": 1, "▁the": 2, "é": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    made = TextTokenizer(tokenizer.to_str().encode(), "sp", "</s>")
    assert made.bytes_of_ids().tolist() == [0, 1, 4, 2]
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(DataError, match="tokenizer=sp is neither byte-level nor of SentencePiece"):
        TextTokenizer(tokenizer.to_str().encode(), "sp", "</s>").bytes_of_ids()
