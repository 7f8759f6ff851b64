"""What people forget in the environment of a run on GPUs: settings of a debugging session, limits of a host.

In: variables, limits and cores of this process. Out: a sentence for each that makes a run slow, or a network fail. None
is an error: each can be meant.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

from models.config import ConfigError

# What each costs, where its library takes it for set.
COSTLY = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs of a host talk through its memory, not over NVLink",
    "NCCL_SHM_DISABLE": "GPUs of a host may talk over the network",
    "NCCL_IB_DISABLE": "hosts talk over TCP, not over InfiniBand",
    "NCCL_DEBUG": "every rank may print what it sends",
    "TORCH_DISTRIBUTED_DEBUG": "every collective operation may be checked first",
    "TORCH_COMPILE_DISABLE": "nothing is compiled",
    "TORCHDYNAMO_DISABLE": "nothing is compiled",
    "TRITON_INTERPRET": "Triton kernels run in Python",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is a call of the driver, and memory/peak_gb is not to be trusted",
}
ONLY = {  # values that count; of the others all do but nothing and 0
    "TORCH_COMPILE_DISABLE": ("1",),
    "TORCHDYNAMO_DISABLE": ("1",),
    "TRITON_INTERPRET": ("1", "true", "yes", "on", "y"),
    "TORCH_DISTRIBUTED_DEBUG": ("info", "detail"),
    "NCCL_DEBUG": ("info", "abort", "trace"),
}
CORES = 2  # of a rank: its loop, and the threads that load, save and compile beside it


def rank_variable(name: str, otherwise: int) -> int:
    """What a launcher says of this rank, such as WORLD_SIZE; `otherwise` where it says nothing.

    Raises ConfigError for what is no number.
    """
    value = os.environ.get(name)
    if value is None:
        return otherwise
    if not value.isdecimal():
        raise ConfigError(f"{name}={value} in the environment is no number: start ranks with torchrun, or unset it.")
    return int(value)


def environment_warnings(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Sentences for this process, one of the ranks that torchrun or SLURM describes in `environment`, on a GPU."""
    found = []
    for name, cost in COSTLY.items():
        value = environment.get(name, "")
        counts = value.lower() in ONLY[name] if name in ONLY else value not in ("", "0")
        if name == "PYTORCH_NO_CUDA_MEMORY_CACHING":
            counts = name in environment  # PyTorch looks at nothing else
        if counts:
            found.append(f"{name}={value} is set, so {cost}: unset it for runs that are to be fast")
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) / (1 if _has_own_cores(environment) else ranks)
    if cores < CORES:
        found.append(
            f"{cores:.2g} cores a rank are few for loading, saving and compiling: give each {CORES} or more (in SLURM "
            "--cpus-per-task, and SRUN_CPUS_PER_TASK for srun)"
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if ranks < int(environment.get("WORLD_SIZE", "1")) and locked != resource.RLIM_INFINITY:
        found.append(
            f"locked memory is limited to {locked // 1024} kB, and InfiniBand between hosts may fail: ulimit -l "
            "unlimited"
        )
    return found


def _has_own_cores(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this rank, with some of the host's cores; those of torchrun share its own."""
    return "SLURM_PROCID" in environment and "TORCHELASTIC_RUN_ID" not in environment
