"""The command line: what a user types, what a user mistypes, what is left on disk."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from data.shards import TokenDataset, read_manifest, validation_domains
from data.tokenize import train_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    (folder / "validation").mkdir(parents=True)
    for path, count in [(folder / "a.json.gz", 50), (folder / "validation" / "books.json.gz", 5)]:
        with gzip.open(path, "wt") as file:
            for i in range(count):
                file.write(json.dumps({"text": f"Text {i} of {path.name}, the quick brown fox and {i * i}"}) + "\n")
    return folder


def test_the_command_prepares_a_folder_and_leaves_nothing_else(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "source=files", f"source.path={text}", "tokenizer=train"]
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [*command, "tokenizer_vocab_size=300", "output=shards"], cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in work.iterdir()] == ["shards"]
    assert sorted(path.name for path in (work / "shards").iterdir()) == ["tokenizer.json", "train", "validation"]
    assert validation_domains(work / "shards") == ["books"]
    assert read_manifest(work / "shards" / "train").documents == 50
    assert len(TokenDataset(work / "shards" / "train", 8)) > 10
    assert "data.path=shards" in done.stdout
    assert "tokenizing:" in done.stderr  # the progress bar


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("tokenizer=train output=o", "source is not set: choose source=files"),
        ("source=c4 tokenizer=train output=o", "source=c4 is not a source: choose source=files"),
        ("sorce=files", "sorce is not a key of this configuration: the nearest is source."),
        ("source=files source.pth=x", "source.pth is not a key of this configuration: the nearest is source.path."),
        ("source=files +tokeniser=x", "+tokeniser is not a key of this configuration: the nearest is tokenizer."),
        ("source=files source.path=x tokenizer=train", "output is not set: add output=... to the command."),
        ("source=files output=o tokenizer=train", "source.path is not set: add source.path=... to the command."),
        ("source=embedded tokenizer=train", "output is not set"),
        ("source=files source.path=/no/such tokenizer=train output=o", "source.path=/no/such is no folder and no file"),
        ("source=embedded tokenizer=/no/such.json output=o", "tokenizer=/no/such.json does not exist"),
        ("source=embedded tokenizer=train output=o tokens_per_file=many", "tokens_per_file=many cannot be used"),
        ("source=embedded tokenizer=train output=o source.max_megabytes=x", "source.max_megabytes=x cannot be used"),
        ("source=embedded tokenizer=train output=o eos_token=</s>", "eos_token=</s> cannot be parsed: quote the value"),
        ("source=embedded tokenizer=train output=a,b", "output=a,b is several values"),
        ("source=embedded tokenizer=train output", "output is not an override: write key=value."),
        ("source=embedded filters=duplicate", "filters=duplicate is no list: write it as 'filters=[{name: duplicate},"),
        ("source=embedded filters={name:duplicate}", "filters={'name': 'duplicate'} is no list: write it as"),
        ("source=embedded filters=null", "filters=None is no list: write it as"),
        ("source=embedded output=o tokenizer=train filters=[duplicate]", "filters cannot use duplicate: write each as"),
        ("-m source=embedded", "-m is not an override"),
        ("source=embedded tokenizer=train output=", "output= is empty: give it a value"),
        ("source=files source.path= tokenizer=train output=o", "source.path= is empty: give it a value"),
        ("source=files source.path=x source.validation= tokenizer=t output=o", "source.validation= is empty"),
        ("source=embedded tokenizer=train output=s3://b/o", "output=s3://b/o is an address: name a folder here"),
        (
            "source=files source.path=gs://b/t tokenizer=t output=o",
            "source.path=gs://b/t is an address: copy its files",
        ),
        (
            "source=embedded output=o tokenizer=train filters=[{name:length,min_tokens:9,max_tokens:5}]",
            "the filter length cannot use min_tokens=9 with max_tokens=5",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_any_file(
    script: ModuleType,
    arguments: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_to_train_names_a_folder_that_a_run_can_read(
    script: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # a run takes no `~`
    options = ["tokenizer=train", "tokenizer_vocab_size=300", 'output="~/shards"']
    assert script.main(["source=files", f"source.path={text}", *options]) == 0
    assert capsys.readouterr().out.endswith(f" data.path={tmp_path}/shards\n")


@pytest.mark.parametrize(
    ("path", "output"),
    [("text", "text"), ("text", "."), ("text/", "link"), ("text/*.json.gz", "text"), ("text/a.json.gz", "text")],
)
def test_output_that_holds_the_source_is_refused_at_once(
    script: ModuleType,
    text: Path,
    path: str,
    output: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("text")
    before = sorted(tmp_path.rglob("*"))
    assert script.main(["source=files", f"source.path={path}", "tokenizer=train", f"output={output}"]) == 2
    assert capsys.readouterr().err == (
        f"error: output={output} holds the files of source.path={path}: choose another output, as "
        f"{Path(output) / 'shards'}.\n"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("path", "output", "made"),
    [
        ("text/**/*.json*", "text/shards", "tokenizer.json"),
        ("**/*.json*", "shards", "tokenizer.json"),
        ("text/*/*.json", "text/shards", "tokenizer.json"),
        ("text/*/*/*.json*", "text/shards", "train/manifest.json"),
        ("text/*/*/*/*.txt", "link/shards", "train/00000/skipped.txt"),
        ("text/**", "text/shards", "tokenizer.json"),
        ("text/s?ards/[t]rain/**/*.json", "text/shards", "train/manifest.json"),
        ("text/**/*.json.gz", "text/shards", None),
        ("text/**/*.json*", "text/.shards", None),
        ("text/**/*.json*", "shards", None),
        ("text/2*/**/*.json*", "text/shards", None),
        ("text/*.json*", "text/shards", None),
    ],
)
def test_output_that_a_glob_would_take_for_text_the_next_time_is_refused(
    script: ModuleType,
    text: Path,
    path: str,
    output: str,
    made: str | None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text" / "2020").mkdir()
    shutil.copy(text / "a.json.gz", text / "2020")
    shutil.rmtree(text / "validation")
    (tmp_path / "link").symlink_to("text")
    monkeypatch.chdir(tmp_path)
    tokenizer = f"tokenizer={tmp_path}/none.json"
    assert script.main(["source=files", f"source.path='{path}'", tokenizer, f"output={output}"]) == 2
    said = capsys.readouterr().err
    if made is None:
        assert "none.json does not exist" in said
    else:
        assert said == (
            f"error: output={output} will hold {made}, which source.path={path} then takes for text: choose another "
            "output, or a glob that leaves it out.\n"
        )


def test_output_inside_the_source_is_no_part_of_it_except_in_its_validation_text(
    script: ModuleType, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["source=files", f"source.path={text}", "tokenizer=train", "tokenizer_vocab_size=300", "workers=1"]
    for _ in range(2):
        assert script.main([*command, f"output={text / 'shards'}"]) == 0
    assert read_manifest(text / "shards" / "train").documents == 50
    assert script.main([*command, f"output={text / 'validation' / 'shards'}"]) == 2
    assert f"lies in {text / 'validation'}, the validation text" in capsys.readouterr().err


def test_the_configuration_and_the_help_can_be_shown(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["source=embedded", "output=somewhere", "tokenizer=train", "--cfg", "job"]) == 0
    assert "path: somewhere/text" in capsys.readouterr().out
    assert script.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("source=files", "max_megabytes", "text_field", "tokens_per_file"):
        assert word in shown


def test_the_same_command_given_twice_at_one_time_waits_and_finds_the_work_done(
    script: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["source=files", f"source.path={text}", "tokenizer=train", "tokenizer_vocab_size=300", "workers=1"]
    arguments.append(f"output={tmp_path / 'shards'}")
    prepare, host_lock = script.prepare, script.host_lock
    second = threading.Thread(target=lambda: statuses.append(script.main(arguments)))
    statuses: list[int] = []
    said: list[str] = []
    waits = threading.Event()

    def lock(path, waiting):
        return host_lock(path, lambda: (waiting(), waits.set()))

    def while_the_other_waits(*given):
        monkeypatch.setattr(script, "prepare", prepare)
        second.start()
        waits.wait(60)
        said.append(capsys.readouterr().out)  # once: what is printed while it is read may be lost
        return prepare(*given)

    monkeypatch.setattr(script, "host_lock", lock)
    monkeypatch.setattr(script, "prepare", while_the_other_waits)
    statuses.append(script.main(arguments))
    second.join()
    assert statuses == [0, 0]
    assert f"another command prepares output={tmp_path / 'shards'}: waiting for its end" in said[0]
    assert "train: finished before" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_with_one_line_and_the_same_command_continues(name: str, tmp_path: Path) -> None:
    folder, shards = tmp_path / "text", tmp_path / "shards"
    folder.mkdir()
    for part in range(4):
        rows = [json.dumps({"text": f"{part} {i} the quick brown fox " * 40}) for i in range(2000)]
        (folder / f"{part}.jsonl").write_text("\n".join(rows))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(train_tokenizer(["the quick brown fox"], 260).content)
    command = [sys.executable, str(SCRIPT), "source=files", f"source.path={folder}", f"tokenizer={tokenizer}"]
    command += [f"output={shards}", "source.part_megabytes=2", "workers=2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (finished := list(shards.glob("train/*/manifest.json"))):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.Signals[name])  # to the workers too, as a terminal and a scheduler do
        errors = process.communicate()[1]  # to its end, so nobody is left who could write to it
    assert process.returncode == 128 + signal.Signals[name]
    assert errors.splitlines()[-1] == f"{name} came: stopped. The same command continues, and keeps all finished parts."
    assert "Traceback" not in errors
    assert not (shards / "train" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in finished}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parts were finished before and are kept" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == kept
    assert read_manifest(shards / "train").documents == 8000


def test_a_signal_ends_the_collection_of_embedded_text_and_all_its_processes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "source=embedded", "tokenizer=train", f"output={tmp_path / 'shards'}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        said = b""
        while b"collecting text" not in said:
            said += process.stderr.read1()
            assert process.poll() is None, said
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 2:  # one of them watches over shared memory
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1].decode()  # to its end, so nobody is left who could write to it
    assert process.returncode == 130
    assert "SIGINT came: stopped" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "shards" / "train").exists()
