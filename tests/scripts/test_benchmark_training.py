"""The training benchmark: rows that run on two small layers, what a failed row leaves, how results become a table."""

import json

import pytest

from scripts import benchmark_training
from scripts.benchmark_training import main, merge
from scripts.training_benchmark import rows, tables
from scripts.training_benchmark.process import reason

TINY = ["num_layers=2", "hidden_size=32", "num_heads=4", "num_kv_heads=2", "head_dim=8", "intermediate_size=48"]
SET = [f"--set=model.{field}" for field in (*TINY, "vocab_size=null")] + ["--set=data.sequence_length=16"]


@pytest.mark.slow
def test_a_row_is_measured_and_one_that_fails_says_why_without_losing_the_other(shards, tmp_path, capsys, monkeypatch):
    broken = rows.Row("broken", "olmo2_700m", 8, overrides=("parallel.activation_checkpointing=some",))
    monkeypatch.setattr(rows, "ROWS", [broken, rows.Row("moda_700m", "moda_700m", 2)])
    status = main(["--data", str(shards), "--out", str(tmp_path), "--rows", "*", "--steps", "5", "--profile", *SET])
    assert status == 1
    assert (tmp_path / "moda_700m.json.gz").stat().st_size > 1000
    results = json.loads((tmp_path / "training.json").read_text())
    row = results["rows"]["moda_700m"]
    assert row["steps"] == 3
    assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["step_seconds"])
    assert row["start_to_first_step_seconds"] > 0
    assert 0 <= row["data_wait_share"] < 1
    assert "parallel.activation_checkpointing=some cannot be used" in results["failures"]["broken"]
    assert (tmp_path / "broken.log").is_file()
    capsys.readouterr()
    assert main(["--from", str(tmp_path / "training.json")]) == 1
    shown = capsys.readouterr().out
    assert "| `moda_700m` | 1 × 2 × 16 |" in shown
    assert "- `broken`: " in shown


def test_what_cannot_be_measured_is_one_sentence(shards, tmp_path, capsys):
    for arguments, words in (
        ([], "--data SHARDS and --out DIR are needed"),
        (["--data", str(tmp_path), "--out", str(tmp_path)], "holds no token shards"),
        (["--data", str(shards), "--out", str(tmp_path), "--rows", "moda_7b"], "--rows moda_7b matches none"),
        (["--data", str(shards), "--out", str(tmp_path), "--steps", "2"], "--steps 2 leaves nothing"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_every_row_has_a_name_of_its_own_and_a_batch_that_its_gpus_can_share():
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)
    for row in rows.ROWS:
        batch = next(int(a.split("=")[1]) for a in row.arguments if a.startswith("training.global_batch_size="))
        assert batch == row.gpus * row.micro_batch_size


def results(**rates):
    row = {"ranks": 1, "micro_batch_size": 8, "sequence_length": 4096, "mfu": 0.5, "peak_bytes": 50e9}
    row |= {"estimated_bytes": 49e9, "data_wait_share": 0.001, "start_to_first_step_seconds": 12.0}
    measured = {
        name: row | {"tokens_per_second": rate, "tokens_per_second_per_gpu": rate} for name, rate in rates.items()
    }
    environment = {"device": "GPU", "packages": {"torch": "2"}, "python": "3", "time": "2026-01-01T00:00:00Z"}
    return {"commands": ["x"], "environment": environment, "rows": measured, "failures": {}}


def test_a_moda_row_is_divided_by_the_baseline_of_the_same_shape():
    table = tables.render(results(olmo2_700m=100e3, moda_700m=80e3))
    assert "| 80.0 k | 80.0 k | 50.0 % | 0.800 (memory 1.00) | 50.0 GB (49.0 GB) | 0.10 % |" in table


def test_the_table_is_written_between_its_marks_in_the_documentation(tmp_path, monkeypatch):
    benchmark_training.SECTION.check(benchmark_training.PAGE)  # the real page has the marks
    page = tmp_path / "page.md"
    page.write_text(f"before\n{benchmark_training.SECTION.begin}\nearlier\n{benchmark_training.SECTION.end}\nafter\n")
    monkeypatch.setattr(benchmark_training, "PAGE", page)
    (tmp_path / "training.json").write_text(json.dumps(results(olmo2_700m=100e3)))
    assert main(["--from", str(tmp_path / "training.json"), "--docs"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| `olmo2_700m` |" in text
    assert "earlier" not in text


def test_a_later_result_replaces_an_earlier_one_and_its_failure():
    first = results(olmo2_700m=1.0) | {"failures": {"moda_700m": "out of memory"}}
    merged = merge([first, results(moda_700m=2.0, olmo2_700m=3.0)])
    assert merged["rows"]["olmo2_700m"]["tokens_per_second"] == 3.0
    assert not merged["failures"]
    assert merge([results(moda_700m=2.0), first])["failures"] == {}


def test_the_reason_of_a_failure_is_the_line_that_says_it():
    assert reason("a\ntorch.OutOfMemoryError: CUDA out of memory.\nValueError: later", 1).startswith("torch.OutOf")
    assert reason("x\nerror: model.norm=y cannot be used\nz", 2) == "error: model.norm=y cannot be used"
    launched = "[rank0]: RuntimeError: why\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nFAILED"
    assert reason(launched, 1) == "[rank0]: RuntimeError: why"
    assert reason("", 9) == "exit status 9"
