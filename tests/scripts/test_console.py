"""How scripts end: scripts/console.py."""

import os
import signal
import subprocess
import sys

import pytest

from scripts.console import run

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
