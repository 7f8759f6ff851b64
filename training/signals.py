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
    """Note the first signal instead of ending the process; a second one acts as it did before."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()

    def restore() -> None:
        for name, handler in previous.items():
            signal.signal(name, handler)

    previous = {name: signal.getsignal(name) for name in SIGNALS}
    for name in SIGNALS:
        signal.signal(name, note)
    try:
        yield request
    finally:
        restore()
