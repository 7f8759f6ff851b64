"""When a save begins, and when training waits for one, so that a kill never loses more than `checkpoint.every` steps.

In: the steps that are done, and how many the writes have taken. Out: whether a save is due, and whether no further step
may be done before the one under way is written. A checkpoint that is written beside training counts once it is whole:
its save begins some steps ahead of the bound, as many as the slowest of the last few writes has taken. No tensors and
no clock: all ranks give the same numbers, and so come to the same answers.
"""

from __future__ import annotations

import math
from collections import deque

PARTS = 10  # of `checkpoint.every`: a save begins whole parts ahead of the bound
MOST_PARTS = 5
RECENT = 4  # writes that are learnt from: one slow write of a busy disk is forgotten after so many quick ones


class SaveSchedule:
    """The saves of one start of a run."""

    def __init__(self, every: int, permanent_every: int | None, *, asynchronous: bool) -> None:
        """`every`: most steps that may be lost. `permanent_every`: steps between saves at its multiples, if any."""
        self.every = every
        self.asynchronous = asynchronous  # false: training waits for each write, and saves come at multiples of `every`
        self.begun = 0  # step of the newest checkpoint that was begun or loaded
        self._permanent_every = permanent_every
        self._part = every // PARTS
        self._leads = deque([self._part], maxlen=RECENT)  # that the last writes have needed
        self._warned = False
        self._failures = 0  # writes in a row that came to nothing
        self._again_from: int | None = None  # step from which the last of them is tried again

    @property
    def lead(self) -> int:
        """Steps that a write has before training waits for it."""
        return max(self._leads) if self.asynchronous else 0

    def is_due(self, step: int) -> bool:
        """Whether a save is to begin when `step` steps are done."""
        if self.tries_again(step) or (self._permanent_every is not None and step % self._permanent_every == 0):
            return True
        if not self.asynchronous:
            return step % self.every == 0
        return step - self.begun >= self.every - self.lead

    def begins(self, step: int) -> None:
        """The save of `step` begins."""
        self.begun, self._again_from = step, None

    def ended(self, step: int, *, whole: bool) -> None:
        """The write of `step` has ended. One that failed is tried again at once, then after a part, two, four, ..."""
        self._failures = 0 if whole else self._failures + 1
        if not whole:
            wait = 0 if self._failures == 1 else max(1, self._part) << self._failures - 2
            self._again_from = step + min(wait, self.every)

    def tries_again(self, step: int) -> bool:
        """Whether a save is due because the one before has failed."""
        return self._again_from is not None and step >= self._again_from

    def is_at_bound(self, step: int, written: int) -> bool:
        """Whether a kill in the next step could lose more than `every`: `written` is the newest whole checkpoint's."""
        return step - written >= self.every

    def learn(self, steps: int) -> str | None:
        """A write has taken `steps` steps (0: not known). Returns a sentence where that is too many, once."""
        if not self._part or not steps:
            return None
        parts = math.ceil(steps / self._part)
        if parts <= PARTS:  # a longer write than `every` is waited for no less where it begins earlier
            self._leads.append(min(parts, MOST_PARTS) * self._part)
        if parts <= MOST_PARTS or self._warned:
            return None
        self._warned = True
        enough = math.ceil(steps / MOST_PARTS) * PARTS
        return (
            f"warning: a checkpoint takes {steps:,} steps to be written, and checkpoint.every={self.every} leaves at "
            f"most {MOST_PARTS * self._part:,}: training waits for the rest of each; it would not with "
            f"checkpoint.every={enough} or more"
        )


def steps_of_write(write: float, steps: int, seconds: float) -> int:
    """Steps that a write of `write` seconds takes where `steps` steps take `seconds`, and one more; 0: not known.

    One more, as no two writes take the same time.
    """
    return math.ceil(write * steps / seconds) + 1 if steps and seconds > 0 else 0
