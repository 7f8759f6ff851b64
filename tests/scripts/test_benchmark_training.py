"""The training benchmark: rows that run on two small layers, what a failed row leaves, how results become a table."""

import json
import subprocess

import pytest

from scripts import benchmark_training
from scripts.benchmark_training import main
from scripts.estimate_memory import _configs, largest_that_fits
from scripts.training_benchmark import picture, rows, tables
from scripts.training_benchmark.process import StepsFailed, killed_on_error, reason, run_steps

TINY = ["num_layers=2", "hidden_size=32", "num_heads=4", "num_kv_heads=2", "head_dim=8", "intermediate_size=48"]
SET = [f"--set=model.{field}" for field in (*TINY, "vocab_size=null")] + [
    "--set=data.sequence_length=16",
    "--set=training.device=cpu",
]


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


def test_no_other_run_is_written_into(tmp_path):
    with pytest.raises(StepsFailed, match=r"run\.dir=.* cannot be used: the run directory is one of this script's own"):
        run_steps([f"run.dir={tmp_path / 'precious'}"], gpus=1, steps=1, folder=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_measurement_leaves_no_rank():
    launcher = subprocess.Popen(["bash", "-c", "sleep 1000 & echo started; wait"], stdout=subprocess.PIPE)
    assert launcher.stdout.readline() == b"started\n"
    with pytest.raises(KeyboardInterrupt), killed_on_error(launcher):
        raise KeyboardInterrupt
    assert launcher.poll() is not None
    assert launcher.stdout.read() == b"", "the sleep would hold the pipe"


@pytest.mark.slow
def test_a_run_that_stops_early_says_so(shards, tmp_path):
    overrides = [argument.removeprefix("--set=") for argument in SET]
    overrides += [f"data.path={shards}", "model=moda_tiny", "training.device=cpu", "training.stop_at=2"]
    with pytest.raises(StepsFailed, match=r"^error: the run ended after 2 of 5 steps, at step 2: leave away what ends"):
        run_steps(overrides, gpus=1, steps=5, folder=tmp_path / "new")


def test_what_cannot_be_measured_is_one_sentence(shards, tmp_path, capsys):
    for arguments, words in (
        ([], "--data SHARDS and --out DIR are needed"),
        (["--data", str(tmp_path), "--out", str(tmp_path)], "holds no token shards"),
        (["--data", str(shards), "--out", str(tmp_path), "--rows", "moda_7b"], "--rows moda_7b matches none"),
        (["--data", str(shards), "--out", str(tmp_path), "--steps", "2"], "--steps 2 leaves nothing"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_a_cpu_is_taken_only_where_it_is_asked_for(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--data", str(shards), "--out", str(tmp_path / "new"), "--rows", "moda_700m"]) == 2
    assert "A GPU is needed and none is visible" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["--from", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read (No such file or directory)" in capsys.readouterr().err


def test_rows_of_an_earlier_measurement_are_kept(shards, tmp_path, capsys):
    (tmp_path / "training.json").write_text("earlier")
    assert main(["--data", str(shards), "--out", str(tmp_path), "--set=parallel.compile=some"]) == 2
    assert capsys.readouterr().err == (
        f"error: --out {tmp_path} holds the training.json of an earlier measurement: give a new folder, "
        "--from shows both.\n"
    )
    assert (tmp_path / "training.json").read_text() == "earlier"


def test_every_row_has_a_name_of_its_own_and_a_batch_that_its_gpus_can_share():
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)
    for row in rows.ROWS:
        batch = next(int(a.split("=")[1]) for a in row.arguments if a.startswith("training.global_batch_size="))
        assert batch == row.gpus * row.micro_batch_size


def results(day=1, device="GPU", torch="2", **rates):
    row = {"ranks": 1, "micro_batch_size": 8, "sequence_length": 4096, "mfu": 0.5, "mfu_causal": 0.4}
    row |= {"steps": 22, "peak_bytes": 50e9}
    row |= {"estimated_bytes": 49e9, "data_wait_share": 0.001, "start_to_first_step_seconds": 12.0}
    measured = {
        name: row | {"tokens_per_second": rate, "tokens_per_second_per_gpu": rate} for name, rate in rates.items()
    }
    environment = {"device": device, "packages": {"torch": torch}, "python": "3", "time": f"2026-01-{day:02}T00:00:00Z"}
    environment |= {"commit": {"hash": f"{day:02}" + 38 * "a", "modified": day > 20}}
    return {"commands": [f"day {day}"], "environment": environment, "rows": measured, "failures": {}}


def test_a_moda_row_is_divided_by_the_baseline_of_the_same_shape():
    table = tables.render(tables.merge([results(olmo2_700m=100e3, moda_700m=80e3)]))
    assert "| row | GPUs × micro-batch × T | tokens/s | per GPU | MFU, full-square / causal | ÷ OLMo2 |" in table
    assert "| 80.0 k | 80.0 k | 50.0 % / 40.0 % | 0.800 (memory 1.00) | 50.0 GB (49.0 GB) | 0.10 % | 12 s |" in table
    assert table.endswith("| 12 s | 22 | 01aaaaaa |")
    cold = results(olmo2_700m=100e3)
    cold["rows"]["olmo2_700m"]["cold_start_seconds"] = 40.0
    assert "| 40 s / 12 s |" in tables.render(tables.merge([cold]))
    assert "GPU, torch 2, Python 3. 2026-01-01." in table


def test_the_table_is_written_between_its_marks_in_the_documentation(tmp_path, monkeypatch):
    benchmark_training.SECTION.check(benchmark_training.PAGE)  # the real page has the marks
    page = tmp_path / "page.md"
    page.write_text(f"before\n{benchmark_training.SECTION.begin}\nearlier\n{benchmark_training.SECTION.end}\nafter\n")
    monkeypatch.setattr(benchmark_training, "PAGE", page)
    monkeypatch.setattr(benchmark_training, "PICTURE", tmp_path / "rows.png")
    (tmp_path / "training.json").write_text(json.dumps(results(olmo2_700m=100e3)))
    assert main(["--from", str(tmp_path / "training.json"), "--docs"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| `olmo2_700m` |" in text
    assert "![Tokens a second and GPU](images/rows.png)" in text
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert "earlier" not in text


def test_the_picture_shows_the_newest_of_a_row_on_each_device_the_baseline_first(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(picture, "save", lambda figure, path: drawn.append(figure) or path)
    rows = {"moda_700m/2-gpus": 75e3, "moda_700m": 80e3, "olmo2_700m": 100e3}
    parts = [results(1, **rows), results(2, olmo2_700m=90e3, torch="3"), results(3, moda_700m=70e3, device="other GPU")]
    assert picture.draw(tables.merge(parts), tmp_path / "rows.png") == tmp_path / "rows.png"
    other, first = drawn[0].axes
    assert [axes.get_title("left") for axes in (other, first)] == ["other GPU", "GPU"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["olmo2_700m", "moda_700m", "moda_700m/2-gpus"]
    assert [bar.get_width() for bar in first.patches] == [90, 80, 75]
    assert picture.draw([], tmp_path / "rows.png") is None


def test_a_later_result_replaces_an_earlier_one_and_its_failure():
    first = results(olmo2_700m=1.0) | {"failures": {"moda_700m": "out of memory"}}
    for parts in ([first, results(25, moda_700m=2.0, olmo2_700m=3.0)], [results(moda_700m=2.0), first]):
        (merged,) = tables.merge(parts)
        assert merged["rows"]["olmo2_700m"]["tokens_per_second"] == parts[1]["rows"]["olmo2_700m"]["tokens_per_second"]
        assert merged["rows"].keys() == {"moda_700m", "olmo2_700m"}
        assert not merged["failures"]


def test_rows_of_one_machine_from_two_commits_keep_their_own():
    table = tables.render(tables.merge([results(1, olmo2_700m=1e3), results(25, moda_700m=2e3)]))
    assert "    day 1\n    day 25\n" in table
    assert "2026-01-25." in table
    (olmo, moda) = (line for line in table.splitlines() if line.startswith("| `"))
    assert olmo.endswith("| 01aaaaaa |")
    assert moda.endswith("| 25aaaaaa+ |")


def test_another_machine_or_version_has_a_table_of_its_own_and_the_newest_is_first():
    parts = [results(9, "H200", olmo2_700m=2e3), results(3, "H100", olmo2_700m=1e3)]
    parts.append(results(5, "H200", torch="3", moda_700m=3e3))
    table = tables.render(tables.merge(parts))
    lines = [line for line in table.splitlines() if line.startswith(("H", "| `", "    day"))]
    assert [line.split(" |")[0] for line in lines] == [
        "    day 9",
        "H200, torch 2, Python 3. 2026-01-09.",
        "| `olmo2_700m`",
        "    day 5",
        "H200, torch 3, Python 3. 2026-01-05.",
        "| `moda_700m`",
        "    day 3",
        "H100, torch 2, Python 3. 2026-01-03.",
        "| `olmo2_700m`",
    ]
    assert "3.0 k |" in lines[5]
    assert lines[5].split(" | ")[5] == ""  # no ratio to a row of another version


def test_a_failure_on_a_machine_without_results_stays_until_some_machine_has_one():
    failed = {"commands": ["x"], "environment": {}, "rows": {}, "failures": {"moda_700m": "out of memory"}}
    (alone,) = tables.merge([failed])
    assert "No row has a result.\n\n- `moda_700m`: out of memory" in tables.render([alone])
    assert [len(group["failures"]) for group in tables.merge([failed, results(olmo2_700m=1.0)])] == [0, 1]
    assert [len(group["failures"]) for group in tables.merge([failed, results(moda_700m=1.0)])] == [0]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"commands": [], "environment": {}, "rows": {"x": {}}, "failures": {}}']
)
def test_a_file_without_results_is_named(content, tmp_path, capsys):
    (tmp_path / "training.json").write_text(content)
    assert main(["--from", str(tmp_path / "training.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --from {tmp_path}/training.json holds no results of this benchmark (")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_largest_micro_batches_lie_around_what_the_estimate_finds_for_141_gb():
    for model, kind, overrides, sizes in rows.LARGEST:
        batch = ["training.micro_batch_size=8", "training.global_batch_size=8", "data.sequence_length=4096"]
        (config,) = _configs([f"model={model}", *batch, *overrides], 1).values()
        found = largest_that_fits(config, 1, config.parallel.activation_checkpointing, 141e9)
        assert min(sizes) <= found <= max(sizes), f"{model}{kind}"


def test_the_reason_of_a_failure_is_the_line_that_says_it():
    assert reason("a\ntorch.OutOfMemoryError: CUDA out of memory.\nValueError: later", 1).startswith("torch.OutOf")
    assert reason("x\nerror: model.norm=y cannot be used\nz", 2) == "error: model.norm=y cannot be used"
    assert reason("error: prepare it with\n  python a.py\n  b", 2) == "error: prepare it with python a.py"
    assert reason("error: CUDA out of memory: " + 400 * "x", 1) == "error: CUDA out of memory: " + 400 * "x"
    launched = "[rank0]: RuntimeError: why\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nFAILED"
    assert reason(launched, 1) == "[rank0]: RuntimeError: why"
    assert reason("", 9) == "exit status 9"
