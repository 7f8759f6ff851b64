"""What a run was made with: package versions, commit, machine. One entry each time the run was started or continued."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from data.shards import write_atomically
from training.distributed import World
from training.restarts import VERSIONS, entries, last_record, launch

PACKAGES = (
    *("torch", "triton", "transformers", "datasets", "tokenizers", "hydra-core", "wandb", "numpy"),
    *("flash-attn-4", "flash-attn", "quack-kernels"),  # optional; attention and SwiGLU take them where they are faster
)


def record_versions(run_dir: Path, world: World, step: int) -> None:
    """Append an entry to `versions.json`: a list, oldest start first; a damaged file begins anew."""
    starts = entries(run_dir)
    starts.append(
        {
            "step": step,
            "found": last_record(run_dir),  # what the start before has come to
            "launch": launch(),
            "command": " ".join(sys.argv),
            "ranks": world.size,
            **environment(world.device.type),
        }
    )
    write_atomically(run_dir / VERSIONS, json.dumps(starts, indent=1).encode())


def environment(device: str) -> dict[str, Any]:
    """Time, commit, packages and machine; `device` is "cpu" or "cuda"."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "host": platform.node(),
    }


def commit() -> dict[str, Any] | None:
    """Hash of the code's commit and whether files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {
            "hash": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
