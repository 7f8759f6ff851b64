"""GPU tests are skipped, and say so, where there is no CUDA device; pytest-xdist's workers take different ones."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_configure():
    """The first device of worker N is number N, and so on around: every test sees all of them, from another one on."""
    worker, devices = os.environ.get("PYTEST_XDIST_WORKER"), torch.cuda.device_count()
    if worker and devices > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        first = int(worker.removeprefix("gw")) % devices
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str((first + index) % devices) for index in range(devices))


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="NO CUDA DEVICE: the GPU tests were not run")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)
