"""scripts/fault_test.py: faults in whole runs of their own; the long form is for a person's eyes."""

import json

import pytest

from scripts import fault_test


@pytest.mark.slow
def test_random_kills_and_a_full_disk_lose_no_bit(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    assert fault_test.main(["--only", "killed", "--kills", "3", "--json", str(rows)]) == 0, capsys.readouterr().out
    assert fault_test.main(["--only", "disk"]) == 0, capsys.readouterr().out
    assert [(row["times"], row["passed"]) for row in json.loads(rows.read_text())] == [(3, True), (2, True)]


def test_a_fault_that_nobody_knows_is_no_success(monkeypatch):
    monkeypatch.setattr(fault_test, "Bench", lambda folder: None)
    assert fault_test.main(["--only", "earthquake"]) == 1
