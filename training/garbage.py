"""Python's garbage collector between steps: a collection at a moment of its own choosing stalls one rank, and so all.

In: the number of steps done, after each. Out: nothing; automatic collection is off from `start` to `stop`.
"""

from __future__ import annotations

import gc

STEPS = 50  # between collections: cycles of a step are small, and tensors hardly ever hang on them


class GarbageCollection:
    """Collects after the first step and every STEPS steps, on all ranks at the same one.

    The first step compiles, and compilers leave cycles of their callers' frames, which hold the tensors of the layer
    that called first: 1.5 GB of OLMo2-700M. With full checkpointing, of which larger batches are made, these would be
    a fifth of the peak: the first forward is followed by a collection of its own.
    """

    _job_begun = False  # by this process
    _called = False  # whether a forward has been done since the start
    _compiled = False  # whether a step has

    @classmethod
    def begin_job(cls) -> None:
        """Free the model and moments of an earlier job of this process: cycles keep them beside the new ones."""
        if cls._job_begun:
            gc.collect()
        cls._job_begun = True

    def start(self) -> None:
        """Turn automatic collection off, after a full one; what exists now is not looked at again."""
        gc.collect()
        gc.freeze()
        gc.disable()
        self._called = self._compiled = False

    def after_forward(self) -> None:
        """Collect after the first forward pass of a start."""
        if not self._called:
            gc.collect()
            self._called = True

    def __call__(self, step: int) -> None:
        """Collect if it is time; `step`: steps done."""
        if step % STEPS and self._compiled:
            return
        gc.collect()
        if not self._compiled:
            gc.freeze()  # what was compiled stays, and would take a tenth of a second to go through each time
            self._compiled = True

    def stop(self) -> None:
        """Turn automatic collection on again."""
        gc.enable()
        gc.unfreeze()
