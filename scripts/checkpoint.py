"""Checkpoints of a run: what there is, whether it is whole, what it holds, one file of it, fewer of them.

    python scripts/checkpoint.py list runs/NAME
    python scripts/checkpoint.py verify runs/NAME                     # every file of every checkpoint, by SHA-256
    python scripts/checkpoint.py inspect runs/NAME/checkpoints/step-N # step, tokens, shapes, norms
    python scripts/checkpoint.py copy runs/NAME weights.safetensors   # one file; --all adds the optimizer's moments
    python scripts/checkpoint.py prune runs/NAME --keep 1             # the newest verified one is never deleted

Where a run is given, its newest checkpoint is meant. Nothing that is in a checkpoint is executed. Exit status: 0; 1
when `verify` finds damage; 2 for something that cannot be done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.config import ConfigError
from scripts.console import run
from training.checkpoint import (
    ASIDE,
    MARKER,
    checkpoint_folders,
    newest_marked,
    prune,
    read_marker,
    run_of,
    size_in_bytes,
    verify,
)
from training.lock import run_lock
from training.metrics import format_count
from training.storage import SafeReader, UnsafeCheckpointError, read_metadata

PICKLES = (".pt", ".pth", ".bin", ".ckpt")  # what such names mean to others


def main(arguments: list[str] | None = None) -> int:
    """Do as the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Look into, check, copy and delete checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("list", "all of a run"), ("verify", "by checksum: one, or all of a run"), ("inspect", "one")):
        commands.add_parser(name, help=text).add_argument("path", type=Path, help="runs/NAME, or a checkpoint of it")
    copy = commands.add_parser("copy", help="into one safetensors file")
    copy.add_argument("path", type=Path, help="runs/NAME, or a checkpoint of it")
    copy.add_argument("file", type=Path, help="the new file")
    copy.add_argument("--all", action="store_true", help="moments and random states too, not the weights alone")
    fewer = commands.add_parser("prune", help="delete old ones")
    fewer.add_argument("path", type=Path, help="runs/NAME")
    fewer.add_argument("--keep", type=int, required=True, help="newest checkpoints that stay, permanent ones apart")
    options = parser.parse_args(arguments)
    try:
        if not options.path.is_dir():
            raise ConfigError(
                f"{options.path} is no folder: give a run directory, as in runs/NAME, or a checkpoint of it."
            )
        options.path = run_of(options.path)
        return globals()[f"{options.command}_"](options)
    except BrokenPipeError:
        raise
    except (ConfigError, UnsafeCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except dcp.api.CheckpointException as error:
        cause = next(cause for cause, _ in error.failures.values())
        reason = "a file of it holds something other than tensors" if isinstance(cause, UnpicklingError) else cause
        print(f"error: {options.path} cannot be read ({reason}): use another checkpoint.", file=sys.stderr)
        return 2


def list_(options: argparse.Namespace) -> int:
    """A row a checkpoint, oldest first; folders that are none say why."""
    found = checkpoint_folders(options.path)
    if not found:
        raise ConfigError(f"{options.path} has no checkpoints: give a run directory, as in runs/NAME.")
    print(f"{'checkpoint':<16}{'tokens':>10}{'size':>12}{'ranks':>7}  ")
    for path in found:
        if not (path / MARKER).exists():
            print(f"{path.name:<16}{'':>29}  no checkpoint: its save was interrupted")
            continue
        try:
            state = read_marker(path).state
        except ConfigError as error:
            print(f"{path.name:<16}{'':>29}  {error}")
            continue
        size = f"{size_in_bytes(path) / 1e6:,.1f} MB"
        kind = "permanent" if state.permanent else ""
        print(f"{path.name:<16}{format_count(state.tokens):>10}{size:>12}{state.world_size:>7}  {kind}".rstrip())
    for path in checkpoint_folders(options.path, ASIDE):
        print(f"{path.name:<16}{'':>10}{size_in_bytes(path) / 1e6:>9,.1f} MB{'':>7}  set aside")
    return 0


def verify_(options: argparse.Namespace) -> int:
    """Read every file of one checkpoint, or of all of a run."""
    marked = [path for path in checkpoint_folders(options.path) if (path / MARKER).exists()]
    if not marked and not (options.path / MARKER).exists():
        raise ConfigError(
            f"{options.path} has no checkpoints: give a run directory, as in runs/NAME, or a checkpoint of it."
        )
    damaged = 0
    for path in marked or [options.path]:
        try:
            files = verify(path).sha256
            print(f"{path}: whole, {len(files)} files")
        except ConfigError as error:
            if path in marked and not (path / MARKER).exists():
                print(f"{path}: its run has deleted it meanwhile")
                continue
            damaged += 1
            print(f"error: {error}", file=sys.stderr)
    return int(damaged > 0)


def inspect_(options: argparse.Namespace) -> int:
    """Step, position, and of every weight its shape, dtype and norm; nothing of a checkpoint that is damaged."""
    path = newest(options.path)
    with held(path):
        _inspect(path)
    return 0


def _inspect(path: Path) -> None:
    marker = verify(path)
    state = marker.state
    print(f"{path}: step {state.step:,}, {state.tokens:,} tokens, {state.instances:,} instances of data {state.data}")
    print(f"saved by {state.world_size} rank(s) on {state.device} after {state.seconds:,.0f} s of training")
    print(f"whole: its {len(marker.sha256)} files have the checksums of when they were saved")
    total, groups = 0, {"model": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    for name, tensor in tensors(path):
        kind = name.partition(".")[0] if name.startswith("model.") else name.rpartition(".")[2]
        norm = tensor.double().norm().item()
        if kind in groups:
            groups[kind] += norm**2
        if kind == "model":
            total += tensor.numel()
            shape = " × ".join(map(str, tensor.shape))
            print(f"  {name.removeprefix('model.'):<44}{shape:>16}  {str(tensor.dtype)[len('torch.') :]}{norm:12.4f}")
    print(f"{total:,} weights; norms of all together: " + ", ".join(f"{k} {v**0.5:.4g}" for k, v in groups.items()))


def copy_(options: argparse.Namespace) -> int:
    """One safetensors file: names as in the model, the configuration in the file's own metadata."""
    path = newest(options.path)
    if options.file.exists():
        raise ConfigError(f"{options.file} exists: name a new file.")
    if options.file.suffix in PICKLES:
        raise ConfigError(
            f"{options.file} is the name of a pickle, and the copy is a safetensors file: name it "
            f"{options.file.with_suffix('.safetensors').name}."
        )
    if not options.file.absolute().parent.is_dir():
        raise ConfigError(f"{options.file} cannot be written (there is no such folder): name another file.")
    if not os.access(options.file.absolute().parent, os.W_OK):  # before all is read
        raise ConfigError(f"{options.file} cannot be written (no access to its folder): name another file.")
    with held(path):
        state = verify(path).state
        chosen = {
            name if options.all else name.removeprefix("model."): tensor
            for name, tensor in tensors(path)
            if options.all or name.startswith("model.")
        }
    metadata = {"step": str(state.step), "tokens": str(state.tokens), "config": json.dumps(state.config)}
    partial = options.file.with_name(f"{options.file.name}.partial")
    try:
        save_file(chosen, partial, metadata)
        os.umask(mask := os.umask(0o077))
        partial.chmod(0o666 & ~mask)  # as any new file: safetensors lets nobody but its owner read it
        partial.rename(options.file)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigError(
            f"{options.file} cannot be written ({error}): name a file where there is room and access."
        ) from error
    print(f"{options.file}: {len(chosen)} tensors of step {state.step:,}, {options.file.stat().st_size / 1e6:,.1f} MB")
    return 0


def prune_(options: argparse.Namespace) -> int:
    """Delete old checkpoints, and those set aside but the newest, once the newest checkpoint was verified.

    No run may be going on there.
    """
    if options.keep < 1:
        raise ConfigError(f"--keep {options.keep} cannot be used: keep at least 1.")
    if not checkpoint_folders(options.path):
        raise ConfigError(f"{options.path} has no checkpoints: give a run directory, as in runs/NAME.")
    with run_lock(newest_marked(options.path).parents[1]):
        try:
            verify(newest(options.path))
        except ConfigError as error:
            raise ConfigError(f"{error} Nothing is deleted: start the run once, which sets that one aside.") from error
        deleted = prune(options.path, options.keep)
    print("\n".join(f"deleted {path}" for path in deleted) or "nothing to delete")
    return 0


def newest(path: Path) -> Path:
    """`path` if it is a checkpoint, else the newest one of the run in it.

    Raises ConfigError when there is none, or it is damaged.
    """
    chosen = newest_marked(path)
    read_marker(chosen)
    return chosen


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A checkpoint that its run deletes while it is read is none that is damaged: ConfigError says so."""
    try:
        yield
    except (ConfigError, UnsafeCheckpointError, OSError, dcp.api.CheckpointException) as error:
        if isinstance(error, BrokenPipeError) or (path / MARKER).exists():
            raise
        raise ConfigError(f"{path} was deleted by its run while it was read: repeat the command.") from error


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and content of every tensor of a checkpoint, one at a time."""
    entries = read_metadata(path).state_dict_metadata
    for name in sorted(entries):
        try:
            tensor = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)  # type: ignore[union-attr]
        except RuntimeError as error:  # a size that is none, or that no memory holds
            raise UnsafeCheckpointError(f"{path} cannot be read: {name} is no tensor ({error}).") from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant
            dcp.load({name: tensor}, storage_reader=SafeReader(path), no_dist=True)
        yield name, tensor


if __name__ == "__main__":
    run(main)
