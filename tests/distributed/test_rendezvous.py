"""Ranks that cannot start, do not come or do not reach each other: all end in seconds, with one sentence."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from models.config import ConfigError
from tests.distributed.test_training import ROOT, arguments
from training import rendezvous
from training.config import LostRankError
from training.rendezvous import Presence, bounded, presence, unreachable


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def ranks(port):
    """Ranks in this process, each a `Presence` of its own; all end with the test."""
    present = []

    def make(rank, size):
        present.append(Presence(rank, size, "localhost", port, rank == 0, "0"))
        present[-1]._aborts = False  # it would end the tests
        return present[-1]

    yield make
    for one in reversed(present):
        one._close()


def never():
    return None


def test_the_sentence_of_a_rank_that_cannot_start_ends_the_others(ranks):
    first, second = ranks(0, 2), ranks(1, 2)
    assert second.refuse("data.path=/none holds no token shards")
    for rank in (first, second):
        with pytest.raises(ConfigError, match=r"^rank 1 on .*: data\.path=/none holds no token shards$"):
            rank.meet(0, never)


def test_what_an_earlier_start_has_left_in_the_store_does_not_end_this_one(port):
    """torchrun's agent keeps the store; on a host whose own ranks had not failed it gives the same count again."""
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    made = []

    def start(rank):
        made.append(Presence(rank, 2, "localhost", port, False, None))
        made[-1]._aborts = False
        return made[-1]

    def ends(*ranks):
        for rank in ranks:
            rank._close()

    try:
        first, second = start(0), start(1)
        assert second.refuse("the disk is gone")
        ends(first, second)
        second = start(1)  # rank 0 of the next start comes later
        with ThreadPoolExecutor() as pool:
            met = pool.submit(second.meet, 0, never)
            time.sleep(1)
            assert not met.done()
            store_of_first = start(0).meet(0, never)
            store_of_first.set("key", "value")
            assert met.result(timeout=20).get("key") == b"value"
        assert store.add("starts", 0) == 2
    finally:
        ends(*made)


def test_a_rank_that_is_silent_is_named_to_all_and_one_that_is_heard_is_waited_for(ranks, monkeypatch):
    monkeypatch.setattr(rendezvous, "ARRIVAL", 3.0)
    monkeypatch.setattr(rendezvous, "HEARING", 0.5)
    first, _heard = ranks(0, 3), ranks(1, 3)
    with pytest.raises(LostRankError, match=r"^rank 2 of 3 did not come and was not heard for 3 s"):
        first.meet(0, never)
    late = ranks(2, 3)
    with pytest.raises(LostRankError, match=r"^rank 2 of 3 did not come"):
        late.meet(0, never)


def test_several_absent_ranks_are_named_and_of_many_the_first():
    assert rendezvous.absent([1, 3], 4) == (
        "ranks 1, 3 of 4 did not come and were not heard for 120 s: look into the log of their hosts."
    )
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 2 more of 16 did not come" in rendezvous.absent([*range(1, 11)], 16)


def test_a_rank_without_rank_0_says_where_it_looked(ranks, monkeypatch, port):
    monkeypatch.setattr(rendezvous, "ARRIVAL", 0.5)
    with pytest.raises(LostRankError, match=rf"rank 0 cannot be reached at localhost:{port} \(.*refused\)"):
        ranks(1, 2).meet(0, never)


def test_a_port_that_is_taken_is_named(ranks, port):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} cannot be used .* use another port"):
            ranks(0, 2).meet(0, never)


@pytest.mark.parametrize("waits", [False, True], ids=["in the preflight", "as it waits for the others"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_before_the_process_group_ends_the_others_in_seconds(victim, waits, port):
    code = (
        "import sys, time\nfrom training.config import LostRankError\nfrom training.rendezvous import Presence\n"
        "rank, port, waits = map(int, sys.argv[1:])\nhere = Presence(rank, 3, 'localhost', port, rank == 0, '0')\n"
        "while here._store is None: time.sleep(0.01)\n"
        "print('here', flush=True)\n"
        "if not waits: time.sleep(100)\n"
        "try: here.meet(0, lambda: None)\n"
        "except LostRankError as error: sys.exit(f'error: {error}')\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(port), str(int(waits))],
            env={**environment, "LOCAL_RANK": "0"},  # so that both speak
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for rank in both:
            assert rank.stdout.readline() == "here\n"
        both[victim].kill()
        said = both[1 - victim].communicate(timeout=30)[1]
    finally:
        for rank in both:
            rank.kill()
            rank.communicate()
    assert both[1 - victim].returncode == (1 if waits else 75)
    # Where rank 0 was killed, the store may be missed before its process.
    gone = rf"rank {victim} \(process {both[victim].pid} on .*\) is gone: it was killed"
    assert re.search(gone if victim else f"{gone}|rank 0 ended before all ranks had come", said), said


def test_a_signal_ends_the_wait(ranks):
    with pytest.raises(SystemExit) as ended:
        ranks(0, 2).meet(0, lambda: signal.SIGTERM)
    assert ended.value.code == 143


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_without_an_address_or_a_rank_is_a_mistake(monkeypatch, missing):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set, and RANK, MASTER_ADDR and MASTER_PORT are not all"):
        presence()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_of_a_launcher_that_is_no_number_is_named(shards, tmp_path, name):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", name: "%t"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments(shards, tmp_path / "run")]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, (tmp_path / "run").exists()) == (2, False)
    assert done.stderr == f"error: {name}=%t in the environment is no number: start ranks with torchrun, or unset it.\n"


def test_an_error_of_the_network_keeps_the_words_that_tell():
    nccl = "NCCL error in: group.cpp:1, system error\nncclSystemError: System call failed\nLast error:\nno eth9"
    assert "(no eth9)" in unreachable(2, RuntimeError(nccl))
    assert "(Unable to find address)" in unreachable(2, RuntimeError("Unable to find address\n"))
    assert "NCCL_SOCKET_IFNAME" in unreachable(2, RuntimeError(""))


def test_a_call_that_hangs_ends_with_a_sentence():
    code = (
        "import time\nfrom training.rendezvous import bounded\n"
        "with bounded(60, 'not this'):\n    pass\n"
        "with bounded(0.1, 'the first sum has not ended: look there'):\n    time.sleep(100)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, "error: after 0 s, the first sum has not ended: look there.\n")
    with bounded(60, "not this"):
        pass


def start(rank, port, shards, run_dir, **environment):
    """One rank of two, started as SLURM does."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments(shards, run_dir)],
        cwd=run_dir.parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **{name: str(value) for name, value in variables.items()},
            **environment,
        },
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "environment", "words"),
    [
        ("/none", {}, "error: rank 1 on .*: data.path=/none holds no token shards"),
        (None, {"GLOO_SOCKET_IFNAME": "nope0"}, r"error: rank 1 on .* cannot reach each other \(.*nope0\): check the"),
    ],
    ids=["data", "network"],
)
def test_what_only_one_rank_lacks_ends_both_with_its_sentence(path, environment, words, shards, tmp_path, port):
    both = [
        start(0, port, shards, tmp_path / "run"),
        start(1, port, path or shards, tmp_path / "run", **environment),
    ]
    try:
        said = both[0].communicate(timeout=60)[1]
        both[1].communicate(timeout=60)
    finally:
        for rank in both:
            rank.kill()
    assert [rank.returncode for rank in both] == [2, 2]
    assert "Traceback" not in said
    assert re.search(words, said), said
