"""The progress bar of every step of a preparation: speed and time left, on a terminal and in a log file.

In: the size of the work. Out: a `tqdm` bar.
"""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(label: str, total: int | None, unit: str) -> tqdm:
    """A bar named `label` over `total` units (None: unknown); live on a terminal, a line now and then in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(desc=label, total=total, unit=unit, unit_scale=True, mininterval=interval, dynamic_ncols=True)
