"""A report finds every run, shows what differs and how each did, best first."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from training import report
from training.report import ReportError, draw_report, find_runs, load_runs, write_report

BASE = {
    "run": {"name": "run", "dir": "/somewhere/0"},
    "model": {"norm": "pre", "depth_kv": False},
    "data": {"path": "/a/shards/c4"},
    "training": {"steps": 20},
    "optimizer": {"lr": 3e-4},
    "logging": {"every": 10, "wandb": {"mode": "offline"}},
}


def write_run(folder: Path, losses: dict[str, float | None] | None = None, *, last=20, summary=True, **changes) -> Path:
    """A run of two records after step 0; `changes`: group__key=value; `losses`: last validation loss by domain."""
    folder.mkdir(parents=True)
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    config = OmegaConf.create(BASE)
    for key, value in {"run.dir": str(folder), **changed}.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    validation = {f"validation/{domain}/loss": loss for domain, loss in (losses or {}).items()}
    records: list[dict[str, Any]] = [{"step": 0, "tokens": 0, **dict.fromkeys(validation, 9.0)}]
    for step in (10, 20)[: last // 10]:
        records.append(
            {"step": step, "tokens": 1000 * step, "train/loss": 50.0 / step, "throughput/tokens_per_second": 1e3 * step}
        )
    records[-1] |= validation
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if summary:
        (folder / "summary.json").write_text(json.dumps({"name": "run", "steps": 20, "stopped_at": last}))
    return folder


def rows(markdown: str) -> list[dict[str, str]]:
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, line, strict=True)) for line in body]


def test_a_row_shows_what_differs_and_the_last_losses_best_first(tmp_path):
    write_run(tmp_path / "0", {"c4": 5.0, "wiki": 3.0, "mean": 4.0}, model__norm="pre")
    write_run(tmp_path / "1", {"c4": 4.5, "wiki": 3.1, "mean": 3.8}, model__norm="post", logging__every=5)
    made = write_report(tmp_path)
    first, second = rows(made.markdown.read_text())
    assert first == {
        "run": "1",
        "model.norm": "post",
        "steps": "20",
        "tokens": "20.0 k",
        "train loss": "2.5000",
        "validation": "**3.8000**",
        "Δ best": "0",
        "c4": "**4.5000**",
        "wiki": "3.1000",
        "tokens/s": "15.0 k",
    }
    assert (second["run"], second["validation"], second["Δ best"], second["wiki"]) == (
        "0",
        "4.0000",
        "+0.2000",
        "**3.0000**",
    )
    assert made.markdown == tmp_path / "report.md"
    assert made.picture == tmp_path / "report.png"
    assert made.picture.read_bytes().startswith(b"\x89PNG")
    assert "![loss curves](report.png)" in made.markdown.read_text()


def test_the_text_table_is_the_same_table_aligned(tmp_path):
    write_run(tmp_path / "short", {"mean": 4.0}, optimizer__lr=1e-3)
    write_run(tmp_path / "a_longer_name", {"mean": 3.0})
    made = write_report(tmp_path)
    lines = made.text.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "a_longer_name", "short"]
    assert [line.split()[1] for line in lines] == ["optimizer.lr", "0.0003", "0.001"]
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines, ("validation", "3.0000", "4.0000"), strict=True)]
    assert len(set(ends)) == 1
    assert "**" not in made.text


def test_one_run_alone_has_no_differing_columns_and_nothing_bold(tmp_path):
    made = write_report(write_run(tmp_path / "alone", {"mean": 4.0}))
    (row,) = rows(made.markdown.read_text())
    assert row == {
        "run": "alone",
        "steps": "20",
        "tokens": "20.0 k",
        "train loss": "2.5000",
        "validation": "4.0000",
        "tokens/s": "15.0 k",
    }


def test_data_of_one_name_is_the_same_wherever_it_lies_and_other_data_differs(tmp_path):
    write_run(tmp_path / "0", {"mean": 4.0}, data__path="/a/c4")
    write_run(tmp_path / "1", {"mean": 4.0}, data__path="/b/c4")
    assert load_runs(tmp_path)[0].differing == {}
    write_run(tmp_path / "2", {"mean": 4.0}, data__path="/b/wiki")
    assert set(load_runs(tmp_path)[0].differing) == {"data.path"}


def test_a_key_that_only_one_configuration_has_differs(tmp_path):
    write_run(tmp_path / "0", {"mean": 3.0})
    folder = write_run(tmp_path / "1", {"mean": 4.0})
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, "model.value_norm", True, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    assert [run.differing for run in load_runs(tmp_path)] == [{"model.value_norm": None}, {"model.value_norm": True}]


@pytest.mark.parametrize(("last", "summary"), [(10, True), (20, False)], ids=["stopped early", "killed"])
def test_a_run_that_did_not_reach_its_end_is_marked(tmp_path, last, summary):
    write_run(tmp_path / "whole", {"mean": 3.0})
    write_run(tmp_path / "part", {"mean": 4.0}, last=last, summary=summary)
    made = write_report(tmp_path)
    whole, part = rows(made.markdown.read_text())
    assert whole["steps"] == "20"
    assert part["steps"] == f"{last} of 20 \\*"
    assert "* the run goes on, was stopped or was killed" in made.text


@pytest.mark.parametrize(
    ("stopped_at", "step", "tokens"),
    [(13, 13, "13.0 k"), (5, 10, "10.0 k"), (20, 10, "10.0 k")],
    ids=["between two records", "goes on", "goes on from an earlier checkpoint"],
)
def test_a_run_has_come_to_the_step_that_it_has_stopped_at(tmp_path, stopped_at, step, tokens):
    folder = write_run(tmp_path / "run", {"mean": 4.0}, last=10)
    summary = {"name": "run", "steps": 20, "stopped_at": stopped_at, "tokens": 1000 * stopped_at}
    (folder / "summary.json").write_text(json.dumps(summary))
    (row,) = rows(write_report(tmp_path).markdown.read_text())
    assert (row["steps"], row["tokens"]) == (f"{step} of 20 \\*", tokens)
    assert row["validation"] == ("4.0000" if step == 10 else "4.0000 (step 10)")


def test_an_evaluation_before_the_last_step_says_its_step(tmp_path):
    folder = write_run(tmp_path / "run", {"mean": 4.0})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "tokens": 25000, "train/loss": 2.0}\n')
    (row,) = rows(write_report(tmp_path).markdown.read_text())
    assert row["validation"] == "4.0000 (step 20)"


def test_runs_without_validation_come_last_by_training_loss(tmp_path):
    write_run(tmp_path / "none", None)
    write_run(tmp_path / "nan", {"mean": None})
    write_run(tmp_path / "worst", {"mean": 8.9})
    write_run(tmp_path / "empty", None)
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert [run.name for run in load_runs(tmp_path)] == ["worst", "nan", "none", "empty"]
    write_report(tmp_path)


def test_the_picture_falls_back_to_training_loss(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    write_run(tmp_path / "0", None, optimizer__lr=1e-3)
    write_run(tmp_path / "1", None)
    draw_report(load_runs(tmp_path), tmp_path / "report.png")
    curves, dots = figures[0].axes
    assert curves.get_title("left") == "Training loss"
    assert len(curves.lines) == 2
    assert {tick.get_text() for tick in dots.get_yticklabels()} == {"lr=0.001", "lr=0.0003"}


def test_runs_are_found_at_any_depth_but_not_inside_a_run(tmp_path):
    outer = write_run(tmp_path / "sweep" / "b")
    write_run(outer / "checkpoints" / "copy")
    write_run(tmp_path / "sweep" / "a" / "deep")
    (tmp_path / "sweep" / "not_a_run").mkdir()
    (tmp_path / "sweep" / "not_a_run" / "config.yaml").write_text("x: 1")
    assert list(find_runs(tmp_path)) == [tmp_path / "sweep" / "a" / "deep", outer]
    assert list(find_runs(outer)) == [outer]


def test_a_folder_without_runs_is_one_sentence(tmp_path):
    with pytest.raises(ReportError, match="holds no run: a run is a folder with"):
        write_report(tmp_path)
    with pytest.raises(ReportError, match="is not a folder"):
        write_report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named_and_the_other_runs_are_reported(tmp_path):
    write_run(tmp_path / "good", {"mean": 3.0})
    hurt = write_run(tmp_path / "hurt", {"mean": 4.0}) / "metrics.jsonl"
    hurt.write_text("garbage\n" + hurt.read_text())
    (write_run(tmp_path / "lost", {"mean": 1.0}) / "config.yaml").write_text("model: [")
    told: list[str] = []
    made = write_report(tmp_path, told.append)
    assert [row["run"] for row in rows(made.markdown.read_text())] == ["good", "hurt"]
    metrics, config = told
    assert f"{hurt}, line 1" in metrics
    assert str(tmp_path / "lost") in config


def test_bars_and_stars_in_values_do_not_break_the_markdown_table(tmp_path):
    write_run(tmp_path / "0", {"mean": 3.0}, model__norm="a|b*c")
    write_run(tmp_path / "1", {"mean": 4.0})
    assert "| a\\|b\\*c |" in write_report(tmp_path).markdown.read_text()


def test_medians_and_last_values_of_an_empty_run_are_nan(tmp_path):
    folder = write_run(tmp_path / "0")
    (folder / "metrics.jsonl").write_text("")
    (run,) = load_runs(tmp_path)
    assert all(math.isnan(value) for value in (run.mean_loss, run.train_loss, run.tokens_per_second))
    assert (run.steps, run.tokens, run.finished) == (0, 0, False)
