"""Tokenizers are found, refused by name, and never add to or swallow from a text; a split equals a plain loop."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from data.shards import DataError
from data.tokenize import TextTokenizer, first_texts, load_tokenizer, train_tokenizer


@pytest.fixture
def saved(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    path = tmp_path / "saved" / "tokenizer.json"
    path.parent.mkdir()
    path.write_bytes(tokenizer.content)
    return path


def word_level(path: Path, words: list[str], special: list[str] | None = None) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special or [])
    tokenizer.save(str(path))
    return path


def test_training_gives_the_same_file_each_time_with_exactly_the_size_asked_for(texts: list[str]) -> None:
    first, second = (train_tokenizer(iter(texts), 300) for _ in range(2))
    assert first.content == second.content
    assert first.vocab_size == 300
    assert first.eos_token == "<|endoftext|>"
    assert Tokenizer.from_str(first.content.decode()).decode(first.encode([texts[3]])[0]) == texts[3]


@pytest.mark.parametrize(
    ("size", "sentence"), [(256, "too small"), (100_000, "too large"), (10**9, "too large: use at most 16,777,216")]
)
def test_an_impossible_vocabulary_is_refused(texts: list[str], size: int, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"tokenizer_vocab_size={size} is {sentence}"):
        train_tokenizer(texts, size)


def test_a_file_and_its_folder_are_the_same_tokenizer(saved: Path, tokenizer: TextTokenizer) -> None:
    by_file, by_folder = load_tokenizer(str(saved), None), load_tokenizer(str(saved.parent), None)
    assert by_file.content == by_folder.content == tokenizer.content
    assert by_file.eos_id == by_folder.eos_id == tokenizer.eos_id
    assert by_file.identity["sha256"] == tokenizer.identity["sha256"]


def test_special_tokens_in_a_text_are_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(["before <|endoftext|> after"])[0]
    assert tokenizer.eos_id not in ids
    assert Tokenizer.from_str(tokenizer.content.decode()).decode(ids) == "before <|endoftext|> after"


def test_an_eos_that_the_file_does_not_mark_as_special_is_still_not_read_from_a_text(tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(["</s>"])
    tokenizer.save(str(path))
    loaded = load_tokenizer(str(path), None)
    assert loaded.eos_id == 2
    assert 2 not in loaded.encode(["a</s>a"])[0]


@pytest.mark.parametrize("eos", ["a", "Ġ", "Ã", "the", "Ġthe", "[UNK]", "▁foo", "oo"])
def test_an_eos_that_text_gives_too_is_refused(tmp_path: Path, tokenizer: TextTokenizer, eos: str) -> None:
    byte_level = Tokenizer.from_str(tokenizer.content.decode())
    words = word_level(tmp_path / "words.json", ["[UNK]", "x"])
    sentencepiece = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁foo", -1.0), ("▁", -2.0), ("oo", -3.0)], unk_id=0))
    sentencepiece.pre_tokenizer = pre_tokenizers.Metaspace()
    sentencepiece.decoder = decoders.Metaspace()
    whole = [byte_level, Tokenizer.from_file(str(words)), sentencepiece]
    content = next(made.to_str() for made in whole if made.token_to_id(eos) is not None)
    with pytest.raises(DataError, match=rf"^eos_token={re.escape(eos)} is a word of tokenizer=it .*: name its end-of-"):
        TextTokenizer(content.encode(), "it", eos)


def test_an_eos_that_merges_cannot_make_is_taken_though_the_file_does_not_mark_it() -> None:
    made = Tokenizer(models.BPE({"<": 0, "/": 1, "s": 2, ">": 3, "</s>": 4}, []))
    assert TextTokenizer(made.to_str().encode(), "it", "</s>").encode(["</s>"]) == [[0, 1, 2, 3]]


def test_truncation_padding_and_templates_of_the_file_are_not_applied(tmp_path: Path, saved: Path) -> None:
    changed = Tokenizer.from_file(str(saved))
    changed.enable_truncation(4)
    changed.enable_padding(length=50)
    changed.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    path = tmp_path / "changed.json"
    changed.save(str(path))
    text = ["the quick brown fox jumps over", "x"]
    assert load_tokenizer(str(path), None).encode(text) == load_tokenizer(str(saved), None).encode(text)


def test_the_vocabulary_size_covers_ids_with_gaps(tmp_path: Path) -> None:
    path = tmp_path / "gaps.json"
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    assert load_tokenizer(str(path), None).vocab_size == 70_001


def test_the_eos_is_the_one_stated_then_a_known_one_then_asked_for(tmp_path: Path) -> None:
    special = ["</s>", "<stop>", "<|endoftext|>"]
    path = word_level(tmp_path / "tokenizer.json", ["[UNK]", *special, "[SEP]"], [*special, "[SEP]"])
    config = tmp_path / "tokenizer_config.json"
    assert load_tokenizer(str(path), None).eos_token == "<|endoftext|>"
    config.write_text(json.dumps({"eos_token": "<stop>"}))
    assert load_tokenizer(str(path), None).eos_token == "<stop>"
    config.write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(str(tmp_path), None).eos_token == "</s>"
    assert load_tokenizer(str(tmp_path), "[SEP]").eos_token == "[SEP]"
    with pytest.raises(DataError, match="eos_token=nope is not in the vocabulary"):
        load_tokenizer(str(path), "nope")


def test_a_tokenizer_without_a_known_eos_is_refused_by_name(tmp_path: Path) -> None:
    path = word_level(tmp_path / "bare.json", ["[UNK]", "word"])
    with pytest.raises(DataError, match=r"bare\.json has no known end-of-text token .* eos_token="):
        load_tokenizer(str(path), None)


@pytest.mark.parametrize("content", [None, "", "{}", "\xff"])
def test_a_path_without_a_tokenizer_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"broken\.json (does not exist|is not a tokenizer)"):
        load_tokenizer(str(path), None)


def test_a_hub_name_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"tokenizer=someone/something is no file here and could not be had") as error:
        load_tokenizer("someone/something", None)
    assert "\n" not in str(error.value)


def test_the_text_of_training_ends_with_the_document_that_reaches_the_limit() -> None:
    assert list(first_texts(["ab", "✓", "c", "d"], 5)) == ["ab", "✓"]
    assert list(first_texts(["ab", "✓", "c", "d"], 6)) == ["ab", "✓", "c"]
