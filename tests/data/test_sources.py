"""Sources find their files and datasets, give all texts in order however they are cut, and refuse mistakes by name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.hub_datasets import HuggingFaceDataset
from data.readers import Broken
from data.several_sources import SeveralSources
from data.shards import DataError
from data.sources import Files, Split, TokenFile, TokenFiles


def texts_of(split: Split) -> list[str | Broken]:
    found: list[str | Broken] = []
    for part in split.parts():
        assert not isinstance(part, TokenFile)
        found += [item for item, _ in pickle.loads(pickle.dumps(part)).read()]  # as another process gets it
    return found


def test_a_folder_gives_validation_domains_then_training(c4_folder: Path, texts: list[str]) -> None:
    splits = Files(str(c4_folder)).splits()
    assert [split.name for split in splits] == ["validation/books", "validation/news", "train"]
    assert texts_of(splits[-1]) == texts
    (part,) = splits[-1].parts()
    positions = [position for _, position in part.read()]  # type: ignore[union-attr]
    assert positions == sorted(positions)
    assert positions[-1] == part.size == sum(path.stat().st_size for path in c4_folder.glob("*.gz"))


def test_globs_files_and_domain_folders_are_found(tmp_path: Path, write_c4: Callable, texts: list[str]) -> None:
    for i in range(6):
        write_c4(tmp_path / f"year{i % 2}" / f"{i}.json.gz", texts[10 * i : 10 * i + 10])
    for name in ("a.json.gz", "b/1.json.gz", "b/deep/2.json.gz"):
        write_c4(tmp_path / "held out" / name, texts[:3])
    source = Files(str(tmp_path / "year*" / "*.json.gz"), validation=str(tmp_path / "held out"))
    a, b, train = source.splits()
    assert (a.name, b.name) == ("validation/a", "validation/b")
    assert (len(texts_of(a)), len(texts_of(b)), len(texts_of(train))) == (3, 6, 60)
    assert [name for name, *_ in train.settings["files"]][:2] == ["year0/0.json.gz", "year0/2.json.gz"]
    assert texts_of(Files(str(tmp_path / "year1" / "3.json.gz")).splits()[-1]) == texts[30:40]
    assert len(texts_of(Files(str(tmp_path / "year*" / "**")).splits()[-1])) == 60


def test_how_a_source_is_cut_does_not_change_its_text(tmp_path: Path, write_c4: Callable, texts: list[str]) -> None:
    for i in range(10):
        write_c4(tmp_path / f"{i}.json.gz", texts[6 * i : 6 * i + 6])
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    counts = []
    for megabytes in (1e-6, 0.0005, 0.001, 64.0):
        (split,) = Files(str(tmp_path / "*.json*"), part_megabytes=megabytes).splits()
        counts.append(len(split.parts()))
        assert texts_of(split) == texts + texts
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 10
    assert counts[-1] == 1


def test_settings_follow_the_files_not_the_place(c4_folder: Path, tmp_path: Path, write_c4: Callable) -> None:
    before = [split.settings for split in Files(str(c4_folder)).splits()]
    moved = c4_folder.rename(tmp_path / "moved")
    assert [split.settings for split in Files(str(moved)).splits()] == before
    assert Files(str(moved), text_field="body").splits()[-1].settings != before[-1]
    write_c4(moved / "part.2.json.gz", ["one more"])
    after = [split.settings for split in Files(str(moved)).splits()]
    assert after[:-1] == before[:-1]
    assert after[-1] != before[-1]


def test_mistakes_with_files_are_refused_by_name(tmp_path: Path, c4_folder: Path, write_c4: Callable) -> None:
    with pytest.raises(DataError, match="holds no file of a known suffix"):
        Files(str(tmp_path / "c4" / "..")).splits()
    (tmp_path / "x.json.gz").touch()
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=r"holds files of several kinds \(\.json\.gz, \.txt\): name those .* a glob"):
        Files(str(tmp_path)).splits()
    with pytest.raises(DataError, match="nothing is no folder and no file, and no file matches it"):
        Files(str(tmp_path / "nothing")).splits()
    (c4_folder / "part.2.json.gz").symlink_to("elsewhere.json.gz")
    for path in (c4_folder, c4_folder / "*.gz"):
        with pytest.raises(DataError, match=r"part\.2\.json\.gz is a link to what does not exist: bring that back"):
            Files(str(path)).splits()
    (c4_folder / "part.2.json.gz").unlink()
    (c4_folder / "README").write_text("x")
    with pytest.raises(DataError, match=r"names .*README, whose suffix is unknown"):
        Files(str(c4_folder / "*")).splits()
    with pytest.raises(DataError, match=r"source.validation=.*nowhere is not a folder"):
        Files(str(c4_folder), validation="nowhere").splits()
    with pytest.raises(DataError, match="plain_text=word is unknown: choose file, paragraph, line"):
        Files(str(c4_folder), plain_text="word").splits()
    write_c4(c4_folder / "validation" / "books.jsonl.gz", ["twice"])
    with pytest.raises(DataError, match="two domains named books: rename one, or put both in a folder"):
        Files(str(c4_folder)).splits()


def test_what_a_folder_holds_beside_its_text_is_said(
    tmp_path: Path, write_c4: Callable, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_c4(tmp_path / "a.json.gz", texts[:3])
    write_c4(tmp_path / "B.JSON.GZ", texts[3:5])  # as another system may write it
    write_c4(tmp_path / "validation" / "books.json.gz", texts[:1])
    Files(str(tmp_path)).splits()
    assert capsys.readouterr().out == ""
    for name in ("c.json.gz.part", "README.md", "d.csv", ".hidden"):
        (tmp_path / name).write_text("x")
    write_c4(tmp_path / "2020" / "e.json.gz", texts[:3])
    assert len(texts_of(Files(str(tmp_path)).splits()[-1])) == 5
    assert capsys.readouterr().out == (
        f"source.path={tmp_path}: 4 of other suffixes and subfolders are left out "
        "(2020/, README.md, c.json.gz.part, ...)\n"
    )
    (tmp_path / "2020" / "e.json.gz").rename(tmp_path / "2020" / "e.csv")
    sentence = r"holds no file of a known suffix \(e\.csv\): give a folder, file or glob of \.json, .*, with \*\* for"
    with pytest.raises(DataError, match=sentence):
        Files(str(tmp_path / "2020")).splits()
    with pytest.raises(DataError, match=r"\(e\.csv\): give a folder, file or glob of \.npy, \.bin, with"):
        TokenFiles(str(tmp_path / "2020")).splits()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_parts_of_no_size_are_refused(c4_folder: Path, value: float) -> None:
    with pytest.raises(DataError, match=f"source.part_megabytes={value} cannot be used: give a positive number"):
        Files(str(c4_folder), part_megabytes=value).splits()


def test_a_file_is_not_both_training_and_validation_text(tmp_path: Path, c4_folder: Path, write_c4: Callable) -> None:
    books = r"names .*/books\.json\.gz, which is validation text: name the files of training alone"
    for path, validation in (
        (c4_folder / "**" / "*.json.gz", None),
        (c4_folder / "**" / "*.json.gz", c4_folder / "validation"),
        (c4_folder / "validation", c4_folder / "validation"),
        (c4_folder / "validation" / "books.json.gz", c4_folder / "validation"),
    ):
        with pytest.raises(DataError, match=books):
            Files(str(path), validation=validation and str(validation)).splits()
    (tmp_path / "held").symlink_to("c4/validation")
    with pytest.raises(DataError, match=books):
        Files(str(c4_folder / "validation" / "b*.gz"), validation=str(tmp_path / "held")).splits()
    (train,) = Files(str(c4_folder / "validation" / "*.gz")).splits()  # named as what it is to be: training text
    assert len(train.settings["files"]) == 2


def test_a_domain_that_no_run_could_read_is_refused_before_it_is_prepared(c4_folder: Path, write_c4: Callable) -> None:
    write_c4(c4_folder / "validation" / "mean.json.gz", ["text"])
    with pytest.raises(DataError, match=r"mean\.json\.gz cannot be a domain: validation/mean is the mean of all"):
        Files(str(c4_folder)).splits()


@pytest.mark.parametrize("held_out", ["c4-validation.00000-of-00008.json.gz", "news_VAL_1.json.gz", "test-0.json.gz"])
def test_held_out_files_in_the_folder_of_training_are_not_taken_for_it(
    tmp_path: Path, write_c4: Callable, texts: list[str], held_out: str
) -> None:
    write_c4(tmp_path / "en" / "c4-train.00000-of-01024.json.gz", texts[:9])
    write_c4(tmp_path / "en" / "contests-of-trainers.json.gz", texts[9:20])
    assert len(texts_of(Files(str(tmp_path / "en")).splits()[-1])) == 20
    write_c4(tmp_path / "en" / held_out, texts[:3])
    with pytest.raises(DataError, match=f"holds {held_out} among files of training: name those .* with a glob"):
        Files(str(tmp_path / "en")).splits()
    assert len(texts_of(Files(str(tmp_path / "en" / "c*")).splits()[-1])) == 20 + 3 * held_out.startswith("c")


@pytest.fixture
def hub_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], write_c4: Callable) -> Path:
    """A local dataset in the layout of allenai/c4: a configuration `en`, gzipped JSON lines in numbered files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "c4"
    for i in range(3):
        write_c4(folder / "en" / f"c4-train.{i:05d}-of-00003.json.gz", texts[20 * i : 20 * i + 20])
    write_c4(folder / "en" / "c4-validation.00000-of-00001.json.gz", texts[:9])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n"
    )
    return folder


def test_a_dataset_of_c4s_layout_is_streamed_in_one_part_a_file(hub_layout: Path, texts: list[str]) -> None:
    source = HuggingFaceDataset(str(hub_layout), "en", validation_split="validation")
    validation, train = source.splits()
    assert validation.name == "validation/c4"
    assert texts_of(validation) == texts[:9]
    assert len(train.parts()) == 3
    assert texts_of(train) == texts
    limited = HuggingFaceDataset(str(hub_layout), "en", max_documents=25).splits()[-1]
    (part,) = limited.parts()
    assert list(part.read()) == [(text, i + 1) for i, text in enumerate(texts[:25])]  # type: ignore[union-attr]
    assert part.size == 25


def test_what_is_read_of_the_hub_is_one_commit(
    hub_layout: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    commit, local, opened = "0123456789abcdef" * 2 + "01234567", str(hub_layout), []

    def builder(name: str, config: str, revision: str | None) -> SimpleNamespace:
        files = [f"hf://datasets/{name}@{commit}/en/c4-train.{i:05d}-of-00003.json.gz" for i in range(3)]
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))

    load = datasets.load_dataset

    def opening(name: str, *given: str, revision: str | None, **options: object) -> object:
        opened.append(revision)
        return load(local, *given, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", opening)
    (split,) = HuggingFaceDataset("allenai/c4", "en").splits()
    assert split.settings["revision"] == commit
    assert texts_of(split) == texts
    assert set(opened) == {commit}


def test_mistakes_with_a_dataset_are_one_sentence(hub_layout: Path) -> None:
    with pytest.raises(DataError, match=r"\(config en\) has no split test: choose from train, validation"):
        HuggingFaceDataset(str(hub_layout), "en", split="test").splits()
    with pytest.raises(DataError, match=r"\(config fr\) cannot be opened: look at its name.*fr") as error:
        HuggingFaceDataset(str(hub_layout), "fr").splits()
    assert "\n" not in str(error.value)
    broken = texts_of(HuggingFaceDataset(str(hub_layout), "en", text_field="body").splits()[0])[0]
    assert isinstance(broken, Broken)
    assert "document 1: no string field body: choose source.text_field from text, timestamp, url" in broken.message
    with pytest.raises(DataError, match=r"source\.max_documents=0"):
        HuggingFaceDataset(str(hub_layout), max_documents=0).splits()
    path = next((hub_layout / "en").glob("c4-train.00001*"))
    path.write_bytes(path.read_bytes()[:-50])
    broken = texts_of(HuggingFaceDataset(str(hub_layout), "en").splits()[0])[-21]
    assert isinstance(broken, Broken)
    assert "shard 2 of 3, after document 0: cannot be read" in broken.message


def test_token_files_are_found_by_suffix(tmp_path: Path) -> None:
    for name in ("b.npy", "a.npy", "notes.txt", "validation/web.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\1\0\2\0")
    validation, train = TokenFiles(str(tmp_path)).splits()
    assert validation.name == "validation/web"
    assert train.settings["kind"] == "token_files"
    assert [entry[:2] for entry in train.settings["files"]] == [["a.npy", 4], ["b.npy", 4]]


def test_a_file_got_again_is_another_even_if_its_size_is_the_same(c4_folder: Path) -> None:
    before = Files(str(c4_folder)).splits()[-1].settings
    path = c4_folder / "part.1.json.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))  # space was set aside for all of it, and the end is still to come
    assert Files(str(c4_folder)).splits()[-1].settings != before
    path.write_bytes(content)
    os.utime(path, (0, 0))
    assert Files(str(c4_folder)).splits()[-1].settings == before


@pytest.mark.parametrize("change", ["cut", "removed"])
def test_a_file_that_changes_while_it_is_read_stops_its_part(c4_folder: Path, texts: list[str], change: str) -> None:
    path = c4_folder / "part.1.json.gz"
    (part,) = Files(str(c4_folder)).splits()[-1].parts()
    items = part.read()  # type: ignore[union-attr]
    assert [next(items)[0] for _ in texts] == texts
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"part\.1\.json\.gz has changed since the command began: give the same"):
        list(items)


def test_several_sources_come_by_name_with_their_weights(tmp_path: Path, c4_folder: Path, write_c4: Callable) -> None:
    write_c4(tmp_path / "code" / "a.json.gz", ["x = 1"])
    file = tmp_path / "sources.yaml"
    file.write_text(
        f"web: {{source: files, path: {c4_folder}, weight: 0.7}}\n"
        f"code: {{source: files, path: {tmp_path / 'code'}, weight: 0.3}}\n"
    )
    source = SeveralSources(str(file))
    names = [split.name for split in source.splits()]
    assert names == ["web/validation/books", "web/validation/news", "web/train", "code/train"]
    assert source.weights() == {"web": 0.7, "code": 0.3}
    assert texts_of(source.splits()[-1]) == ["x = 1"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no sources"),
        ("a: {", "cannot be read"),
        ("a: 3", "a: source=None is not a source: choose files, datasets"),
        ("a: {source: several, weight: 1}", "a: source=several is not a source"),
        ("a: {source: files, path: x}", "a: weight=None cannot be used: give a positive number"),
        ("a: {source: files, path: x, weight: -1}", "a: weight=-1 cannot be used"),
        ("a: {source: files, weight: 1}", "a: .*path"),
        ("a: {source: files, path: x, wieght: 1, weight: 1}", "a: wieght is not a key of source=files: it has path"),
        ("a: {source: files, path: x, part_megabytes: many, weight: 1}", "a: .*many"),
        ("a: {source: files, path: /no/such, weight: 1}", "a: source.path=/no/such is no folder"),
        ("train: {source: files, path: x, weight: 1}", "train: cannot be the name"),
        ("a/b: {source: files, path: x, weight: 1}", "a/b: cannot be the name"),
    ],
)
def test_a_mistake_in_a_file_of_sources_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "sources.yaml"
    file.write_text(content)
    with pytest.raises(DataError, match=rf"sources\.yaml.*{sentence}") as error:
        SeveralSources(str(file)).splits()
    assert "\n" not in str(error.value)
