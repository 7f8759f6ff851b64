"""A signal interrupts the main thread once, and waits while a process is started, whatever thread is told of it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from data.interruption import SIGNALS, Interrupted, interruptible, signals_blocked


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_an_exception_with_the_exit_status_of_its_number(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} came") as interrupted, interruptible():
        os.kill(os.getpid(), number)
    assert interrupted.value.status == 128 + number
    assert signal.getsignal(number) is before


def test_the_same_request_passed_on_by_a_launcher_does_not_interrupt_the_end() -> None:
    ended = False

    def work() -> None:
        nonlocal ended
        with interruptible():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                ended = True

    with pytest.raises(Interrupted, match="SIGINT"):
        work()
    assert ended


def test_a_signal_that_another_thread_is_told_of_waits_too() -> None:
    started, done = False, threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()

    def start() -> None:
        nonlocal started
        with interruptible(), signals_blocked():
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # a handler would be called between any two of these
                pass
            started = True

    try:
        with pytest.raises(Interrupted, match="SIGTERM"):
            start()
    finally:
        done.set()
        other.join()
    assert started
