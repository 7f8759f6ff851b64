"""scripts/benchmark_loading.py, small: every row is there, and a loop slower than its reader hardly waits."""

import re

from scripts.benchmark_loading import main


def test_both_tables_are_printed_with_shares_of_time(capsys):
    sizes = ["--tokens", "20000", "--sequence-length", "64", "--micro-batch-size", "2", "--steps", "4"]
    assert main([*sizes, "--ranks", "2", "--rate", "1000"]) == 0
    said = capsys.readouterr().out
    for kind in ("windows", "windows, document masks", "packed", "mixture"):
        assert re.search(rf"\| 4 × {kind} \| \d+\.\d\d \| \d+\.\d \|", said)
    shares = [float(share) for share in re.findall(r"\| (\d+\.\d+)% \|", said)]
    assert len(shares) == 2
    assert all(0 <= share < 50 for share in shares)


def test_shards_that_are_not_there_are_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "train does not exist" in capsys.readouterr().err
