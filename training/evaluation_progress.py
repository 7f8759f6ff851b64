"""How far an evaluation is: a line now and then, for those that take long.

In: instances, as they are done. Out: "evaluation at step 0: 96 of 512 instances | 3.4 k tok/s | 2 min 01 s left".
"""

from __future__ import annotations

from collections.abc import Callable

from training.metrics import TrainingClock, format_count, format_duration

INTERVAL = 10.0  # seconds between two lines


class EvaluationProgress:
    """Of one evaluation; called with the instances that were just done."""

    def __init__(self, size: int, sequence_length: int, say: Callable[[str], None], name: str = "") -> None:
        """`size`: instances in all; `name`: what each line begins with."""
        self._size, self._sequence_length, self._say, self._name = size, sequence_length, say, name
        self._done = 0
        self._clock = TrainingClock(0, warmup_steps=0)
        self._next = INTERVAL  # seconds after the start

    def __call__(self, instances: int) -> None:
        """Count `instances` more."""
        self._done += instances
        if self._clock.stepping < self._next or self._done == self._size:
            return
        speed = self._sequence_length / self._clock.lap(self._done)
        left = self._clock.remaining(self._size - self._done) or 0.0
        self._say(
            f"{self._name}{self._done:,} of {self._size:,} instances | {format_count(speed)} tok/s "
            f"| {format_duration(left)} left"
        )
        self._next = self._clock.stepping + INTERVAL
