"""The parity tool on real runs: what changes nothing is within rounding, what changes the run is found."""

import json
import math

import pytest

from scripts import compare_runs
from scripts.compare_runs import common, largest, main, table
from scripts.training_benchmark.process import QUIET, StepsFailed
from training.compose import plan

TINY = ["num_layers=2", "hidden_size=32", "num_heads=4", "num_kv_heads=2", "head_dim=8", "intermediate_size=48"]
BOTH = ["model=moda_tiny", *(f"model.{field}" for field in TINY), "data.sequence_length=16"]
BOTH += ["training.global_batch_size=4", "training.micro_batch_size=2", "training.device=cpu"]


@pytest.mark.slow
def test_checkpointing_and_two_ranks_change_nothing_and_the_command_says_so(shards, capsys):
    difference = ["--b", "parallel.activation_checkpointing=selective", "--gpus-b", "2"]
    assert main(["--data", str(shards), "--steps", "4", "--tolerance", "1e-5", *difference, *BOTH]) == 0
    shown = capsys.readouterr().out
    assert "within the tolerances of 1e-05 and 0.05 over 4 of 4 steps" in shown
    assert "| 4 | " in shown


@pytest.mark.slow
def test_another_learning_rate_is_found(shards, capsys):
    arguments = ["--steps", "2", "--tolerance", "1e-5", "--b", "optimizer.lr=0.5", "--b", "schedule.warmup_steps=1"]
    assert main(["--data", str(shards), *arguments, *BOTH]) == 1
    assert "ABOVE the tolerances" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("difference", "status"), [([], 0), (["--b", "model.depth_recent_layers=1"], 1)])
def test_depth_that_is_left_out_is_found_by_the_gradient_norm_alone(shards, difference, status):
    arguments = [
        "--steps",
        "12",
        "--tolerance",
        "1",
        *difference,
        *BOTH,
        "model.num_layers=4",
        "parallel.compile=false",
    ]
    assert main(["--data", str(shards), *arguments]) == status


def records(*losses, every=1):
    values = [{"step": step, "train/loss": loss, "train/grad_norm": 1.0} for step, loss in enumerate(losses, start=1)]
    return [record for record in values if record["step"] % every == 0]


def test_a_value_that_is_no_number_is_the_largest_difference():
    a, b = records(3.0, 2.0), records(3.5, math.nan)
    assert largest(common(a, b), "train/loss") == (math.inf, 2)
    assert largest(common(a, a), "train/loss")[0] == 0


def test_gradient_norms_differ_by_a_part_of_themselves():
    a, b = records(3.0, 2.0), records(3.0, 2.0)
    b[1]["train/grad_norm"] = 1.25
    assert largest(common(a, b), "train/grad_norm", relative=True) == (0.2, 2)
    a[1]["train/grad_norm"] = b[1]["train/grad_norm"] = 0.0
    assert largest(common(a, b), "train/grad_norm", relative=True)[0] == 0
    a[1]["train/grad_norm"] = b[1]["train/grad_norm"] = math.inf
    assert largest(common(a, b), "train/grad_norm", relative=True)[0] == math.inf


@pytest.mark.parametrize(("given", "warmup"), [([], 10), (["schedule.warmup_steps=30"], 30), (["--steps", "4"], 2)])
def test_the_learning_rate_is_at_its_peak_early_unless_a_warm_up_is_given(shards, monkeypatch, given, warmup):
    seen = []

    def run_steps(overrides, **_):
        seen.append(plan([*QUIET, *overrides]).jobs[0].config.schedule.warmup_steps)
        raise StepsFailed("seen", "")

    monkeypatch.setattr(compare_runs, "run_steps", run_steps)
    assert main(["--data", str(shards), *BOTH, *given]) == 2
    assert seen == [warmup]


def test_steps_that_both_have_recorded_are_compared_and_evaluations_left_out():
    a, b = (
        [{"step": 0, "validation/mean/loss": 4.0}, *records(3.0, 2.0, 1.0, 0.5)],
        records(9.0, 2.5, 9.0, 0.5, every=2),
    )
    assert [(x["step"], y["step"]) for x, y in common(a, b)] == [(2, 2), (4, 4)]
    assert largest(common(a, b), "train/loss") == (0.5, 2)


def test_the_table_shows_some_ten_steps_and_the_last():
    pairs = common(records(*[1.0] * 47), records(*[1.0] * 47))
    assert [line.split()[1] for line in table(pairs).splitlines()[2:]] == [str(s) for s in (*range(4, 47, 4), 47)]


def test_runs_without_a_common_record_are_no_comparison_and_overrides_may_follow_options(
    shards, tmp_path, monkeypatch, capsys
):
    given = []

    def run_steps(overrides, *, gpus, steps, folder, timeout):
        given.append(overrides)
        (folder / "run").mkdir(parents=True)
        lines = [json.dumps(record) + "\n" for record in records(3.0, every=1 if folder.name == "a" else 2)]
        (folder / "run" / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(compare_runs, "run_steps", run_steps)
    assert main(["--data", str(shards), "--steps", "1", "--b", "logging.every=2", *BOTH]) == 2
    assert capsys.readouterr().err == (
        "error: no step has a record in both runs: leave logging.every=1, or use more --steps.\n"
    )
    assert [overrides[4:] for overrides in given] == [BOTH, [*BOTH, "logging.every=2"]]


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ([], 16),
        (["training.micro_batch_size=3"], 6),
        (["training.global_batch_size=32"], 32),
        (["--a", "training.global_batch_size=32", "--b", "training.global_batch_size=32"], 32),
    ],
)
def test_a_step_is_one_micro_batch_on_each_gpu_unless_it_is_given(shards, monkeypatch, given, size):
    seen = []

    def run_steps(overrides, *, gpus, steps, folder, timeout):
        training = plan([*QUIET, *overrides]).jobs[0].config.training
        seen.append((training.global_batch_size, gpus, timeout))
        raise StepsFailed("seen", "") if gpus == 2 else StopIteration

    monkeypatch.setattr(compare_runs, "run_steps", run_steps)
    arguments = ["--data", str(shards), "model=moda_700m", "training.device=cpu", "--timeout", "7"]
    arguments += ["data.sequence_length=16", "parallel.compile=false"]
    assert main([*arguments, "--gpus-a", "2", *given]) == 2
    with pytest.raises(StopIteration):
        main([*arguments, "--gpus-b", "2", *given])
    assert seen == [(size, 2, 7), (size, 1, 7)]


def test_a_run_that_takes_too_long_says_which_option_gives_it_more(shards, capsys):
    assert main(["--data", str(shards), "--timeout", "0.01", "--steps", "3", *BOTH]) == 2
    assert capsys.readouterr().err == (
        "error: run a failed: not done within 0.01 s: give it more than --timeout 0.01, or fewer --steps than 3.\n"
    )
    for timeout in ("0", "nan", "inf"):
        assert main(["--data", str(shards), "--timeout", timeout, *BOTH]) == 2
        assert f"error: --timeout {timeout} cannot be used" in capsys.readouterr().err


def test_without_a_gpu_a_model_is_refused_unless_the_cpu_is_asked_for(shards, monkeypatch, capsys):
    monkeypatch.setattr(compare_runs, "run_steps", lambda *_, **__: pytest.fail("a run has begun"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--data", str(shards), "--b", "parallel.compile=false", "model=moda_700m"]) == 2
    assert capsys.readouterr().err == (
        "error: run a: A GPU is needed and none is visible: training.device=cpu takes a CPU, for small models.\n"
    )


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["--b", "model.norm=foo"], "model.norm=foo cannot be used"),
        (["--b", "training.steps=3"], "training.steps=3 ends the run before --steps 50 are recorded: use training.s"),
        (["--b", "training.stop_at=50"], "training.stop_at=50 ends the run before --steps 50 are recorded"),
        (["--gpus-b", "3"], "training.global_batch_size=4 is not divisible by"),
        (["--b", "run.dir=elsewhere"], "run.dir=elsewhere cannot be used"),
        (["--b", "checkpoint.resume=runs/first"], "checkpoint.resume=runs/first cannot be used: steps begin with new"),
        (["--b", "parallel.attention_backend=joined"], "parallel.attention_backend=joined cannot be used"),
    ],
)
def test_a_mistake_in_the_second_run_is_found_before_the_first_begins(shards, monkeypatch, capsys, mistake, said):
    monkeypatch.setattr(compare_runs, "run_steps", lambda *_, **__: pytest.fail("a run has begun"))
    assert main(["--data", str(shards), *BOTH, *mistake]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: run b: {said}")
    assert len(error.splitlines()) == 1


def test_a_run_that_fails_is_named(shards, tmp_path, capsys):
    assert main(["--data", str(shards), "--steps", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err
    for tolerance in ("-1", "nan"):
        assert main(["--data", str(shards), "--tolerance", tolerance, *BOTH]) == 2
        assert f"error: --tolerance {tolerance} cannot be used" in capsys.readouterr().err
        assert main(["--data", str(shards), "--norm-tolerance", tolerance, *BOTH]) == 2
        assert f"error: --norm-tolerance {tolerance} cannot be used" in capsys.readouterr().err
    assert main(["--data", str(tmp_path / "nowhere"), "--steps", "1", *BOTH]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run a: data.path=")
    sentence, command = error.splitlines()
    assert sentence.endswith("or prepare it with")
    assert command.startswith("  python scripts/prepare_data.py")
    assert main(["--data", str(tmp_path), *BOTH, "--b", "paralel.compile=false"]) == 2
    assert capsys.readouterr().err == "error: run b: unknown key `paralel`: did you mean `parallel`?\n", (
        "and no run before"
    )
