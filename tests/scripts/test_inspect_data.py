"""scripts/inspect_data.py as a user calls it."""

import json
import shutil

import pytest

from data.shards import TokenDataset, read_manifest
from scripts.inspect_data import main
from tests.shards import write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("inspected") / "corpus")


def test_a_report_has_all_that_was_asked_for(folder, tmp_path, capsys):
    path = shutil.copytree(folder, tmp_path / "corpus") / "train" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"filtered": {"duplicate": 3, "length": 1}}))
    options = ["--sequence-length", "64", "--instances", "3", "--histogram", "--verify", "--overlap", "5"]
    assert main([str(tmp_path / "corpus"), *options, "--picture", str(tmp_path / "batch.png")]) == 0
    said = capsys.readouterr().out
    manifest = read_manifest(folder / "train")
    for words in (
        f"train: 60 documents, {manifest.tokens:,} tokens, {manifest.bytes:,} bytes of text",
        f"fingerprint {manifest.fingerprint}",
        "left out by filters: 3 duplicate, 1 length\n",
        " | 1 file of uint",
        "tokenizer counting",
        "validation/odd: the checksums of all files are right",
        "120 of 120 ids occur",
        "documents by length:",
        "5-grams occur in training",
        "instance ",
        "picture ",
    ):
        assert words in said
    assert (tmp_path / "batch.png").stat().st_size > 5000


def test_longer_n_grams_than_any_document_are_said_to_be(folder, capsys):
    assert main([str(folder), "--overlap", "100000"]) == 0
    assert "no document is as long as 100000 tokens: use a smaller --overlap" in capsys.readouterr().out


def test_instances_are_shown_with_their_documents_and_the_order_of_a_run(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "corpus")
    assert main([str(tmp_path / "corpus"), "--sequence-length", "200", "--instances", "1", "--position", "7"]) == 0
    windows = capsys.readouterr().out
    assert (
        main([str(tmp_path / "corpus"), *["--sequence-length", "200", "--instances", "30", "--packing", "best_fit"]])
        == 0
    )
    packed = capsys.readouterr().out
    assert " 0'" in windows, "a document ends with EOS, 0"
    assert "places of padding" in packed
    assert "% padding" in packed


def test_an_instance_beyond_the_first_epoch_names_its_own(folder, capsys):
    size = len(TokenDataset(folder / "train", 64))
    arguments = ["--sequence-length", "64", "--instances", "2", "--position"]
    for position, epochs in ((size - 1, [[], ["epoch 2"]]), (5 * size, [["epoch 6"]] * 2)):
        assert main([str(folder), *arguments, str(position)]) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("instance ")]
        assert [line.split(", ")[1:] for line in shown] == epochs


def test_a_tokenizer_of_other_data_is_refused_and_a_missing_one_is_said_to_be(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "corpus")
    assert main([str(copy)]) == 0
    assert f"{copy}/tokenizer.json is missing: text is shown as the numbers of its ids" in capsys.readouterr().out
    (copy / "tokenizer.json").write_bytes(b"another tokenizer")
    assert main([str(copy)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {copy}/tokenizer.json is not the tokenizer of {copy}/train (its SHA-256")
    assert said.err.count("\n") == 1


def test_a_packed_mixture_says_once_how_it_is_packed_and_a_folder_that_cannot_be_read_is_named(
    folder, tmp_path, capsys, monkeypatch
):
    copy = shutil.copytree(folder, tmp_path / "corpus")
    options = ["--sequence-length", "64", "--packing", "best_fit", "--windows", "4", "--instances", "1"]
    assert main([str(copy), *options]) == 0
    assert capsys.readouterr().out.count("% padding") == 1
    monkeypatch.setattr("scripts.inspect_data.read_manifest", lambda path: path.joinpath("tokens").read_bytes())
    assert main([str(copy)]) == 2
    assert f"error: [Errno 2] No such file or directory: '{copy}/train/tokens'" in capsys.readouterr().err


def test_a_mixture_shows_its_shares_over_windows(folder, tmp_path, capsys):
    other = write_shards(tmp_path / "other", seed=3)
    assert main([f"{folder}=0.7", f"{other}=0.3", *["--sequence-length", "16", "--windows", "25"]]) == 0
    said = capsys.readouterr().out
    assert "period 10; instances of each dataset in 100,000 windows of 25" in said
    rows = [line.split() for line in said.splitlines() if line.split()[1:2] and line.split()[1] in ("7/10", "3/10")]
    assert [row[2:5] for row in rows] == [["17.50", "17", "18"], ["7.50", "7", "8"]]


def test_a_damaged_file_and_wrong_counts_are_problems_with_an_exit_status(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "corpus")
    path = copy / "validation" / "even" / "00000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\x05\x00")
    assert main([str(copy), "--verify", "--histogram"]) == 1
    said = capsys.readouterr().out
    assert f"problem: {path} is damaged (its SHA-256" in said
    assert "7 EOS ids were found and the manifest has 8 documents" in said
    manifest = json.loads((copy / "train" / "manifest.json").read_text())
    assert manifest["documents"] == 60


def test_a_folder_of_several_sources_is_named_with_what_is_in_it(tmp_path, capsys):
    for name in ("web", "code"):
        write_shards(tmp_path / "shards" / name)
    assert main([str(tmp_path / "shards")]) == 2
    said = capsys.readouterr()
    found = f"{tmp_path}/shards/code, {tmp_path}/shards/web"
    assert said.err == f"error: {tmp_path}/shards holds the shards of several sources: name each, {found}.\n"
    assert said.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/train does not exist"),
        (["{folder}=much"], "write PATH=WEIGHT with a number"),
        (["{folder}", "--instances", "1000000000"], "--instances 1000000000 cannot be used: use at most 100,000"),
        (
            ["{folder}=-1", "--windows", "5", "--sequence-length", "16"],
            "=-1 cannot be used: write PATH=WEIGHT with a pos",
        ),
        (["{folder}=0"], "=0 cannot be used: write PATH=WEIGHT with a positive number"),
        (["{folder}", "--overlap", "0"], "--overlap 0 cannot be used: use 1 or more"),
        (["{folder}", "--windows", "0"], "--windows 0 cannot be used: use 1 or more"),
        (["{folder}", "--sequence-length", "0", "--instances", "1"], "--sequence-length 0 cannot be used: use 1 or"),
        (["{folder}", "--instances", "-3"], "--instances -3 cannot be used"),
        (["{folder}", "--picture", "no/where/x.png"], "--picture no/where/x.png cannot be written"),
        (["{folder}", "--picture", "x.csv"], "--picture x.csv cannot be drawn: name it .png"),
        (["{folder}", "--sequence-length", "100000", "--instances", "1"], "is longer than the data"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, folder, capsys):
    assert main([argument.format(folder=folder) for argument in arguments]) == 2
    said, error = capsys.readouterr()
    assert message in error
    assert "train:" not in said or "longer than the data" in error, "refused before a page is printed"
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_folder_inside_of_a_shards_directory_is_named_with_that_directory(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path / "shards")
    for inside in ("train", "validation", "validation/books"):
        (tmp_path / "shards" / inside).mkdir(parents=True, exist_ok=True)
        assert main([str(tmp_path / "shards" / inside)]) == 2
        sentence = f"{tmp_path}/shards/{inside} is inside a shards directory: name that, {tmp_path}/shards."
        assert capsys.readouterr().err == f"error: {sentence}\n"
    monkeypatch.chdir(tmp_path / "shards" / "train")
    assert main(["."]) == 2
    assert capsys.readouterr().err == f"error: . is inside a shards directory: name that, {tmp_path}/shards.\n"
