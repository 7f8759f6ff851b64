"""How ranks meet before they have a process group: all come, or all end with the sentence of the one that cannot.

In: the environment of torchrun or SLURM. Out: the store that the ranks share. From the moment that a rank has read its
command, a thread of it says so to the store every second, while the data is checked or copied: that may take minutes on
one host and none on another, so ranks are waited for as long as they are heard. Ranks of one host look at each other's
processes besides: one that was killed is known at once.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from signal import Signals

import torch.distributed as dist

from models.config import ConfigError
from training.config import LostRankError
from training.environment import rank_variable
from training.processes import alive, number_space

ARRIVAL = 120.0  # seconds without a word of a rank, after which it is missing
CONNECTION = 120.0  # seconds that the connections of a process group may take, once all have come
HEARING = 5.0  # seconds that a rank which cannot start gives the others to hear why
INTERVAL = 1.0  # seconds between two words
HASTE = 0.2  # the same while something is about to be decided
RETRY = 10.0  # seconds that one attempt to reach the store may take
NAMED = 8  # ranks that a sentence names at most
STORE = timedelta(minutes=10)  # for what ranks wait for in the store later
LOST = 75  # exit status: the same command may succeed
NETWORK = (
    "check the network between the hosts (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where set, must name an interface "
    "that exists on every host and reaches the others; firewall; NCCL_DEBUG=INFO says more)"
)


class Presence:
    """One rank among `size` that are to meet at the store of `address` and `port`, which one of them `hosts`.

    Where none does, the store may have seen earlier starts of the same ranks: each start has a part of it, which rank 0
    numbers.
    """

    def __init__(self, rank: int, size: int, address: str, port: int, hosts: bool, attempt: str | None) -> None:
        """`attempt` names the part of the store that all ranks of this start use; None asks rank 0 for it."""
        self._rank, self._size = rank, size
        self._address, self._port, self._hosts, self._attempt = address, port, hosts, attempt
        self._tcp: dist.Store | None = None  # once the store is reached
        self._seen = 0, 0  # the newest start that the store knows, and the words of its rank 0
        self._store: dist.Store | None = None  # the part of it for this attempt
        self._trouble = "no answer"  # the last error of the store
        self._ended = False  # the store was there and is gone
        self._refusal: tuple[int, str] | None = None  # with which status and sentence all ranks end
        self._job, self._announced, self._complete = -1, -1, -1  # come to here, said so, all have come to
        self._unheard: dict[int, tuple[int, float]] = {}  # rank that has not come -> its last word, and when it came
        self._gone: set[int] = set()  # ranks of this host whose processes have ended
        self._aborts = True  # the main thread does not see what comes, and nothing would be lost
        self._stopping: Callable[[], Signals | None] = lambda: None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="rendezvous", daemon=True)
        self._thread.start()
        atexit.register(self._close)

    def meet(self, job: int, stopping: Callable[[], Signals | None]) -> dist.Store:
        """Wait until all ranks have come to `job`, and return a store for what they do there.

        Raises ConfigError with the sentence of a rank that cannot start, LostRankError when one is not heard, and
        SystemExit when `stopping` returns a signal.
        """
        self._stopping, self._aborts = stopping, False
        began = time.monotonic()
        # Rank 0 looks at all, the others at rank 0.
        self._unheard = dict.fromkeys(range(1, self._size) if self._rank == 0 else (0,), (-1, began))
        self._job = job
        while self._complete < job:
            if signal := stopping():
                raise SystemExit(128 + signal)
            if self._refusal is not None:
                status, sentence = self._refusal
                if self._hosts:
                    self._await_heard()
                raise LostRankError(sentence) if status == LOST else ConfigError(sentence)
            if self._ended or time.monotonic() - began > ARRIVAL:
                self._raise_lost()
            time.sleep(0.05)
        assert self._tcp is not None
        store = self._tcp.clone()  # type: ignore[attr-defined]
        store.set_timeout(STORE)
        return dist.PrefixStore(f"attempt-{self._attempt}-job-{job}", store)

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """While the block makes the process group, this process ends when another rank cannot, or a signal comes.

        An error of the block is told to the others, and raised as ConfigError.
        """
        self._aborts = True
        try:
            with bounded(CONNECTION, f"the {self._size} ranks do not reach each other: {NETWORK}"):
                yield
        except RuntimeError as error:
            sentence = unreachable(self._size, error)
            self.refuse(sentence)
            raise ConfigError(sentence) from error
        finally:
            self._aborts = False

    def refuse(self, sentence: str) -> bool:
        """Let all ranks end with `sentence`, for which this one cannot start, and the name of this one.

        They have a few seconds to hear it; returns whether all have.
        """
        return self._end_all(f"rank {self._rank} on {platform.node()}: {sentence}", 2)

    def _end_all(self, sentence: str, status: int) -> bool:
        self._aborts = False
        self._refusal = self._refusal or (status, sentence)
        return self._await_heard()

    def _await_heard(self) -> bool:
        """Whether all ranks have heard the refusal within `HEARING`; the store may end with this process."""
        end = time.monotonic() + HEARING
        names = [f"heard-{rank}" for rank in range(self._size) if rank not in self._gone]
        while not self._ended and time.monotonic() < end:
            with suppress(RuntimeError):  # of the store
                if self._store is not None and self._store.check(names):
                    time.sleep(2 * HASTE if self._hosts else 0)  # for the others to see it, too
                    return True
            time.sleep(HASTE / 2)
        return False

    def _speak(self) -> None:
        while True:
            try:
                if self._store is None:
                    self._connect()
                self._exchange()
            except (OSError, RuntimeError) as error:
                self._trouble = " ".join(str(error).split())[:200]
                # Rank 0 is gone, which is for the watchdog where it runs, or something else has this rank's port.
                self._ended = self._store is not None or self._hosts
            if self._aborts and (signal := self._stopping()):
                end_process(f"{signal.name} came before the first step", 128 + signal)
            if self._aborts and self._refusal is not None:
                if self._hosts:
                    self._await_heard()
                end_process(f"error: {self._refusal[1]}", self._refusal[0])
            if self._ended:
                if self._aborts and not self._hosts:
                    end_process(f"error: {self._without_rank_0()}", LOST)
                return
            undecided = self._aborts or self._complete < self._job or self._refusal is not None
            if self._closed.wait(HASTE if undecided else INTERVAL):
                return

    def _connect(self) -> None:
        if self._tcp is None:
            if not self._hosts:  # torch would warn of each attempt
                socket.create_connection((self._address, self._port), timeout=RETRY).close()
            self._tcp = dist.TCPStore(
                self._address,
                self._port,
                is_master=self._hosts,
                timeout=timedelta(seconds=RETRY),
                wait_for_workers=False,
            )
        if self._attempt is None:
            self._attempt = self._agree(self._tcp)
        self._store = dist.PrefixStore(f"attempt-{self._attempt}", self._tcp)
        own = f"{self._rank} {os.getpid()}\n"
        self._store.append(f"processes of {number_space()}", own)  # type: ignore[attr-defined]

    def _agree(self, store: dist.Store) -> str:
        """The number of this start; RuntimeError while rank 0 was not heard in the newest one, which may be over.

        The launcher's count of restarts does not tell: where a host starts its ranks again because another one did,
        its own count stays, and ranks would look at what is left of an earlier start, or wait for each other in two.
        """
        if self._rank == 0:
            return str(store.add("starts", 1))
        start = store.add("starts", 0)
        seen = start, dist.PrefixStore(f"attempt-{start}", store).add("word-0", 0)
        before, self._seen = self._seen, seen
        if start == 0 or before[0] != start or before[1] == seen[1]:
            raise RuntimeError("it has not said a word")
        return str(start)

    def _exchange(self) -> None:
        """Say what this rank knows, and hear what the others do."""
        store = self._store
        assert store is not None
        store.add(f"word-{self._rank}", 1)
        if self._refusal is None and (self._aborts or self._complete < self._job):
            self._look_at_processes(store)
        if self._refusal is not None:
            store.compare_set("refusal", "", json.dumps(self._refusal))  # the first one stands
        if store.check(["refusal"]):
            status, sentence = json.loads(store.get("refusal"))
            self._refusal = status, sentence
            store.set(f"heard-{self._rank}", "")
        job = self._job
        if self._announced < job:
            store.set(f"job-{job}-rank-{self._rank}", "")
            self._announced = job
        if self._complete >= job:
            return
        if self._rank != 0:
            if store.check([f"job-{job}-complete"]):
                self._complete = job
            self._listen(store, 0)
            return
        for rank in range(1, self._size):
            if store.check([f"job-{job}-rank-{rank}"]):
                self._unheard.pop(rank, None)
            else:
                self._listen(store, rank)
        if not self._unheard:
            store.set(f"job-{job}-complete", "")
            self._complete = job

    def _look_at_processes(self, store: dist.Store) -> None:
        """Refuse to start without a rank of this host that was killed; its silence would tell only after `ARRIVAL`."""
        for line in store.get(f"processes of {number_space()}").decode().splitlines():
            rank, process = map(int, line.split())
            if not alive(process):
                self._gone.add(rank)
                named = f"rank {rank} (process {process} on {platform.node()})"
                self._refusal = self._refusal or (LOST, f"{named} is gone: it was killed, or it crashed.")

    def _listen(self, store: dist.Store, rank: int) -> None:
        word = store.add(f"word-{rank}", 0)
        if self._unheard[rank][0] != word:
            self._unheard[rank] = word, time.monotonic()

    def _raise_lost(self) -> None:
        where = f"{self._address}:{self._port}"
        if self._store is None and self._hosts:
            raise ConfigError(f"MASTER_PORT={self._port} cannot be used ({self._trouble}): use another port.")
        if self._store is None:
            raise LostRankError(
                f"rank 0 cannot be reached at {where} ({self._trouble}): look into the log of its host, and check "
                "MASTER_ADDR, MASTER_PORT and the firewall."
            )
        if self._ended:
            raise LostRankError(self._without_rank_0())
        now = time.monotonic()
        silent = [rank for rank, (_, since) in self._unheard.copy().items() if now - since > ARRIVAL]
        if silent:
            sentence = absent(silent, self._size)
            self._end_all(sentence, LOST)
            raise LostRankError(sentence)

    def _without_rank_0(self) -> str:
        where = f"{self._address}:{self._port}"
        return f"rank 0 ended before all ranks had come, or {where} is out of reach: look into its log."

    def _close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=2 * INTERVAL)


def absent(ranks: list[int], size: int) -> str:
    """A sentence on those `ranks` of `size` that did not come; of many it names the first eight."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    named = ", ".join(map(str, ranks[:NAMED])) + more
    word, were, their = ("rank", "was", "its host") if len(ranks) == 1 else ("ranks", "were", "their hosts")
    return (
        f"{word} {named} of {size} did not come and {were} not heard for {ARRIVAL:.0f} s: look into the log of {their}."
    )


@cache
def presence() -> Presence:
    """This process among the ranks of torchrun or SLURM; call it as soon as the command is read.

    Raises ConfigError when the environment does not say where they meet.
    """
    environment = os.environ
    size = rank_variable("WORLD_SIZE", 1)
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ConfigError(
            f"WORLD_SIZE={size} is set, and RANK, MASTER_ADDR and MASTER_PORT are not all: start the ranks with "
            "torchrun, or name there each one's number, the host of rank 0 and a free port of it."
        )
    rank = rank_variable("RANK", 0)
    hosts = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    # The store of torchrun's agent outlives restarts; one that rank 0 makes does not.
    attempt = None if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "0"
    return Presence(rank, size, environment["MASTER_ADDR"], rank_variable("MASTER_PORT", 0), hosts, attempt)


@contextmanager
def bounded(seconds: float, sentence: str) -> Iterator[None]:
    """End this process with `sentence` and status 75 when the block takes longer: a call that hangs in a library."""
    text = f"error: after {seconds:.0f} s, {sentence}."
    timer = threading.Timer(seconds, end_process, (text, LOST))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def unreachable(size: int, error: RuntimeError) -> str:
    """The sentence for an error of Gloo or NCCL."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    reason = lines[-1] if "NCCL" in lines[0] else lines[0]  # NCCL's own words come last
    return f"the {size} ranks cannot reach each other ({reason}): {NETWORK}."


def end_process(text: str, status: int) -> None:
    """From any thread, whatever the main one waits for; one rank of a host speaks, as in train.py."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        with suppress(OSError):  # of a full disk, which keeps no rank from ending
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
    else:
        time.sleep(2)  # torchrun stops all ranks when one ends: let the one that speaks be heard
    os._exit(status)
