"""Checkpoints of a run: `checkpoints/step-N/`, in the format of torch.distributed.checkpoint.

In: model, optimizer and a small state (step, position in the data, ...). Out: folders that any number of ranks can
load. `checkpoint.json` holds the small state and is written last: a folder without it is not a checkpoint, whatever
else is in it, and deletion removes it first.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from data.shards import write_atomically
from models.config import ConfigError
from models.decoder import Decoder
from training.distributed import World

MARKER = "checkpoint.json"

# Keys, or groups of keys, that may differ between a checkpoint and the run that continues it. All others decide what
# the weights become. The data may lie elsewhere: its fingerprint is compared instead.
MAY_DIFFER = (
    "run.",
    "data.path",
    "data.mixture",
    "data.verify",
    "data.workers",
    "data.timeout",
    "data.cache",
    "data.prepare",
    "training.stop_at",
    "training.micro_batch_size",
    "training.device",
    "training.precision",
    "parallel.",
    "checkpoint.",
    "evaluation.",
    "logging.",
)


@dataclass
class TrainState:
    """Where a run is: everything but weights, optimizer moments and random state."""

    step: int = 0  # optimizer steps done
    instances: int = 0  # instances of the data order consumed; the position in the data
    tokens: int = 0  # tokens trained on
    data: str = ""  # fingerprint of the training data
    sources: list[dict[str, Any]] = field(default_factory=list)  # what it consists of (data.mixture.Source)
    tokenizer: str = ""  # SHA-256 of its tokenizer
    begun_from: str | None = None  # another run's checkpoint that this run began with
    device: str = "cpu"  # type of device that saved it, whose random state it holds
    wandb_run_id: str | None = None
    world_size: int = 1  # ranks that saved it
    config: dict[str, Any] = field(default_factory=dict)  # the resolved configuration


def find_checkpoints(run_dir: Path, on_damage: Callable[[str], None] = lambda sentence: None) -> list[Path]:
    """Whole checkpoints of a run, oldest first. One that has lost a file, or a part of one, is named to `on_damage`."""
    found = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / MARKER).is_file():
            try:
                read_state(path)
            except ConfigError as error:
                on_damage(str(error))
            else:
                found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def read_state(path: Path, key: str = "") -> TrainState:
    """The small state of a checkpoint, after a look at its files' sizes.

    Raises ConfigError, naming the `key` that gave `path`, when it is not whole.
    """
    named = f"{key}={path}" if key else str(path)
    try:
        content = json.loads((path / MARKER).read_text(encoding="utf-8"))
        state, sizes = TrainState(**content["state"]), content["bytes"]
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{named} is no whole checkpoint (it has no {MARKER}): give a folder checkpoints/step-N."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{named} is damaged ({MARKER} cannot be read: {error}): use another checkpoint.") from error
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ConfigError(f"{named} is damaged ({name} {what}, saved were {size}): use another checkpoint.")
    return state


def check_resumable(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Raise ConfigError, with old and new values, when the configurations would train different models.

    Args:
        saved, current: resolved configurations, nested.
        path: of the checkpoint, for the message.
    """
    old, new = flatten(saved), flatten(current)
    differing = [
        key
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(MAY_DIFFER) and old.get(key) != new.get(key)
    ]
    if differing:
        table = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in differing)
        raise ConfigError(
            f"{path} cannot be continued with another configuration ({table}): keep the old values, "
            "or start a new run with another run.name."
        )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def save_checkpoint(
    run_dir: Path, model: Decoder, optimizer: torch.optim.Optimizer, state: TrainState, world: World, keep: int | None
) -> Path:
    """Save on all ranks together, then delete all but the newest `keep` (None: keep all). Returns the folder.

    Whatever is in the folder already goes first: the caller does not save a step again that it has saved or loaded.
    """
    path = run_dir / "checkpoints" / f"step-{state.step}"
    if world.is_main and path.exists():
        _remove(path)
    dist.barrier()
    state.world_size, state.device = world.size, world.device.type
    ranks = range(world.rank, world.rank + 1)
    dcp.save(_tensors(model, optimizer, ranks, state.device), checkpoint_id=path)
    dist.barrier()  # every rank's files are there
    if world.is_main:
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        marker = {"state": asdict(state), "bytes": sizes}
        write_atomically(path / MARKER, json.dumps(marker, indent=1).encode())
        if keep is not None:
            for old in find_checkpoints(run_dir)[:-keep]:
                _remove(old)
    return path


def load_checkpoint(path: Path, model: Decoder, optimizer: torch.optim.Optimizer | None, world: World) -> TrainState:
    """Load weights, and with an optimizer its moments and the random state, in place on all ranks."""
    state = read_state(path)
    # A rank that the saving run did not have keeps its own random state.
    ranks = range(world.rank, min(world.rank + 1, state.world_size))
    device = "cuda" if state.device == world.device.type == "cuda" else "cpu"
    tensors = _tensors(model, optimizer, ranks, device)
    dcp.load(tensors, checkpoint_id=path)
    if optimizer is None:
        model.load_state_dict(tensors["model"])
        return state
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    for random in tensors["random"].values():
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    return state


def _tensors(model: Decoder, optimizer: torch.optim.Optimizer | None, ranks: range, device: str) -> dict[str, Any]:
    """What goes into the checkpoint files, random states of `ranks` included, that of a GPU if `device` is cuda."""
    if optimizer is None:
        return {"model": model.state_dict()}
    weights, moments = get_state_dict(model, optimizer)
    random = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    return {"model": weights, "optimizer": moments, "random": {f"rank-{rank}": random for rank in ranks}}


def _remove(path: Path) -> None:
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)
