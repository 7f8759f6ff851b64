"""scripts/benchmark_waits.py on a GPU: a whole measurement of a tiny model."""

import re

from scripts.benchmark_waits import main

MODEL = ["num_layers=2", "hidden_size=64", "num_heads=2", "num_kv_heads=1", "head_dim=32", "intermediate_size=128"]
SIZES = ["data.sequence_length=64", "training.micro_batch_size=2", "training.global_batch_size=2"]


def test_every_cause_is_seen_as_often_as_the_run_has_it(shards, tmp_path, capsys):
    model = ["model=moda_tiny", "model.vocab_size=null", *(f"model.{field}" for field in MODEL)]
    assert main(["--data", str(shards), "--out", str(tmp_path / "out"), *model, *SIZES]) == 0
    said = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\w[\w ]*) \| (\d+) \|", said, re.MULTILINE))
    assert rows == {"evaluation": "2", "checkpoint": "1", "metrics": "9", "data": "90", "within steps": "90"}
    assert re.search(r"\| metrics \| 9 \| \d*[1-9]", said)
    assert (tmp_path / "out" / "waits.json").is_file()
