"""Collections happen between steps, at chosen ones, and automatic collection comes back afterwards."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from models.decoder import Decoder
from tests.shards import tiny_config
from training.garbage import STEPS, GarbageCollection
from training.trainer import Trainer, train


class Cycle:
    def __init__(self):
        self.own = self


@pytest.fixture
def collection():
    garbage = GarbageCollection()
    garbage.start()
    yield garbage
    garbage.stop()


def test_a_cycle_lives_until_the_step_at_which_all_ranks_collect(collection):
    assert not gc.isenabled()
    collection(STEPS + 1)
    alive = weakref.ref(Cycle())
    collection(STEPS + 2)
    assert alive() is not None
    collection(2 * STEPS)
    assert alive() is None


def test_what_compilers_leave_is_collected_after_the_first_step_of_a_start(collection):
    for step in (STEPS + 1, 3 * STEPS + 1):
        alive = weakref.ref(Cycle())
        collection(step)
        assert alive() is None
        collection.stop()
        collection.start()


def test_what_compilers_leave_of_the_first_forward_is_collected_before_its_backward(shards, tmp_path, monkeypatch):
    alive = []
    forward, backward = Decoder.forward, torch.Tensor.backward

    def leaves_a_cycle(self, *args):
        alive.append(weakref.ref(Cycle()))
        return forward(self, *args)

    def begins(self, *args, **kwargs):
        found.append(alive[-1]() is not None)
        return backward(self, *args, **kwargs)

    found: list[bool] = []
    monkeypatch.setattr(Decoder, "forward", leaves_a_cycle)
    monkeypatch.setattr(torch.Tensor, "backward", begins)
    train(tiny_config(shards, tmp_path / "run"))
    assert found[0] is False
    assert all(found[1:])


def test_automatic_collection_comes_back_after_a_run_that_fails(shards, tmp_path, monkeypatch):
    def fails(self, batches):
        assert not gc.isenabled()
        raise RuntimeError("a step failed")

    monkeypatch.setattr(Trainer, "_step", fails)
    with pytest.raises(RuntimeError, match="a step failed"):
        train(tiny_config(shards, tmp_path / "run"))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_nothing_is_collected_while_train_py_imports_what_it_needs():
    run = "import gc, runpy, sys; sys.argv = ['train.py', '--help']\n"
    run += "try: runpy.run_path('train.py', run_name='__main__')\nfinally: print(gc.isenabled())"
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", run], cwd=root, capture_output=True, text=True)
    assert ended.stdout.endswith("False\n"), ended.stderr


def test_what_survives_one_collection_is_collected_by_a_later_one(collection):
    collection(1)
    cycle = Cycle()
    alive = weakref.ref(cycle)
    collection(STEPS)
    del cycle
    assert alive() is not None
    collection(2 * STEPS)
    assert alive() is None
