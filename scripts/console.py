"""How a script ends: quietly where what reads its output has gone, as `head` does, or at Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that `main` returns; 141 for a reader that has gone, 130 for Ctrl-C, as shells have it.

    SIGTERM (143) ends `main` as an exception does: what it has started ends, and its temporary folders go. A `main`
    that catches OSError leaves BrokenPipeError to this.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        status = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
