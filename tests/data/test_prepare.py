"""A preparation can be interrupted anywhere and repeated, and never mixes settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import data.prepare
from data.prepare import TokenizerRequest, prepare
from data.shards import DataError, Manifest, TokenDataset, read_manifest, validation_domains
from data.sources import C4Files, Split
from data.tokenize import Documents

REQUEST = TokenizerRequest("train", 300)


def run(folder: Path, output: Path, request: TokenizerRequest = REQUEST, tokens: int = 500) -> dict[str, Manifest]:
    return prepare(C4Files(str(folder)), request, output, tokens_per_file=tokens)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Interrupted(C4Files):
    """Stops in the middle of one split, as Ctrl-C does."""

    at: str

    def splits(self) -> list[Split]:
        def stopping(split: Split) -> Callable[[], Documents]:
            def opened() -> Documents:
                documents = split.open()

                def items() -> Iterator[tuple[str, int]]:
                    for i, item in enumerate(documents.items):
                        if i == 2:
                            raise KeyboardInterrupt
                        yield item

                return Documents(items(), documents.total, documents.unit)

            return opened

        splits = super().splits()
        return [Split(s.name, s.settings, stopping(s) if s.name == self.at else s.open) for s in splits]


def test_a_prepared_directory_holds_all_that_training_reads(c4_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    manifests = run(c4_folder, output)
    assert list(manifests) == ["validation/books", "validation/news", "train"]
    assert validation_domains(output) == ["books", "news"]
    assert manifests["train"] == read_manifest(output / "train")
    assert manifests["train"].documents == 60
    assert len(manifests["train"].files) > 1
    assert len(TokenDataset(output / "train", 16)) == (manifests["train"].tokens - 1) // 16
    assert (output / "tokenizer.json").exists()


@pytest.mark.parametrize("at", ["validation/books", "validation/news", "train"])
def test_an_interruption_and_a_repeat_give_what_one_go_gives(
    c4_folder: Path, tmp_path: Path, at: str, tokenizer
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(tokenizer.content)
    request = TokenizerRequest(str(file), 300)
    run(c4_folder, tmp_path / "whole", request)
    output = tmp_path / "out"
    interrupted = Interrupted(str(c4_folder))
    interrupted.at = at
    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted, request, output, tokens_per_file=500)
    with pytest.raises(DataError):  # train is last, so what is not whole has no training split
        read_manifest(output / "train")
    run(c4_folder, output, request)
    assert contents(output) == contents(tmp_path / "whole")


def test_a_trained_tokenizer_survives_an_interruption(c4_folder: Path, tmp_path: Path) -> None:
    run(c4_folder, tmp_path / "whole")
    run(c4_folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "train")
    (tmp_path / "out" / "tokenizer.json").unlink()
    run(c4_folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_splits_are_kept_and_their_checksums_tested(
    c4_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    first = run(c4_folder, output)
    monkeypatch.setattr(data.prepare, "tokenize_split", None)  # would fail when called
    monkeypatch.setattr(data.prepare, "train_tokenizer", None)
    assert run(c4_folder, output) == first
    path = output / "train" / "00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match="SHA-256"):
        run(c4_folder, output)


def test_a_domain_added_later_is_added_to_the_output(
    c4_folder: Path, tmp_path: Path, write_c4: Callable[[Path, list[str]], Path]
) -> None:
    output = tmp_path / "out"
    before = run(c4_folder, output)
    write_c4(c4_folder / "validation" / "code.json.gz", ["x = 1"])
    after = run(c4_folder, output)
    assert validation_domains(output) == ["books", "code", "news"]
    assert {name: after[name] for name in before} == before


def test_output_with_other_settings_is_refused_before_any_work(
    c4_folder: Path, tmp_path: Path, write_c4: Callable[[Path, list[str]], Path]
) -> None:
    output = tmp_path / "out"
    run(c4_folder, output)
    before = contents(output)
    with pytest.raises(DataError, match=r"made with another tokenizer: remove .*, or choose another output"):
        run(c4_folder, output, TokenizerRequest("train", 299))
    with pytest.raises(DataError, match="made with another tokens_per_file"):
        run(c4_folder, output, tokens=501)
    write_c4(c4_folder / "part.2.json.gz", ["one more"])
    with pytest.raises(DataError, match="finished train made with another source"):
        run(c4_folder, output)
    (c4_folder / "part.2.json.gz").unlink()
    (c4_folder / "validation" / "news.json.gz").unlink()
    with pytest.raises(DataError, match="finished validation/news which this source does not have"):
        run(c4_folder, output)
    (output / "validation" / "news" / "manifest.json").unlink()
    with pytest.raises(DataError, match="unfinished validation/news, which this source does not have"):
        run(c4_folder, output)
    del before["validation/news/manifest.json"]
    assert contents(output) == before


def test_a_broken_file_stops_the_preparation_without_a_manifest(c4_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    good = (c4_folder / "part.1.json.gz").read_bytes()
    (c4_folder / "part.1.json.gz").write_bytes(good[:-20])
    with pytest.raises(DataError, match=r"part\.1\.json\.gz, line \d+"):
        run(c4_folder, output)
    assert not (output / "train" / "manifest.json").exists()


def test_impossible_requests_are_refused(c4_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokens_per_file=0"):
        run(c4_folder, tmp_path / "out", tokens=0)
    with pytest.raises(DataError, match="tokenizer=train, which brings its own"):
        TokenizerRequest("train", 300, "</s>")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        run(c4_folder, tmp_path / "file")
