"""An end on request: SIGTERM, SIGINT or SIGUSR1 (a scheduler's warning) end a command with one sentence.

In: signals. Out: `Interrupted` in the main thread, wherever it is, and 128 + the signal's number as exit status. Work
that can be killed at any moment needs nothing more; processes that it has started do not get these signals.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RELAY_SECONDS = 1.0  # so soon after the first, another signal is the same request, passed on by a launcher


class Interrupted(BaseException):
    """A signal came. No `Exception`: whoever handles errors of reading or writing does not handle this."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} came")
        self.status = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first signal raise `Interrupted`; one more, `RELAY_SECONDS` later, ends the process at once."""
    first: float | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise Interrupted(number)
        if time.monotonic() - first > RELAY_SECONDS:
            os._exit(128 + number)

    previous = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Keep the signals waiting. A process that is started inside does not get them, from its first moment on."""
    resource_tracker.ensure_running()  # else the first process starts it, which unblocks signals
    waiting: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # another thread may be told, and this one calls handlers
        handlers = {number: signal.signal(number, lambda got, frame: waiting.append(got)) for number in SIGNALS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
