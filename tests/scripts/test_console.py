"""How scripts end: scripts/console.py."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import benchmark_checkpoints, benchmark_training, benchmark_waits
from scripts.console import run

SCRIPTS = sorted(
    path
    for path in Path(__file__).resolve().parents[2].glob("scripts/*.py")
    if "__main__" in path.read_text(encoding="utf-8") and path.stem != "prepare_data"  # which `interruptible` ends
)

# A shell's background jobs ignore Ctrl-C, and what they start does too: what is tested is what comes of it elsewhere.
ENDLESS = """
import signal
from scripts.console import run

signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    while True:
        print("line", flush=True)

run(main)
"""


def test_the_status_is_that_of_main():
    for status in (0, 2):
        with pytest.raises(SystemExit) as ended:
            run(lambda status=status: status)
        assert ended.value.code == status


def test_a_reader_that_has_gone_ends_it_quietly():
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_ctrl_c_is_a_word_and_no_traceback():
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said == b"interrupted\n"
    assert process.returncode == 130


def test_sigterm_unwinds_so_that_what_was_started_ends(tmp_path):
    code = f"""
import contextlib, pathlib, time
from scripts.console import run

@contextlib.contextmanager
def started():
    try:
        yield
    finally:
        pathlib.Path({str(tmp_path / "ended")!r}).touch()

def main():
    with started():
        print("line", flush=True)
        time.sleep(60)

run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.terminate()
    _, said = process.communicate(timeout=50)
    assert (process.returncode, said) == (143, b"")
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_ends_this_way(path):
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.If)
    assert [ast.unparse(statement).removeprefix("console.") for statement in last.body] == ["run(main)"]


@pytest.mark.parametrize("script", [benchmark_checkpoints, benchmark_training, benchmark_waits])
def test_a_benchmark_that_says_why_a_file_fails_leaves_a_reader_that_has_gone_to_this(script, tmp_path, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(script, "measure" if script is benchmark_waits else "run", gone)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(BrokenPipeError):
        script.main(["--data", str(tmp_path), "--out", str(tmp_path)])
