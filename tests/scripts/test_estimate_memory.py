"""The memory estimate of a configuration: what it says of the paper's models, and what it refuses."""

import pytest

from scripts.estimate_memory import USABLE, _configs, largest_that_fits, main, on_gpu, sized

PLAIN = "parallel.compile=false"


@pytest.mark.parametrize("batch", [16, 1024])  # one micro-batch a step, and several
def test_the_largest_micro_batch_fits_and_one_more_does_not(batch):
    arguments = ["model=moda_700m", PLAIN, "training.micro_batch_size=8", f"training.global_batch_size={batch}"]
    (config,) = _configs(arguments, 2).values()
    largest = largest_that_fits(config, 2, "full", 60e9)
    assert largest > 8
    assert on_gpu(sized(config, 2, largest), 2, "full").total <= 1.02 * USABLE * 60e9
    assert on_gpu(sized(config, 2, largest + 1), 2, "full").total > USABLE * 60e9
    assert largest_that_fits(config, 2, "none", 5e9) == 0


@pytest.mark.parametrize(("kind", "capacity"), [("none", 1.5e9), ("full", 2e9)])
def test_short_instances_of_which_few_fit_a_chunk_of_the_loss_are_counted_too(kind, capacity):
    (config,) = _configs(["model=moda_tiny", "model.vocab_size=50304", "data.sequence_length=256"], 1).values()
    largest = largest_that_fits(config, 1, kind, capacity)
    held = [on_gpu(sized(config, 1, size), 1, kind).total / (USABLE * capacity) for size in (largest, largest + 1)]
    assert held[0] <= 1.001
    assert held[1] > 0.999


def test_a_configuration_that_fits_and_one_that_does_not(capsys):
    small = ["model=olmo2_tiny", "model.vocab_size=4096", "run.dir=runs/x"]  # as for train.py
    assert main([*small, "--device-gb", "80", PLAIN]) == 0  # overrides may follow options
    shown = capsys.readouterr().out
    assert "This fits 80 GB" in shown
    assert "| selective |" in shown
    assert main([*small, PLAIN, "--device-gb", "0.01"]) == 1
    assert "This does not fit" in capsys.readouterr().out


def test_an_evaluation_that_takes_more_at_a_time_than_training_is_named(capsys):
    arguments = ["model=olmo2_tiny", "model.vocab_size=4096", PLAIN, "training.micro_batch_size=2", "--device-gb", "80"]
    for size, warned in (("64", True), ("2", False), ("null", False)):
        assert main([*arguments, f"evaluation.micro_batch_size={size}"]) == 0
        assert ("evaluation.micro_batch_size=64 is more than training takes" in capsys.readouterr().out) == warned


def test_the_runs_of_a_sweep_are_rows(capsys):
    swept = ["-m", "model=olmo2_tiny", "model.vocab_size=4096", "training.micro_batch_size=1,16", PLAIN]
    assert main([*swept, "--device-gb", "80"]) == 0
    title, _, small, large = capsys.readouterr().out.splitlines()
    assert "fits 80 GB" in title
    assert small.startswith("| training.micro_batch_size=1 |")
    assert large.startswith("| training.micro_batch_size=16 |")
    assert [row.split("|")[-2] for row in (small, large)] == [" yes ", " yes "]
    small, large = (float(row.split("|")[3].removesuffix(" GB ")) for row in (small, large))
    assert main([*swept, "--device-gb", str((small + large) / 2)]) == 1
    assert [row.split("|")[-2] for row in capsys.readouterr().out.splitlines()[2:]] == [" yes ", " no "]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=moda_7m", "--device-gb", "80"], "did you mean model=moda_700m"),
        (["model=moda_tiny", "--device-gb", "80"], "model.vocab_size=null is known with the data only"),
        (["model=moda_700m", "--device-gb", "0"], "--device-gb 0 cannot be used"),
        (["model=moda_700m", "--device-gb", "inf"], "--device-gb inf cannot be used"),
        (["model=moda_700m", "--device-gb", "80", "--gpus", "0"], "--gpus 0 cannot be used"),
        (["model=moda_700m", "--device-gb", "80", "--gpus", "3"], "is not divisible by"),
        (["model=moda_700m,olmo2_700m", "--device-gb", "80"], "holds several values: add -m"),
        (["-m", "training.micro_batch_size=0,8", "--device-gb", "80"], "training.micro_batch_size=0: "),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_mistakes_are_told_before_a_device_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["model=moda_7m"]) == 2
    assert "moda_7m" in capsys.readouterr().err
    assert main(["model=moda_700m"]) == 2
    assert capsys.readouterr().err.startswith("error: --device-gb is needed")
