"""Signals that end a run early: SIGTERM, SIGINT, SIGUSR1 (a scheduler's warning) ask for a checkpoint and a stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """What was asked for: `signal` is None until one of the signals has come."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first signal instead of ending the process; a second SIGINT (Ctrl-C) ends it at once.

    Other repeats mean nothing: a scheduler's SIGTERM comes to a rank directly and once more through its launcher.
    """
    request = StopRequest()
    interrupts = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts == 2:
            raise KeyboardInterrupt
        request.signal = request.signal or signal.Signals(number)

    previous = {name: signal.getsignal(name) for name in SIGNALS}
    for name in SIGNALS:
        signal.signal(name, note)
    try:
        yield request
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
