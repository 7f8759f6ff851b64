"""Writing checkpoints while training goes on.

In: the tensors of `training.checkpoint` and the state of a step. Out: a checkpoint, some seconds later. On a GPU `save`
only begins to copy the tensors to host memory (`training.host_copy`), whose pages are locked beside the first steps;
the copy runs beside the next forward and backward, and the optimizer's work on the device waits for its end. A thread
of each rank waits for the copy, too, and writes, over a process group of its own: files, checksums read back from disk,
marker, deletion of old checkpoints. It needs nothing more of the main thread: an error that ends that, on one rank or
on all, leaves the checkpoint whole, since `close` waits for it. `dcp.async_save` ties copying and writing together, so
that ranks wait in vain for one whose copy failed; here all agree on the copy first, and write from device memory at
once, with the reason in the log, where host memory does not suffice.

`training.save_schedule` says when a save begins, and when training has to wait for it.

A save that fails (disk full, folder not writable) leaves what was saved before as it is; training goes on, and the next
one is tried.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from models.config import ConfigError
from models.decoder import Decoder
from training.checkpoint import (
    ASIDE,
    Marker,
    TrainState,
    checkpoint_path,
    checkpoint_tensors,
    prune,
    remove_checkpoint,
    size_in_bytes,
)
from training.config import CheckpointConfig, one_line
from training.distributed import World
from training.host_copy import HostCopy
from training.save_schedule import SaveSchedule, steps_of_write
from training.skip import SpikeFilter
from training.storage import ChecksummedWriter, first_difference
from training.watchdog import UNWATCHED, Watch

WAIT_SECONDS = 0.5  # between looks at a write that training waits for
LONG_WAIT_SECONDS = 1.0  # a wait at the bound that the log tells of
COPIED = ("model", "optimizer")  # parts of a checkpoint that training goes on to change
STAGES = ("its files of the checkpoint", "the check of its files")  # of a rank's part of a save


class CheckpointSaver:
    """Saves one run on all ranks together; every rank calls the same methods in the same order."""

    def __init__(
        self,
        run_dir: Path,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        spikes: SpikeFilter,
        world: World,
        config: CheckpointConfig,
        say: Callable[[str], None],
        watch: Watch = UNWATCHED,
    ) -> None:
        """`say` takes a line for the user on the main rank; `watch` hears of the write when training waits for it."""
        self.run_dir, self.config = run_dir, config
        self.saved_step = 0  # step of the newest checkpoint that was committed or loaded
        self.failure: str | None = None  # why the last save came to nothing
        self.before_commit: Callable[[], None] = lambda: None  # on the main rank, in the writing thread
        self._parts = (model, optimizer, spikes)
        self._world, self._say, self._watch = world, say, watch
        self._blocks = 0  # written or read back so far, all saves together
        self._stages = 0  # of `STAGES` that this rank's part of the save has come to
        self.schedule = SaveSchedule(config.every, config.permanent_every, asynchronous=config.asynchronous)
        self._copy: HostCopy | None = None
        self._prepared: Future[None] | None = None  # of `_copy`
        # Its collectives run in a thread, beside those of training.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=_use, initargs=(world.device,)
        )
        self._unheld: HostCopy | None = None  # a copy that the optimizer has not waited for
        self._writing: Future[str | None] | None = None
        self._writing_step = 0
        self._last = False  # the save that runs is
        # Of the save that runs: when it began, on its own clock and on that of steps, and what it took in the end.
        self._began = self._stepping = self._write_seconds = 0.0
        self._waits_since: float | None = None  # training waits for it at the bound
        optimizer.register_step_pre_hook(lambda *_: self._before_step())

    def save(self, state: TrainState, stepping: float, *, delete_old: bool = True, last: bool = False) -> None:
        """Begin to save `state` and the tensors as they are. Waits for the save before it, if that still runs.

        `stepping`: seconds that this start has spent in steps so far. `last`: no step comes after it.
        """
        begin = time.perf_counter()
        # A part of what training waits for: it is long where a write takes longer than the steps between.
        self._end_write(state.step, stepping)
        self._began, self._stepping = time.perf_counter(), stepping
        self.schedule.begins(state.step)
        permanent = self.config.permanent_every
        state = copy.deepcopy(state)
        state.world_size, state.device = self._world.size, self._world.device.type
        # Also the first one after a step whose checkpoint was put off, or could not be written.
        state.permanent = permanent is not None and state.step // permanent > self.saved_step // permanent
        rank = self._world.rank
        tensors = checkpoint_tensors(*self._parts, range(rank, rank + 1), state.device)
        # Copied at once: the next step enters the window before its optimizer waits for the other copies.
        tensors["skip"] = {name: tensor.to("cpu", copy=True) for name, tensor in tensors["skip"].items()}
        copying = self._begin_copy(tensors) if self.schedule.asynchronous else None
        self._writing_step, self._stages, self._unheld, self._last = state.step, 0, copying, last
        if copying is None:
            self._writing = self._thread.submit(self._timed_write, tensors, state, delete_old)
            self.wait()
            return
        kept, stalled = tensors | copying.tensors, time.perf_counter() - begin
        self._writing = self._thread.submit(self._timed_write, kept, state, delete_old, copying, stalled)

    def is_at_bound(self, step: int) -> bool:
        """Whether `checkpoint.every` allows no more than these `step` steps without the save that runs."""
        return self._writing is not None and self.schedule.is_at_bound(step, self.saved_step)

    def wait_at_bound(self, step: int, stepping: float) -> None:
        """Wait for the save that runs: `step` steps are done, at the bound; `stepping` as in `save`."""
        self._waits_since = begin = time.perf_counter()
        self._end_write(step, stepping)
        self._waits_since = None
        if (waited := time.perf_counter() - begin) > LONG_WAIT_SECONDS and self.failure is None:
            self._say(
                f"training waited {waited:.1f} s for {checkpoint_path(self.run_dir, self._writing_step)} to be "
                f"written: checkpoint.every={self.schedule.every} allows no more steps without it"
            )

    def wait(self) -> bool:
        """Wait until the save that runs is done. Returns whether the last one succeeded, the same on all ranks."""
        if self._writing is None:
            return self.failure is None
        writing, self._writing = self._writing, None
        self._await(writing)
        self.failure = writing.result()
        if self.failure is None:
            self.saved_step = self._writing_step
        self.schedule.ended(self._writing_step, whole=self.failure is None)
        return self.failure is None

    def close(self) -> None:
        """End the writing thread, after what it does; never raises for a save that failed."""
        if self._writing is not None:
            self._await(self._writing)
        self._thread.shutdown(wait=True)
        self._free_copy()

    def _end_write(self, step: int, stepping: float) -> None:
        """Wait for the save that runs, and learn from it how far ahead of the bound the next ones must begin."""
        if self._writing is None or not self.wait() or not self.schedule.lead:
            return
        steps, seconds = step - self._writing_step, stepping - self._stepping
        taken = self._world.largest(steps_of_write(self._write_seconds, steps, seconds))
        if (warning := self.schedule.learn(taken)) is not None:
            self._say(warning)

    def _before_step(self) -> None:
        """Just before the optimizer's step. At the first one memory for copies is taken: no save waits for it then."""
        if self._unheld is not None:
            self._unheld.hold()
            self._unheld = None
        if self.schedule.asynchronous and self._copy is None and self._world.device.type == "cuda":
            tensors = checkpoint_tensors(*self._parts, range(0), "cuda")
            with suppress(RuntimeError, MemoryError):  # no host memory: the first save tries again, and says so
                self._prepare(tensors)

    def _begin_copy(self, tensors: dict[str, Any]) -> HostCopy | None:
        """A copy that is under way on all ranks; None, for good, where one of them has no memory for it."""
        failure: Exception | None = None
        try:
            copying = self._host_copy(tensors)
            copying.begin({part: tensors[part] for part in COPIED})
        except Exception as error:  # whatever it is: a checkpoint can be written without a copy
            failure = error.with_traceback(None)  # whose frames would keep all of this alive
        if not self._world.any(failure is not None):
            return copying
        reason = one_line(failure) if failure else "on another rank"
        self._say(f"checkpoints are written while training waits: no copy in host memory ({reason})")
        self.schedule.asynchronous = False
        self._free_copy()
        return None

    def _prepare(self, tensors: dict[str, Any]) -> HostCopy:
        self._copy = HostCopy({part: tensors[part] for part in COPIED}, self._world.device)
        self._prepared = self._thread.submit(self._copy.prepare)
        return self._copy

    def _host_copy(self, tensors: dict[str, Any]) -> HostCopy:
        """Memory that is ready for a copy. Raises what its preparation raised."""
        copying = self._copy or self._prepare(tensors)
        assert self._prepared is not None
        self._prepared.result()
        return copying

    def _free_copy(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def _await(self, writing: Future[str | None]) -> None:
        """Wait for the writing thread. What it gets done is progress of the main thread only now, while that waits.

        Every rank gives one mark a stage, so that one which does not come to it has fewer.
        """
        self._watch.mark(f"the begin of the wait for the checkpoint of step {self._writing_step}")
        blocks, marked = self._blocks, 0
        while marked < len(STAGES):
            done = futures.wait([writing], timeout=WAIT_SECONDS).done
            if self._blocks != blocks:
                blocks = self._blocks
                self._watch.busy()
            for stage in STAGES[marked : len(STAGES) if done else self._stages]:
                self._watch.mark(f"{stage} of step {self._writing_step}")
                marked += 1

    def _busy(self) -> None:
        self._blocks += 1

    def _stage_done(self) -> None:
        self._stages += 1

    def _read_back(self, path: Path, checksums: dict[str, str]) -> str | None:
        name = first_difference(path, checksums, busy=self._busy, from_disk=True)
        self._stage_done()
        return None if name is None else f"{path / name} reads back as something else"

    def _timed_write(self, *arguments: Any) -> str | None:
        """As `_write`, whose time the schedule learns from."""
        failure = self._write(*arguments)
        self._write_seconds = time.perf_counter() - self._began
        return failure

    def _write(
        self,
        tensors: dict[str, Any],
        state: TrainState,
        delete_old: bool,
        copying: HostCopy | None = None,
        stalled: float = 0.0,
    ) -> str | None:
        """In the writing thread: the files, their check, the marker. Returns what went wrong, the same on all ranks.

        Training has waited `stalled` seconds so far, for the save before and for memory. It waits on without a copy,
        and where it comes to the bound.
        """
        begin = time.perf_counter()
        path, main = checkpoint_path(self.run_dir, state.step), self._world.is_main

        def ready() -> None:
            if copying is not None:
                copying.finish()
            if main:
                _clear(path)

        failure = self._together(ready)
        sums: list[dict[str, str]] = []
        if failure is None:
            writer = ChecksummedWriter(path, self._busy, on_written=self._stage_done)
            try:
                dcp.save(tensors, storage_writer=writer, process_group=self._group)
            except dcp.api.CheckpointException as error:  # on all ranks alike
                failure = next(one_line(cause) for cause, _ in error.failures.values())
        if failure is None:
            failure = self._together(lambda: self._read_back(path, writer.checksums), writer.checksums, sums)
        if failure is None:
            failure = self._together(lambda: self._commit(path, state, sums) if main else None)
        if not main:
            return failure
        if failure is not None:
            before = "there is none before it"
            if self.saved_step:
                before = f"the checkpoint before it (step {self.saved_step}) stays as it is"
            then = "" if self._last else ", and training goes on"
            self._say(f"warning: {path} could not be saved ({failure}); {before}{then}")
            _discard(path)
            return failure
        seconds = time.perf_counter() - begin
        waited = "training waited"
        if copying is not None:
            at_bound = 0.0 if self._waits_since is None else time.perf_counter() - self._waits_since
            waited = f"training waited {stalled + copying.waited() + at_bound:.2f} s"
        try:  # the checkpoint is whole from here on, whatever else goes wrong
            size = f"{size_in_bytes(path) / 1e6:,.1f} MB"
        except OSError as error:
            size = f"size unknown ({one_line(error)})"
        self._say(f"checkpoint {path} | {size} in {seconds:.1f} s, {waited}")
        if delete_old:
            self._thread.submit(self._delete_old, path)  # after this, so that nobody waits for it
        return None

    def _delete_old(self, saved: Path) -> None:
        """In the writing thread, on the main rank, once `saved` is whole."""
        try:
            deleted = prune(self.run_dir, self.config.keep)
        except (OSError, ConfigError) as error:
            self._say(
                f"warning: {saved} is saved, and old checkpoints of {self.run_dir} could not be deleted "
                f"({one_line(error)})"
            )
            return
        for old in [path for path in deleted if path.name.endswith(ASIDE)]:
            self._say(f"deleted {old}: of damaged checkpoints that were set aside the newest stays")

    def _commit(self, path: Path, state: TrainState, checksums: list[dict[str, str]]) -> None:
        merged = {name: digest for of_rank in checksums for name, digest in of_rank.items()}
        marker = Marker(state, {name: (path / name).stat().st_size for name in merged}, merged)
        self.before_commit()
        marker.write(path)

    def _together(
        self, act: Callable[[], str | None], value: Any = None, gathered: list[Any] | None = None
    ) -> str | None:
        """`act` on every rank; what it returns or raises is a failure. Returns the first, to all ranks."""
        try:
            own = act()
        except Exception as error:  # whatever it is: the other ranks wait for an answer
            own = one_line(error)
        results: list[Any] = [None] * self._world.size
        dist.all_gather_object(results, (own, value), group=self._group)
        if gathered is not None:
            gathered += [value for _, value in results]
        return next((failure for failure, _ in results if failure is not None), None)


def _use(device: torch.device) -> None:
    """In the writing thread: without this it would open the first GPU of the host on every rank."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _clear(path: Path) -> None:
    """Remove what an earlier save of the same step has left."""
    if path.exists():
        remove_checkpoint(path)
    path.mkdir(parents=True)


def _discard(path: Path) -> None:
    """Free the space of a failed save, as far as that is possible."""
    with suppress(OSError):  # what stays has no marker, so it is no checkpoint
        remove_checkpoint(path)
