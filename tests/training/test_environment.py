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
    (warning,) = environment_warnings({name: "1"})
    assert warning == f"{name}=1 is set, so {environment.COSTLY[name]}: unset it for runs that are to be fast"
    assert environment_warnings({name: "0"}) == environment_warnings({name: ""}) == []


def test_settings_that_cost_nothing_get_no_warning():
    assert environment_warnings({"NCCL_DEBUG": "warn", "TORCH_DISTRIBUTED_DEBUG": "OFF", "PATH": "/bin"}) == []
    assert environment_warnings({"NCCL_DEBUG": "INFO"})[0].startswith("NCCL_DEBUG=INFO is set, so ")


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
