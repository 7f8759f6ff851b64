"""training/watchdog.py on one process; ranks that fail each other are in tests/distributed/test_faults.py."""

import builtins
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.shards import tiny_config
from training import storage, watchdog
from training.trainer import train


def test_the_living_the_dead_and_the_zombie():
    assert watchdog._alive(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert watchdog._alive(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
    assert not watchdog._alive(child.pid)
    child.wait()
    assert not watchdog._alive(child.pid)
    child.stdin.close()


def test_a_process_that_ends_while_it_is_looked_at_is_gone(monkeypatch):
    @contextmanager
    def opened(path, **options):
        class Gone:
            def read(self):
                raise ProcessLookupError(3, "No such process", path)

        yield Gone()

    monkeypatch.setattr(builtins, "open", opened)
    assert not watchdog._alive(12345)


def verdicts(config, monkeypatch):
    """What the watch over a run of one process would have ended it for."""
    found = []
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self, verdict: found.append(verdict))
    train(config)
    return found


def slow(monkeypatch, seconds):
    """The first writes to files of checkpoints take `seconds`, one each."""
    times, original = iter(seconds), storage._Checksummed.write

    def write(self, content):
        time.sleep(next(times, 0.0))
        return original(self, content)

    monkeypatch.setattr(storage._Checksummed, "write", write)


@pytest.mark.parametrize(
    ("seconds", "ends"), [([0.1] * 200, False), ([5.0], True)], ids=["a slow disk", "a disk that stands still"]
)
def test_a_long_write_is_no_hang_as_long_as_it_gets_on(seconds, ends, shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    config.training.steps, config.training.hang_seconds, config.evaluation.every = 2, 2.0, 0
    slow(monkeypatch, seconds)
    begun = time.monotonic()
    found = verdicts(config, monkeypatch)
    assert time.monotonic() - begun > 4
    assert bool(found) == ends
    assert all(verdict.startswith("no progress for 2 s at the checkpoint of step 2") for verdict in found)


def test_what_is_done_for_the_first_time_may_take_longer(tmp_path):
    world = SimpleNamespace(rank=0, size=1, store=None)
    watch = watchdog.Watchdog(world, tmp_path, factor=30, seconds=10)
    watch.mark("the start", first=True)
    assert watch.limit == watchdog.FIRST * 10
    watch.step_done("step 1")
    assert watch.limit == 10
