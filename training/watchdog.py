"""Ends a run that stands still, and says which rank is to blame, instead of waiting for a collective that never ends.

In: marks of progress from the main thread of every rank. Out: nothing while all is well; else one message, the stack
traces of all threads of all living ranks in `run_dir/stacks/`, and exit status 75 on every rank, so that a launcher
(torchrun --max-restarts, SLURM) starts the run again.

The watch begins with the process group, before checkpoints are read and the model is built. A thread of each rank
writes a heartbeat to the store that the launcher set up: rank 0 reads them all and gives the verdict, the others watch
rank 0. Three things count against a rank:

- its process is gone (known at once on the same host), or it ended with an error;
- its heartbeat is silent: its host, its network, or the whole process stands still;
- no main thread makes progress: all ranks wait for each other, and the one that has come least far is named.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from data.shards import DataError
from models.config import ConfigError
from training.config import RankError, TrainingError, one_line
from training.distributed import World
from training.processes import alive, number_space

TOGETHER = 10.0  # seconds after which an error that all ranks agree on has come to all of them
EXIT_STATUS = 75  # EX_TEMPFAIL: the same command may succeed
LAPS = 50  # steps that the median is taken over
FIRST = 4.0  # times as long may take what a process does for the first time: it compiles, and connects devices


@dataclass
class Heartbeat:
    """What a rank says about itself."""

    beat: int  # rises while the process lives
    progress: int  # marks that the main thread has come by
    place: str  # the last of them
    stalled: bool  # no mark for too long
    ended: str | None  # None while it runs, "" after a good end, else the error
    host: str
    number_space: str
    process: int


class Watch:
    """Takes marks of progress from code that takes long. This one does nothing with them."""

    def mark(self, place: str, *, first: bool = False) -> None:
        """The main thread has come to `place`, a few words for the message; `first`: what follows may compile."""

    def busy(self) -> None:
        """Some of what follows the last mark is done, and more is to come."""


UNWATCHED = Watch()


class Watchdog(Watch):
    """The watch over one rank, and on rank 0 over all: a context manager; `mark` often in it."""

    def __init__(self, world: World, run_dir: Path, factor: float, seconds: float) -> None:
        """Without a mark for `factor` median steps, and for at least `seconds`, a run ends (factor 0: it never does).

        A heartbeat is silent after a fifth of `seconds`.
        """
        self._world, self._run_dir = world, run_dir
        self._factor, self._seconds = factor, seconds
        self._interval, self._silence = min(2.0, seconds / 20), seconds / 5
        self._laps: deque[float] = deque(maxlen=LAPS)
        self._step_began: float | None = None
        self._marked, self._first = time.monotonic(), False
        self._own = Heartbeat(0, 0, "start", False, None, platform.node(), number_space(), os.getpid())
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was heard first
        self._closed = threading.Event()
        self._store = world.store.clone() if world.store is not None else None  # type: ignore[attr-defined]
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=max(self._silence, 1.0)))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._factor:
            self._marked = time.monotonic()
            if self._store is not None:
                self._beat()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the watch over this rank, and tell the others why, where they do not know."""
        known = error is None or isinstance(error, ConfigError | DataError | TrainingError)
        if known and not isinstance(error, RankError):
            self._close("")
            if error is None or self._all_end():
                return
            self._end_with(str(error))
        else:
            self._await_verdict(error)
            self._close(str(error) if isinstance(error, RankError) else one_line(error))
        if self._factor and self._store is not None:
            self._let_others_read()

    def mark(self, place: str, *, first: bool = False) -> None:
        """As `Watch.mark`."""
        self._marked, self._first = time.monotonic(), first
        self._own.place, self._own.progress = place, self._own.progress + 1

    def busy(self) -> None:
        """As `Watch.busy`."""
        self._marked = time.monotonic()

    def step_done(self, place: str) -> None:
        """A mark at the end of a step: the time since the last one counts for the median."""
        self.mark(place)
        now = time.monotonic()
        if self._step_began is not None:
            self._laps.append(now - self._step_began)
        self._step_began = now

    @property
    def limit(self) -> float:
        """Seconds that may pass between two marks."""
        seconds = max(self._seconds, self._factor * statistics.median(self._laps)) if self._laps else self._seconds
        return FIRST * seconds if self._first else seconds

    def _await_verdict(self, error: BaseException | None) -> None:
        """After `error` on this rank: where it is of a collective, give the watch time to find who ended it."""
        of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
        if self._factor and self._store is not None and of_collective:
            self._closed.wait(self._silence + 4 * self._interval)

    def _all_end(self) -> bool:
        """Whether all ranks come here, as they do with an error that they agreed on; waits for them."""
        if not self._factor or self._store is None:
            return True
        end = time.monotonic() + min(TOGETHER, self._seconds / 2)  # the others wait for this rank, which is no hang yet
        with suppress(RuntimeError):  # the store has ended with the process that held it, which came here
            ending = self._store.add("ending", 1)
            while ending < self._world.size and time.monotonic() < end:
                time.sleep(0.05)
                ending = self._store.add("ending", 0)
            if self._world.rank == 0:
                time.sleep(0.2)  # for the others to see it, too: the store may be in this process
            return ending == self._world.size
        return True

    def _close(self, ended: str) -> None:
        if not self._thread.is_alive():
            return
        self._closed.set()
        self._thread.join()
        self._end_with(ended)

    def _end_with(self, ended: str) -> None:
        self._own.ended = ended
        if self._store is not None:
            with suppress(RuntimeError):  # the store may have ended with the process that held it
                self._beat()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            self._own.stalled = time.monotonic() - self._marked > self.limit
            try:
                verdict = self._verdict()
            except RuntimeError as error:  # of the store
                verdict = self._unheard(0, f"the store of rank 0 does not answer ({one_line(error)})")
            if verdict is not None and not self._closed.is_set():
                self._end(verdict)

    def _verdict(self) -> str | None:
        """Why the run must end, or None."""
        if self._store is None:
            return self._explain([self._own]) if self._own.stalled else None
        self._beat()
        if self._world.rank != 0:
            if self._store.check(["verdict"]):
                return self._store.get("verdict").decode()
            return self._judge(0, self._read(0))
        beats = [self._read(rank) for rank in range(self._world.size)]
        verdict = next(filter(None, map(self._judge, range(self._world.size), beats)), None)
        heard = [beat for beat in beats if beat is not None]
        # One rank may wait for long while another gets on, say with the write of its part of a checkpoint.
        if verdict is None and all(beat.stalled for beat in heard if beat.ended is None):
            if len(heard) < len(beats):
                return None  # it is silent, which is about to be found
            verdict = self._explain(heard)
        if verdict is not None:
            self._store.set("verdict", verdict)
        return verdict

    def _beat(self) -> None:
        assert self._store is not None
        self._own.beat += 1
        self._store.set(f"heartbeat-{self._world.rank}", json.dumps(asdict(self._own)))

    def _read(self, rank: int) -> Heartbeat | None:
        assert self._store is not None
        if rank == self._world.rank:
            return self._own
        if not self._store.check([f"heartbeat-{rank}"]):
            return None
        return Heartbeat(**json.loads(self._store.get(f"heartbeat-{rank}")))

    def _judge(self, rank: int, beat: Heartbeat | None) -> str | None:
        """What is wrong with a rank whatever its main thread does, or None."""
        if beat is None:
            return self._unheard(rank, f"rank {rank} has not begun")
        if beat.ended is not None:
            return f"{_named(rank, beat)} ended: {beat.ended}" if beat.ended else None
        if beat.number_space == self._own.number_space and not alive(beat.process):
            return f"{_named(rank, beat)} is gone: it was killed, or it crashed"
        if rank == self._world.rank or self._heard.get(rank, (0, 0.0))[0] != beat.beat:
            self._heard[rank] = beat.beat, time.monotonic()
        return self._unheard(rank, f"{_named(rank, beat)} does not answer")

    def _unheard(self, rank: int, what: str) -> str | None:
        _, since = self._heard.setdefault(rank, (0, time.monotonic()))
        seconds = time.monotonic() - since
        return f"{what} for {seconds:.0f} s" if seconds > self._silence else None

    def _explain(self, beats: list[Heartbeat]) -> str:
        """A sentence for ranks that all live and do not get on."""
        behind = min(beat.progress for beat in beats)
        last = [rank for rank, beat in enumerate(beats) if beat.progress == behind]
        if self._store is None or len(last) == len(beats):
            where = f"at {beats[0].place}" if len(beats) == 1 else f"on all ranks, after {beats[0].place}"
            return f"no progress for {self.limit:.0f} s {where}"
        named = ", ".join(f"{_named(rank, beats[rank])} (after {beats[rank].place})" for rank in last[:4])
        return f"no progress for {self.limit:.0f} s: all ranks wait for {named}"

    def _end(self, verdict: str) -> None:
        folder = self._run_dir / "stacks"
        file = folder / f"rank-{self._world.rank}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(file, "w", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {verdict}\n\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
            traces = f"stack traces in {folder}"
        except OSError as error:
            traces = f"no stack traces ({one_line(error)})"
        if os.environ.get("LOCAL_RANK", "0") == "0" or self._world.rank == 0 or verdict.startswith("rank 0"):
            text = f"error: {verdict}; {traces}. The same command continues the last checkpoint, if any.\n"
            with suppress(OSError):  # standard error may go to a full disk: that keeps no rank from ending
                sys.stderr.write(text)
                sys.stderr.flush()
        self._let_others_read()
        os._exit(EXIT_STATUS)

    def _let_others_read(self) -> None:
        """Wait where the store may be in this process, which is about to end."""
        if self._world.rank == 0:
            time.sleep(2 * self._interval)


def _named(rank: int, beat: Heartbeat) -> str:
    return f"rank {rank} (process {beat.process} on {beat.host})"
