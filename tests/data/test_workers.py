"""Jobs give their results from any process; one that fails, dies or is left alone takes nothing along unnoticed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.shards import DataError
from data.tokenize import TextTokenizer
from data.workers import run_jobs


@dataclass(frozen=True)
class Task:
    """Does what it is told."""

    action: str
    number: int = 0

    def run(self, tokenizer: TextTokenizer, report: Callable[[int, int], None]) -> Any:
        if self.action == "data error":
            raise DataError("the file is broken.")
        if self.action == "bug":
            raise KeyError("a bug")
        if self.action == "die":
            os._exit(9)
        while self.action == "work on":
            time.sleep(0.05)
            report(1, 1)
        report(self.number, 1)
        return tokenizer.encode([f"text {self.number}"]), os.getpid()


def run(tokenizer: TextTokenizer, jobs: list[Task], processes: int) -> tuple[dict[int, Any], list[tuple[int, int]]]:
    reports: list[tuple[int, int]] = []
    make = functools.partial(TextTokenizer, tokenizer.content, tokenizer.name, tokenizer.eos_token)
    found = run_jobs(jobs, make, processes=processes, threads=1, report=lambda *report: reports.append(report))
    return dict(found), reports


def test_results_and_reports_are_those_of_one_process(tokenizer: TextTokenizer) -> None:
    jobs = [Task("encode", number) for number in range(7)]
    here, reports_here = run(tokenizer, jobs, 1)
    there, reports_there = run(tokenizer, jobs, 2)
    assert {index: ids for index, (ids, _) in here.items()} == {index: ids for index, (ids, _) in there.items()}
    assert sorted(reports_here) == sorted(reports_there)
    assert {pid for _, pid in here.values()} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in there.values()}


@pytest.mark.parametrize(
    ("action", "kind", "sentence"),
    [
        ("data error", DataError, "the file is broken"),
        ("bug", RuntimeError, "KeyError: 'a bug'"),
        (
            "die",
            DataError,
            r"a worker process ended with status 9 \(killed for memory\?\): give the same command again",
        ),
    ],
)
def test_a_failure_is_raised_here_and_ends_the_others(
    tokenizer: TextTokenizer, action: str, kind: type[Exception], sentence: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(kind, match=sentence):
        run(tokenizer, [Task("work on"), Task(action)], 2)
    assert time.monotonic() - begun < 60


ALONE = """
import functools, os, sys
sys.path.insert(0, {root!r})
from data.tokenize import TextTokenizer, load_tokenizer
from data.workers import run_jobs
from tests.data.test_workers import Task
if __name__ == "__main__":
    made = load_tokenizer({tokenizer!r}, None)
    make = functools.partial(TextTokenizer, made.content, made.name, made.eos_token)
    said = []
    def report(read, tokens):
        if not said:
            print(*[p.pid for p in __import__("multiprocessing").active_children()], flush=True)
            said.append(1)
    list(run_jobs([Task("work on"), Task("work on")], make, processes=2, threads=1, report=report))
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    script = tmp_path / "alone.py"
    root = str(Path(__file__).resolve().parents[2])
    script.write_text(ALONE.format(root=root, tokenizer=str(tmp_path / "tokenizer.json")))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(children) == 2
    deadline = time.monotonic() + 30
    while left := [pid for pid in children if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
