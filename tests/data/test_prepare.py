"""A preparation can be killed anywhere and repeated, by any number of processes and tasks, and never mixes settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

import data.prepare
from data.prepare import PrepareOptions, WaitingForTasks, prepare, summary
from data.several_sources import SeveralSources
from data.shards import DataError, Manifest, TokenDataset, read_manifest, validation_domains
from data.sources import Files
from data.tokenize import TextTokenizer
from data.tokenizer_choice import TokenizerRequest

REQUEST = TokenizerRequest("train", 300)
PART = 0.0005  # megabytes: several parts a split


def run(folder: Path, output: Path, request: TokenizerRequest = REQUEST, **options) -> dict[str, Manifest]:
    options = {"tokens_per_file": 500, "workers": 1} | options
    return prepare(Files(str(folder), part_megabytes=PART), request, output, PrepareOptions(**options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path, tokenizer: TextTokenizer) -> TokenizerRequest:
    (tmp_path / "saved.json").write_bytes(tokenizer.content)
    return TokenizerRequest(str(tmp_path / "saved.json"), 300)


@pytest.fixture
def many_files(tmp_path: Path, write_c4: Callable, texts: list[str]) -> Path:
    """Training in six files with repeated, short and empty texts, two validation domains."""
    folder = tmp_path / "many"
    texts = [*texts, "short", "", texts[3], texts[50]]
    for i in range(6):
        write_c4(folder / f"{i}.json.gz", texts[11 * i : 11 * i + 11])
    write_c4(folder / "validation" / "books.json.gz", texts[:5])
    write_c4(folder / "validation" / "news.json.gz", texts[5:8])
    return folder


FILTERS = [{"name": "duplicate"}, {"name": "length", "min_characters": 10}]


def test_a_prepared_directory_holds_all_that_training_reads(c4_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    manifests = run(c4_folder, output)
    assert list(manifests) == ["validation/books", "validation/news", "train"]
    assert validation_domains(output) == ["books", "news"]
    assert manifests["train"] == read_manifest(output / "train")
    assert manifests["train"].documents == 60
    assert len(manifests["train"].files) > 2
    assert len(TokenDataset(output / "train", 16)) == (manifests["train"].tokens - 1) // 16
    assert (output / "tokenizer.json").exists()


def test_the_stream_is_that_of_the_documents_in_order(
    many_files: Path, tmp_path: Path, saved: TokenizerRequest, tokenizer: TextTokenizer, texts: list[str]
) -> None:
    manifest = run(many_files, tmp_path / "out", saved, filters=FILTERS)["train"]
    dataset = TokenDataset(tmp_path / "out" / "train", 1)
    assert len(list((tmp_path / "out" / "train").glob("0*"))) > 2
    expected = [i for ids in tokenizer.encode(texts) for i in [*ids, tokenizer.eos_id]]
    assert [int(row[0]) for row in dataset] == expected[:-1]
    assert manifest.filtered == {
        "duplicate: the text of an earlier document": 2,
        "length: fewer than 10 characters": 1,
        "no text at all": 1,
    }
    assert "left out: 2 (duplicate: the text of an earlier document)" in summary(manifest)


class Killed(BaseException):
    """Ends a preparation without any of its own handling, as a kill does."""


def test_killed_before_any_step_that_lasts_it_continues_to_the_same_bytes(
    many_files: Path, tmp_path: Path, saved: TokenizerRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(many_files, tmp_path / "whole", saved, filters=FILTERS)
    expected = contents(tmp_path / "whole")
    replace, output, calls = os.replace, tmp_path / "out", 0

    def killing(*args: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Killed
        replace(*args)

    monkeypatch.setattr(os, "replace", killing)
    kills = 0
    for stop in range(1, 100):  # each step is the last of one attempt, on what all attempts before have left
        calls = 0
        try:
            run(many_files, output, saved, filters=FILTERS)
            break
        except Killed:
            kills += 1
            assert not (output / "train" / "manifest.json").exists()
        if stop % 2:  # every other attempt finds nothing finished
            shutil.rmtree(output, ignore_errors=True)
    assert kills > 10
    assert contents(output) == expected


def test_duplicates_found_in_another_text_before_a_kill_are_not_taken_for_those_of_this(
    tmp_path: Path, texts: list[str], saved: TokenizerRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    rows = [json.dumps({"title": "the same", "text": text}) + "\n" for text in texts]
    (tmp_path / "in" / "a.jsonl").write_text("".join(rows))
    options = PrepareOptions(workers=1, filters=[{"name": "duplicate"}])
    with monkeypatch.context() as killing:
        killing.setattr(data.prepare, "_tokenize_job", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(Files(str(tmp_path / "in"), text_field="title"), saved, tmp_path / "out", options)
    assert list((tmp_path / "out" / "train").iterdir())
    manifest = prepare(Files(str(tmp_path / "in")), saved, tmp_path / "out", options)["train"]
    assert (manifest.documents, manifest.filtered) == (len(texts), {})
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["00000", "manifest.json"]


def test_finished_parts_are_kept_and_the_others_made_again(
    many_files: Path, tmp_path: Path, saved: TokenizerRequest
) -> None:
    run(many_files, tmp_path / "whole", saved)
    output = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", output)
    (output / "train" / "manifest.json").unlink()
    (output / "train" / "00001" / "manifest.json").unlink()
    kept = output / "train" / "00000" / "00000.bin"
    (output / "train" / "00001" / "00000.bin").write_bytes(b"half")
    (output / "train" / "00001" / "00007.bin").write_bytes(b"left over")
    before = kept.stat().st_mtime_ns
    run(many_files, output, saved)
    assert kept.stat().st_mtime_ns == before
    assert contents(output) == contents(tmp_path / "whole")


def test_finished_parts_that_were_damaged_since_are_made_again(
    many_files: Path, tmp_path: Path, saved: TokenizerRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared(output: Path, **tasks: int) -> None:
        prepare(Files(str(many_files), part_megabytes=1e-6), saved, output, PrepareOptions(workers=1, **tasks))

    whole, output = tmp_path / "whole", tmp_path / "out"
    prepared(whole)
    shutil.copytree(whole, output)
    (output / "train" / "manifest.json").unlink()
    altered, cut, lost = (output / "train" / f"0000{part}" / "00000.bin" for part in range(3))
    altered.write_bytes(bytes([altered.read_bytes()[0] ^ 1]) + altered.read_bytes()[1:])
    cut.write_bytes(cut.read_bytes()[:-2])
    lost.unlink()
    with pytest.raises(WaitingForTasks):
        prepared(output, task=1, tasks=3)  # looks after its own part alone
    said = capsys.readouterr().out
    assert str(cut) in said
    assert str(altered) not in said
    assert cut.read_bytes() == (whole / "train" / "00001" / "00000.bin").read_bytes()
    kept = (output / "train" / "00003" / "00000.bin").stat().st_mtime_ns
    capsys.readouterr()
    prepared(output)
    said = capsys.readouterr().out
    assert f"{altered} is damaged (its SHA-256 is not the manifest's): this part is made again\n" in said
    assert f"{lost} is missing where its manifest says" in said
    assert said.count("made again") == 2
    assert (output / "train" / "00003" / "00000.bin").stat().st_mtime_ns == kept
    assert contents(output) == contents(whole)


@pytest.mark.parametrize("filters", [[], FILTERS], ids=["", "duplicates"])
def test_after_a_file_was_repaired_only_what_it_changed_is_made_again(
    many_files: Path, tmp_path: Path, saved: TokenizerRequest, filters: list, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared(output: Path) -> dict[str, Manifest]:
        options = PrepareOptions(workers=1, on_error="skip", filters=filters)
        return prepare(Files(str(many_files), part_megabytes=1e-6), saved, output, options)

    whole, output = tmp_path / "whole", tmp_path / "out"
    prepared(whole)
    path = many_files / "0.json.gz"  # the last file repeats a text of this one
    content = path.read_bytes()
    path.write_bytes(content[:-200])
    assert prepared(output)["train"].broken == {"damaged archive": 1}
    (output / "train" / "manifest.json").unlink()  # as if it had been interrupted before
    path.write_bytes(content)
    times = {path: path.stat().st_mtime_ns for path in sorted((output / "train").glob("*/manifest.json"))}
    capsys.readouterr()
    prepared(output)
    assert "train: 1 of the finished parts hold files that have changed: made again" in capsys.readouterr().out
    assert len(times) == 6
    assert [path.parent.name for path, time in times.items() if path.stat().st_mtime_ns != time] == (
        ["00000", "00005"] if filters else ["00000"]
    )
    assert contents(output) == contents(whole)


def test_a_dataset_that_moved_on_since_the_interruption_is_refused(
    tmp_path: Path, c4_folder: Path, saved: TokenizerRequest
) -> None:
    @dataclass
    class Moving(Files):
        """Files that stand for those of a dataset at a commit."""

        revision: str = "a"

    def prepared(revision: str) -> dict[str, Manifest]:
        source = Moving(str(c4_folder / "*.gz"), part_megabytes=PART, revision=revision)
        return prepare(source, saved, tmp_path / "out", PrepareOptions(workers=1))

    prepared("a")
    (tmp_path / "out" / "train" / "manifest.json").unlink()
    before = contents(tmp_path / "out")
    sentence = (
        r"a part of .* another source \(revision a, now b\): add source\.revision=a to go on with that text, remove"
    )
    with pytest.raises(DataError, match=sentence):
        prepared("b")
    assert contents(tmp_path / "out") == before
    prepared("a")


def test_processes_and_tasks_give_the_bytes_of_one_process(
    many_files: Path, tmp_path: Path, saved: TokenizerRequest
) -> None:
    run(many_files, tmp_path / "one", saved, filters=FILTERS)
    run(many_files, tmp_path / "two", saved, filters=FILTERS, workers=2)
    waited = 0
    for task in (0, 2, 1, 0, 2, 1):  # the first round ends with hashing, as the duplicates of one depend on the others
        with pytest.raises(WaitingForTasks) as waiting:
            run(many_files, tmp_path / "tasks", saved, filters=FILTERS, task=task, tasks=3)
        waited += "give the same command again" in str(waiting.value)
    assert waited == 2
    assert not (tmp_path / "tasks" / "train" / "manifest.json").exists()
    run(many_files, tmp_path / "tasks", saved, filters=FILTERS)
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == expected
    assert contents(tmp_path / "tasks") == expected


def test_an_error_in_a_process_is_that_of_the_file_and_ends_all(many_files: Path, tmp_path: Path, saved) -> None:
    (many_files / "5.json.gz").write_bytes((many_files / "5.json.gz").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"5\.json\.gz, after line \d+: the gzip file is cut short"):
        run(many_files, tmp_path / "out", saved, workers=2)
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    skipped = run(many_files, tmp_path / "out", saved, workers=1, on_error="skip")["train"]
    assert skipped.broken == {"damaged archive": 1}
    assert "skipped as broken: 1 (damaged archive)" in summary(skipped)


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
    monkeypatch.setattr(data.prepare, "TokenizePart", None)  # would fail when called
    monkeypatch.setattr(data.prepare, "trained_tokenizer", None)
    assert run(c4_folder, output) == first
    path = output / "train" / "00000" / "00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match="SHA-256"):
        run(c4_folder, output)


def test_a_domain_added_later_is_added_to_the_output(c4_folder: Path, tmp_path: Path, write_c4: Callable) -> None:
    output = tmp_path / "out"
    before = run(c4_folder, output)
    write_c4(c4_folder / "validation" / "code.json.gz", ["x = 1"])
    after = run(c4_folder, output)
    assert validation_domains(output) == ["books", "code", "news"]
    assert {name: after[name] for name in before} == before


def test_output_with_other_settings_is_refused_before_any_work(
    c4_folder: Path, tmp_path: Path, write_c4: Callable, texts: list[str]
) -> None:
    output = tmp_path / "out"
    run(c4_folder, output)
    before = contents(output)
    with pytest.raises(DataError, match=r"made with another tokenizer: remove .*, or choose another output"):
        run(c4_folder, output, TokenizerRequest("train", 299))
    with pytest.raises(DataError, match="made with another tokens_per_file"):
        run(c4_folder, output, tokens_per_file=501)
    with pytest.raises(DataError, match="made with another dtype and other filters"):
        run(c4_folder, output, dtype="uint32", filters=FILTERS)
    write_c4(c4_folder / "part.0.json.gz", texts[30:])
    write_c4(c4_folder / "part.1.json.gz", texts[:30])
    with pytest.raises(DataError, match="finished train made with another source"):
        run(c4_folder, output)
    (output / "train" / "manifest.json").unlink()
    del before["train/manifest.json"]
    with pytest.raises(
        DataError, match=r"unfinished train whose finished parts are all of other files, .*train, or choose"
    ):
        run(c4_folder, output)
    (c4_folder / "validation" / "news.json.gz").unlink()
    with pytest.raises(DataError, match="finished validation/news which this source does not have"):
        run(c4_folder, output)
    (output / "validation" / "news" / "manifest.json").unlink()
    with pytest.raises(DataError, match="unfinished validation/news, which this source does not have"):
        run(c4_folder, output)
    del before["validation/news/manifest.json"]
    assert contents(output) == before


def test_several_sources_are_shards_directories_of_one_tokenizer(
    c4_folder: Path, tmp_path: Path, write_c4: Callable
) -> None:
    write_c4(tmp_path / "code" / "a.json.gz", [f"x = {i}" for i in range(30)])
    file = tmp_path / "sources.yaml"
    file.write_text(
        f"web: {{source: files, path: {c4_folder}, weight: 0.7}}\n"
        f"code: {{source: files, path: {tmp_path / 'code'}, weight: 0.3}}\n"
    )
    manifests = prepare(SeveralSources(str(file)), REQUEST, tmp_path / "out", PrepareOptions(workers=1))
    assert list(manifests) == ["web/validation/books", "web/validation/news", "web/train", "code/train"]
    assert validation_domains(tmp_path / "out" / "web") == ["books", "news"]
    digests = {manifest.tokenizer["sha256"] for manifest in manifests.values()}
    files = {path.read_bytes() for path in (tmp_path / "out").rglob("tokenizer.json")}
    assert len(digests) == len(files) == 1
    assert len(list((tmp_path / "out").rglob("tokenizer.json"))) == 2
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "code" / "tokenizer.json").unlink()
    assert prepare(SeveralSources(str(file)), REQUEST, tmp_path / "out", PrepareOptions(workers=1)) == manifests
    assert contents(tmp_path / "out") == before


def test_a_tokenizer_that_does_not_fit_is_refused_by_name(c4_folder: Path, tmp_path: Path, saved) -> None:
    with pytest.raises(DataError, match=r"tokenizer=.*saved\.json has 300 ids, more than model_vocab_size=299"):
        run(c4_folder, tmp_path / "out", TokenizerRequest(saved.spec, 300, model_vocab_size=299))
    for size in (300, 1_000_000):  # more than this text gives
        sentence = rf"tokenizer_vocab_size={size} is more than model_vocab_size=299: use .* or a smaller tokenizer\."
        with pytest.raises(DataError, match=sentence):
            run(c4_folder, tmp_path / "out", TokenizerRequest("train", size, model_vocab_size=299))
    with pytest.raises(DataError, match=r"tokenizer_vocab_size=70000 is more than fit dtype=uint16: use .* or uint32"):
        run(c4_folder, tmp_path / "out", TokenizerRequest("train", 70_000), dtype="uint16")
    assert not (tmp_path / "out").exists()
    large = tmp_path / "large.json"
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a"))
    words.add_special_tokens(["</s>"])
    words.save(str(large))
    with pytest.raises(DataError, match=r"large\.json has 70001 ids, which do not fit dtype=uint16: use dtype=null"):
        run(c4_folder, tmp_path / "out", TokenizerRequest(str(large), 300), dtype="uint16")
    assert run(c4_folder, tmp_path / "out", saved, dtype="uint32")["train"].dtype == "uint32"


def test_a_source_of_which_nothing_is_left_says_why(tmp_path: Path, write_c4: Callable, saved) -> None:
    write_c4(tmp_path / "in" / "a.json.gz", ["x", "", "y"])
    with pytest.raises(
        DataError, match=r"no document .* \(2 length: fewer than 10 characters; 1 no text at all\): look"
    ):
        run(tmp_path / "in", tmp_path / "out", saved, filters=[{"name": "length", "min_characters": 10}])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokens_per_file": 0}, "tokens_per_file=0"),
        ({"dtype": "int8"}, "dtype=int8 is unknown: choose uint16, uint32"),
        ({"on_error": "ignore"}, "on_error=ignore is unknown: choose stop or skip"),
        ({"workers": 0}, "workers=0"),
        ({"task": 2, "tasks": 2}, "task=2 of tasks=2 does not exist"),
        ({"filters": [{"name": "no"}]}, "no is not a filter"),
    ],
)
def test_impossible_options_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        PrepareOptions(**options)


def test_impossible_requests_are_refused(c4_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer=train, which brings its own"):
        TokenizerRequest("train", 300, "</s>")
    with pytest.raises(DataError, match="tokenizer_vocab_size=256 is too small: use at least 257"):
        TokenizerRequest("train", 256)
    with pytest.raises(DataError, match="tokenizer=train cannot be shared out to tasks"):
        run(c4_folder, tmp_path / "out", tasks=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        run(c4_folder, tmp_path / "file")
