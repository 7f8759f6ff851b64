"""Signals that end a run early: SIGTERM, SIGINT, SIGUSR1 (a scheduler's warning) ask for a checkpoint and a stop.

The second one ends the process at once, with 128 + its number, whatever the main thread is doing: a thread is told of
signals by the system's handler, where Python's own waits for a call such as a collective to return.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RELAY_SECONDS = 1.0  # a launcher passes on what its ranks have got already: so soon after, it is the same request


class StopRequest:
    """What was asked for: `signal` is None until one of the signals has come."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first signal instead of ending the process; a second one, after `RELAY_SECONDS`, ends it at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = {name: signal.getsignal(name) for name in SIGNALS}
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_on_second, args=(reader, request), name="signals", daemon=True)
    thread.start()
    for name in SIGNALS:
        signal.signal(name, note)
    try:
        yield request
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(previous_writer)
        os.close(writer)  # ends the thread
        thread.join()
        os.close(reader)


def _end_on_second(reader: int, request: StopRequest) -> None:
    first: float | None = None
    while received := os.read(reader, 1):
        number = received[0]
        if number not in SIGNALS:
            continue
        request.signal = request.signal or signal.Signals(number)
        first = first or time.monotonic()
        if time.monotonic() - first > RELAY_SECONDS:
            text = f"{signal.Signals(number).name} came again: ending at once, without a checkpoint\n"
            with suppress(OSError):  # standard error may go to a full disk
                os.write(2, text.encode())
            os._exit(128 + number)
