"""Warnings about the environment of a run on GPUs: what is set, how many cores, how much locked memory."""

import os
import resource

import pytest

from training import environment
from training.environment import environment_warnings


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A host with eight cores and no limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(environment.resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)


@pytest.mark.parametrize("name", environment.COSTLY)
def test_a_setting_that_costs_speed_is_named_with_what_it_costs(name):
    value = "INFO" if "DEBUG" in name else "1"
    (warning,) = environment_warnings({name: value})
    assert warning == f"{name}={value} is set, so {environment.COSTLY[name]}: unset it for runs that are to be fast"


def test_what_its_library_does_not_take_for_set_gets_no_warning():
    uncached = "PYTORCH_NO_CUDA_MEMORY_CACHING"
    for name in environment.COSTLY.keys() - {uncached}:
        assert environment_warnings({name: "0"}) == environment_warnings({name: ""}) == []
    assert environment_warnings({"NCCL_DEBUG": "WARN", "TORCH_DISTRIBUTED_DEBUG": "OFF", "PATH": "/bin"}) == []
    assert environment_warnings({"TORCH_COMPILE_DISABLE": "true", "TRITON_INTERPRET": "false"}) == []
    assert len(environment_warnings({uncached: "0"})) == 1, "PyTorch asks whether it is there"


@pytest.mark.parametrize(
    ("given", "few"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "4"}, None),
        ({"LOCAL_WORLD_SIZE": "8"}, "1 cores a rank are few"),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "3"}, None),  # srun's: all eight are its own
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "0", "TORCHELASTIC_RUN_ID": "x"}, "1 cores a rank are few"),
    ],
)
def test_few_cores_a_rank_are_told(given, few):
    warnings = environment_warnings(given)
    assert [warning.startswith(few or "") for warning in warnings] == ([] if few is None else [True])


def test_one_core_of_srun_is_told(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    (warning,) = environment_warnings({"LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "3"})
    assert "SRUN_CPUS_PER_TASK" in warning


def test_limited_locked_memory_is_told_where_hosts_are_several(monkeypatch):
    monkeypatch.setattr(environment.resource, "getrlimit", lambda what: (65536, 65536))
    assert environment_warnings({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}) == []
    (warning,) = environment_warnings({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"})
    assert warning.startswith("locked memory is limited to 64 kB")
