"""training/watchdog.py on one process; ranks that fail each other are in tests/distributed/test_faults.py."""

import os
import platform
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from data.shards import DataError
from tests.shards import tiny_config
from tests.training.test_metrics import FullDisk
from training import rendezvous, saver, storage, watchdog
from training.trainer import train


def test_a_write_that_stands_still_while_training_waits_is_a_hang(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.evaluation.every = 2, 0
    config.training.hang_seconds, config.training.hang_factor = 2.0, 0.1  # whatever a step takes here
    verdicts, original = [], storage.ChecksummedWriter.write_data

    def write_data(self, *arguments):
        assert ended.wait(60)
        return original(self, *arguments)

    def end(self, verdict):
        verdicts.append(verdict)
        ended.set()

    ended = threading.Event()
    monkeypatch.setattr(storage.ChecksummedWriter, "write_data", write_data)
    monkeypatch.setattr(watchdog.Watchdog, "_end", end)
    train(config)
    assert verdicts[0] == "no progress for 2 s at the begin of the wait for the checkpoint of step 2"


def test_a_write_that_gets_on_is_none(monkeypatch):
    class Recorder(watchdog.Watch):
        def __init__(self):
            self.marks, self.times_busy = [], 0

        def mark(self, place, *, first=False):
            self.marks.append(place)

        def busy(self):
            self.times_busy += 1

    def until(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    monkeypatch.setattr(saver, "WAIT_SECONDS", 0.01)
    waiting, writing = saver.CheckpointSaver.__new__(saver.CheckpointSaver), Future()
    waiting._watch = seen = Recorder()
    waiting._blocks, waiting._stages, waiting._writing_step = 5, 0, 3
    thread = threading.Thread(target=waiting._await, args=(writing,))
    thread.start()
    time.sleep(0.1)
    assert seen.times_busy == 0
    waiting._busy()
    until(lambda: seen.times_busy == 1)
    waiting._stage_done()
    places = [f"{what} of step 3" for what in ("the begin of the wait for the checkpoint", *saver.STAGES)]
    until(lambda: seen.marks == places[:2])
    writing.set_result(None)
    thread.join()
    assert seen.marks == places  # as many on every rank


def test_what_is_done_for_the_first_time_may_take_longer(tmp_path):
    world = SimpleNamespace(rank=0, size=1, store=None)
    watch = watchdog.Watchdog(world, tmp_path, factor=30, seconds=10)
    watch.mark("the start", first=True)
    assert watch.limit == watchdog.FIRST * 10
    watch.step_done("step 1")
    assert watch.limit == 10


@pytest.mark.parametrize("together", [False, True])
def test_a_mistake_of_one_rank_alone_is_told_to_the_others(together, tmp_path, monkeypatch):
    told = [threading.Event(), threading.Event()]
    verdicts = []

    def end(self, verdict):
        verdicts.append(verdict)
        told[self._world.rank].set()

    monkeypatch.setattr(watchdog.Watchdog, "_end", end)
    monkeypatch.setattr(watchdog, "TOGETHER", 60 if together else 0.1)
    store = dist.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    watches = [
        watchdog.Watchdog(SimpleNamespace(rank=rank, size=2, store=store), tmp_path, factor=1, seconds=10)
        for rank in (0, 1)
    ]
    for watch in watches:
        watch.__enter__()
    mistake = DataError("odd has no manifest.")
    threads = [
        threading.Thread(target=watch.__exit__, args=(DataError, mistake, None))
        for watch in (watches if together else watches[1:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if together:
        assert verdicts == []
        return
    assert told[0].wait(30)
    watches[0].__exit__(None, None, None)
    assert verdicts[0] == f"rank 1 (process {os.getpid()} on {platform.node()}) ended: odd has no manifest."


@pytest.mark.parametrize("end", ["watchdog", "rendezvous"])
def test_a_message_that_finds_no_room_keeps_no_rank_from_ending(end, tmp_path, monkeypatch):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    with monkeypatch.context() as on_a_full_disk:
        on_a_full_disk.setattr(sys, "stderr", FullDisk())
        if end == "watchdog":
            world = SimpleNamespace(rank=0, size=1, store=None)
            watchdog.Watchdog(world, tmp_path, factor=1, seconds=0.1)._end("no progress")
        else:
            rendezvous.end_process("error: no progress", 75)
    assert statuses == [75]
