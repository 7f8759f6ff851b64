"""The benchmark of the data side runs, and its kill test holds: a killed preparation ends in the same shards."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from data.tokenize import train_tokenizer
from scripts import benchmark_data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name 0.4 MB of text in a C4-format file and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(500)]
    texts = [" ".join(generator.choices(words, k=generator.randint(3, 200))) for _ in range(700)]
    with gzip.open(folder / "a.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:50]])
        file.write("broken\n")
    (folder / "tokenizer.json").write_bytes(train_tokenizer(texts, 600).content)
    return [str(folder / "*.json.gz"), "--tokenizer", str(folder / "tokenizer.json"), "--megabytes", "0.4"]


def test_killed_at_random_moments_the_shards_are_the_same(
    corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark_data.main(["kill", *corpus, "--kills", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 kills at random moments of")
    assert "files identical to those of one left alone" in shown


def test_the_kill_test_fails_when_shards_differ(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(folder: Path, output: Path, *rest) -> list[str]:
        write = f"p = pathlib.Path({str(output)!r}); p.mkdir(); (p / 'a.bin').write_text(p.name)"
        return [sys.executable, "-c", f"import pathlib; {write}"]

    monkeypatch.setattr(benchmark_data, "command", careless)
    with pytest.raises(SystemExit, match=r"after 0 kills these files differ: a\.bin"):
        benchmark_data.main(["kill", *corpus, "--kills", "0"])


def test_throughput_and_memory_are_tables(corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_data.main(["throughput", *corpus, "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    for tool in ("encode_batch", "prepare_data", "datasets.map"):
        assert f"\n| {tool} | " in shown
    assert benchmark_data.main(["memory", *corpus, "--doublings", "1"]) == 0
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [round(float(row[1]), 1) for row in table] == [0.4, 0.8]
    assert all(20 < float(row[2]) < 4000 for row in table)


def test_no_file_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark_data.main(["kill", "/no/such/*", "--tokenizer", "x"])
    assert "no file matches" in capsys.readouterr().err
