"""How a script ends: quietly where what reads its output has gone, as `head` does, or where Ctrl-C was pressed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that `main` returns; 141 for a reader that has gone, 130 for Ctrl-C, as shells have it.

    A `main` that catches OSError leaves BrokenPipeError to this.
    """
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
