"""training/signals.py in a process of its own: one signal asks, the second ends at once, even a main thread in C."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys, time, ctypes
from training.signals import stop_on_signals
with stop_on_signals() as stop:
    print("ready", flush=True)
    {wait}
print(stop.signal.name, flush=True)
"""
LOOP = "while stop.signal is None: time.sleep(0.01)\n    time.sleep(1.5)"
# A lock that is taken twice: no Python runs in the main thread from here on.
IN_C = "mutex = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"


def start(wait, stderr=subprocess.PIPE):
    code = CODE.format(wait=wait)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=stderr, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_one_signal_and_its_relay_ask_and_end_nothing(name):
    process = start(LOOP)
    for _ in range(3):  # a scheduler's, and the launcher's
        process.send_signal(signal.Signals[name])
        time.sleep(0.05)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, f"{name}\n", "")


@pytest.mark.parametrize("wait", [LOOP.replace("1.5", "60"), IN_C], ids=["python", "c"])
def test_the_second_signal_ends_at_once(wait):
    process = start(wait)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM came again: ending at once" in err


def test_the_second_signal_ends_at_once_where_its_message_finds_no_room():
    with open("/dev/full", "w") as full:
        process = start(IN_C, stderr=full)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
