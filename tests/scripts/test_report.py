"""`scripts/report.py` and `scripts/plot.py` from anywhere: files, printed table, one sentence for bad input."""

import subprocess
import sys
from pathlib import Path

from scripts import plot

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run(script: str, *arguments: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def write_run(folder: Path, lr: float, loss: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run:\n  name: {folder.name}\ntraining:\n  steps: 5\noptimizer:\n  lr: {lr}\n")
    (folder / "metrics.jsonl").write_text(f'broken\n{{"step": 5, "tokens": 40, "validation/mean/loss": {loss}}}\n')
    (folder / "summary.json").write_text("{}")
    return folder


def test_report_prints_the_table_and_writes_its_files(tmp_path):
    write_run(tmp_path / "runs" / "slow", 0.1, 4.0)
    write_run(tmp_path / "runs" / "fast", 0.2, 3.0)
    done = run("report.py", Path("runs"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[:3]] == [
        ["run", "optimizer.lr"],
        ["fast", "0.2"],
        ["slow", "0.1"],
    ]
    warnings = done.stderr.splitlines()
    assert len(warnings) == 2
    assert all(line.startswith("warning: runs/") and "line 1" in line for line in warnings)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"slow", "fast", "report.md", "report.png"}


def test_report_of_a_folder_without_runs_is_one_sentence_and_exit_code_2(tmp_path):
    done = run("report.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path} holds no run: a run is a folder with config.yaml and metrics.jsonl.\n"


def test_a_report_that_cannot_be_written_is_one_sentence_and_exit_code_2(tmp_path):
    write_run(tmp_path / "runs" / "slow", 0.1, 4.0)
    (tmp_path / "runs" / "report.md").mkdir()
    done = run("report.py", Path("runs"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stderr.splitlines()[-1].endswith(" cannot be used (Is a directory): give access or make room.")


def test_plot_draws_the_good_runs_and_names_the_bad_one(tmp_path):
    good = write_run(tmp_path / "good", 0.1, 4.0)
    done = run("plot.py", tmp_path / "missing", good, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == f"{good / 'curves.png'}\n"
    assert (good / "curves.png").exists()
    assert f"warning: {good / 'metrics.jsonl'}, line 1" in done.stderr
    assert f"error: {tmp_path / 'missing'} is not the folder of a run" in done.stderr


def test_curves_that_cannot_be_written_are_one_sentence(tmp_path, monkeypatch, capsys):
    def full(run_dir, warn):
        raise OSError(30, "Read-only file system", f"{run_dir}/curves.png")

    monkeypatch.setattr(plot, "draw_curves", full)
    assert plot.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/curves.png cannot be used (Read-only file system): give access or make room there.\n"
    )
