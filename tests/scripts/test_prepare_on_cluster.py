"""Tasks on many machines make what one command makes, and SLURM is asked for arrays that wait for each other."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.shards import DataError
from data.tokenize import train_tokenizer
from scripts.prepare_on_cluster import Stage, stages

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_on_cluster.py"
TEXTS = [f"Text {i % 40} of sixty, the quick brown fox and {(i % 40) ** 2}" for i in range(60)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A source of four files, a tokenizer, and parts so small that there are several."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        with gzip.open(folder / f"{i}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[15 * i : 15 * i + 15])
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(TEXTS, 300).content)
    source = ["source=files", f"source.path={folder}", "source.part_megabytes=0.0003"]
    return [*source, f"tokenizer={tmp_path / 'tokenizer.json'}"]


def test_the_stages_run_as_commands_of_any_scheduler_make_what_one_command_makes(
    tmp_path: Path, overrides: list[str]
) -> None:
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_data.py", *overrides, f"output={tmp_path / 'one'}"], check=True
    )
    for stage in stages([*overrides, f"output={tmp_path / 'many'}"]):
        for rank in range(2 if stage.shared else 1):
            stage(None, rank, 2 if stage.shared else 1)
    assert len(list((tmp_path / "many" / "train").glob("0*"))) > 1
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_failed_task_fails_its_job(tmp_path: Path) -> None:
    stage = Stage("tokenize", [sys.executable, "-c", "raise SystemExit(2)"], str(tmp_path), shared=True)
    with pytest.raises(RuntimeError, match="task=1 tasks=2 ended with status 2"):
        stage(None, 1, 2)


def test_mistakes_are_found_before_anything_is_submitted(tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(DataError, match="task is set by --tasks here"):
        stages([*overrides, "task=1"])
    with pytest.raises(DataError, match="output is not set"):
        stages(overrides)
    output = f"output={tmp_path}"
    assert [stage.name for stage in stages([*overrides, output])] == ["tokenize", "end"]
    duplicate = "filters=[{name: duplicate}]"
    assert [stage.name for stage in stages([*overrides, output, duplicate])] == ["hash", "tokenize", "end"]


def test_datatrove_runs_the_tasks_here(tmp_path: Path, overrides: list[str]) -> None:
    pytest.importorskip("datatrove")
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_data.py", *overrides, f"output={tmp_path / 'one'}"], check=True
    )
    command = [sys.executable, SCRIPT, "--tasks", "2", "--local", "--logs", tmp_path / "logs", "--"]
    done = subprocess.run([*command, *overrides, f"output={tmp_path / 'many'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_the_logs_of_another_output_or_of_a_removed_one_do_not_pass_for_a_preparation(
    tmp_path: Path, overrides: list[str]
) -> None:
    pytest.importorskip("datatrove")
    command = [sys.executable, SCRIPT, "--tasks", "1", "--local", "--logs", tmp_path / "logs", "--", *overrides]
    for output in ("one", "two"):
        subprocess.run([*command, f"output={tmp_path / output}"], check=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    shutil.rmtree(tmp_path / "two")
    subprocess.run([*command, f"output={tmp_path / 'two'}"], check=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_mistake_and_a_failed_task_end_with_one_sentence(tmp_path: Path, overrides: list[str]) -> None:
    pytest.importorskip("datatrove")
    (tmp_path / "text" / "4.jsonl").write_text("{bad}\n")
    overrides[1] = f"source.path={tmp_path / 'text' / '4.jsonl'}"
    for tasks, status, sentence in (("0", 2, "--tasks 0 cannot be used"), ("1", 1, "ended with status 2. Its own")):
        command = [sys.executable, SCRIPT, "--tasks", tasks, "--local", "--logs", tmp_path / "logs", "--", *overrides]
        done = subprocess.run([*command, f"output={tmp_path / 'many'}"], capture_output=True, text=True)
        assert done.returncode == status
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert sentence in last
    assert "4.jsonl, line 1: not JSON" in done.stderr


def test_slurm_is_asked_for_arrays_that_wait_for_each_other(tmp_path: Path, overrides: list[str]) -> None:
    pytest.importorskip("datatrove")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(  # notes what it is asked for, answers with a job number
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nfor last; do true; done\ncat "$last" >> {tmp_path}/scripts\n'
        f"echo Submitted batch job $(wc -l < {tmp_path}/asked)\n"
    )
    sbatch.chmod(0o755)
    command = [sys.executable, SCRIPT, "--tasks", "5", "--partition", "cpu", "--logs", tmp_path / "logs", "--"]
    done = subprocess.run(
        [*command, *overrides, f"output={tmp_path / 'many'}", "filters=[{name: duplicate}]"],
        env=os.environ | {"PATH": f"{sbatch.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scripts = (tmp_path / "scripts").read_text()
    for name in ("hash", "tokenize", "end"):
        assert f"--job-name=prepare-{name}" in scripts
    assert scripts.count("--array=0-4") == 2
    assert "--dependency=afterok:1" in (tmp_path / "asked").read_text() + scripts
    assert not (tmp_path / "many").exists()
