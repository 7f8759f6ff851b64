"""Checkpoints of a run: `run_dir/checkpoints/step-N`, written by torch.distributed.checkpoint.

In: model, optimizer and a small state (step, position in the data, ...). Out: folders that any number of ranks can
load. `checkpoint.json`, the marker, holds the small state, the size and SHA-256 of every file, and one of all that. It
is written last, after the files were read back: a folder without it is not a checkpoint, whatever else is in it, and
deletion removes it first. `training.saver` writes them, `training.resume` chooses among them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from data.shards import write_atomically
from models.config import ConfigError
from models.decoder import Decoder
from training.distributed import World
from training.optimizer import moments
from training.skip import SpikeFilter
from training.storage import SafeReader, UnsafeCheckpointError, WatchedPlanner, first_difference, read_metadata
from training.watchdog import UNWATCHED, Watch

MARKER = "checkpoint.json"
CHECKSUM = "checksum"  # its key for that of itself
FOLDER = "checkpoints"
ASIDE = ".damaged"  # ending of the name of a checkpoint that was set aside


class NewerCheckpointError(ConfigError):
    """A checkpoint that a later version of this code has written: whole, and not to be passed over."""


@dataclass
class TrainState:
    """Where a run is: everything but weights, optimizer moments, the window of `training.skip` and random state."""

    step: int = 0  # optimizer steps done
    instances: int = 0  # instances of the data order consumed; the position in the data
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # wall-clock time of all starts together
    unrecorded: dict[str, float] = field(default_factory=dict)  # values of a step whose evaluation a signal cut short
    data: str = ""  # fingerprint of the training data
    sources: list[dict[str, Any]] = field(default_factory=list)  # what it consists of (data.mixture.Source)
    tokenizer: str = ""  # SHA-256 of its tokenizer
    begun_from: str | None = None  # another run's checkpoint that this run began with
    device: str = "cpu"  # type of device that saved it, whose random state it holds
    wandb_run_id: str | None = None
    world_size: int = 1  # ranks that saved it
    permanent: bool = False  # never deleted for its age
    config: dict[str, Any] = field(default_factory=dict)  # the resolved configuration


_KINDS: dict[str, Any] = {"seconds": int | float, "begun_from": str | None, "wandb_run_id": str | None}
_KINDS |= {
    known.name: type(getattr(TrainState(), known.name)) for known in fields(TrainState) if known.name not in _KINDS
}


@dataclass(frozen=True)
class Marker:
    """The content of `checkpoint.json`."""

    state: TrainState
    bytes: dict[str, int]  # size of each file
    sha256: dict[str, str]  # hex digest of each file

    def write(self, path: Path) -> None:
        """Make the folder `path` a checkpoint."""
        write_atomically(path / MARKER, json.dumps(sealed(json.loads(json.dumps(asdict(self)))), indent=1).encode())


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a marker, as JSON gives it back, with the SHA-256 of its other keys."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return rest | {CHECKSUM: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run_dir / FOLDER / f"step-{step}"


def checkpoint_folders(run_dir: Path, ending: str = "") -> list[Path]:
    """Folders named as checkpoints, whole or not, oldest step first; with `ASIDE` those that were set aside."""
    found = {}
    for path in (run_dir / FOLDER).glob("step-*"):
        if (match := re.fullmatch(rf"step-(\d+){re.escape(ending)}", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def find_checkpoints(run_dir: Path, on_damage: Callable[[Path, str], None] = lambda path, why: None) -> list[Path]:
    """Checkpoints of a run, oldest first, by their files' sizes. Others that have a marker are named to `on_damage`.

    Raises NewerCheckpointError.
    """
    whole = []
    for path in checkpoint_folders(run_dir):
        if (path / MARKER).is_file():
            try:
                read_marker(path)
            except NewerCheckpointError:
                raise
            except ConfigError as error:
                on_damage(path, str(error))
            else:
                whole.append(path)
    return whole


def run_of(path: Path) -> Path:
    """`path`, but where that is the folder of checkpoints of a run, the run's directory."""
    if not (path / FOLDER).is_dir():  # else it is a run, which may have any name
        for folder in (path, path.resolve()):
            if folder.name == FOLDER:
                return folder.parent
    return path


def newest_marked(path: Path) -> Path:
    """`path` if it is a checkpoint, else the newest one of the run that it means, damaged or not."""
    marked = [folder for folder in checkpoint_folders(run_of(path)) if (folder / MARKER).is_file()]
    return marked[-1] if marked else path


def read_marker(path: Path, key: str = "") -> Marker:
    """The marker of a checkpoint, after a look at its files' sizes.

    Raises ConfigError, naming the `key` that gave `path`, when it is not whole, or of a later version of this code.
    """
    named = f"{key}={path}" if key else str(path)
    try:
        content = json.loads((path / MARKER).read_text(encoding="utf-8"))
        state, sizes, checksums = dict(content["state"]), dict(content["bytes"]), dict(content["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{named} is no whole checkpoint (it {f'has no {MARKER}' if path.is_dir() else 'is no folder'}): give a "
            f"folder {FOLDER}/step-N."
        ) from None
    except KeyError as error:
        raise ConfigError(f"{named} is damaged ({MARKER} has no {error}): use another checkpoint.") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{named} is damaged ({MARKER} cannot be read: {error}): use another checkpoint.") from error
    if content.get(CHECKSUM) != sealed(content)[CHECKSUM]:
        raise ConfigError(f"{named} is damaged ({MARKER} is not what was saved): use another checkpoint.")
    if (named_step := re.fullmatch(r"step-(\d+)", path.name)) and state.get("step") != int(named_step[1]):
        raise ConfigError(f"{named} is damaged (its step is {state.get('step')}): use another checkpoint.")
    unknown = state.keys() - {known.name for known in fields(TrainState)}
    if unknown:
        raise NewerCheckpointError(
            f"{named} was written by a later version of this code ({MARKER} has {', '.join(sorted(unknown))}): use "
            "that version to continue it."
        )
    for known in fields(TrainState):
        if known.name in state and not isinstance(value := state[known.name], _KINDS[known.name]):
            raise ConfigError(f"{named} is damaged ({MARKER} has {known.name}={value!r}): use another checkpoint.")
    marker = Marker(TrainState(**state), sizes, checksums)
    entries = {"sources": (marker.state.sources, dict), "unrecorded": (marker.state.unrecorded.values(), int | float)}
    for name, (found_entries, kind) in entries.items():
        if not all(isinstance(entry, kind) for entry in found_entries):
            raise ConfigError(f"{named} is damaged ({MARKER} has {name}={state[name]!r}): use another checkpoint.")
    if not sizes or sizes.keys() != checksums.keys():
        raise ConfigError(f"{named} is damaged ({MARKER} names no files, or not all): use another checkpoint.")
    for name, size in marker.bytes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ConfigError(f"{named} is damaged ({name} {what}, saved were {size}): use another checkpoint.")
    return marker


def verify(path: Path, key: str = "", watch: Watch = UNWATCHED) -> Marker:
    """The marker of a checkpoint, after every file was read. Raises ConfigError, naming a file that is not as saved."""
    marker = read_marker(path, key)
    named = f"{key}={path}" if key else str(path)
    try:
        name = first_difference(path, marker.sha256, busy=watch.busy)
    except OSError as error:
        raise ConfigError(f"{named} is damaged (it cannot be read: {error}): use another checkpoint.") from error
    if name is not None:
        raise ConfigError(f"{named} is damaged ({name} is not what was saved): use another checkpoint.")
    return marker


def load_checkpoint(
    path: Path,
    model: Decoder,
    optimizer: torch.optim.Optimizer | None,
    world: World,
    spikes: SpikeFilter | None = None,
    watch: Watch = UNWATCHED,
) -> TrainState:
    """Load weights, and with an optimizer its moments, the window of `spikes` and the random state, on all ranks.

    Everything is written in place. Raises ConfigError for a checkpoint that is not whole or not made of tensors.
    """
    state = read_marker(path).state
    # A rank that the saving run did not have keeps its own random state.
    ranks = range(world.rank, min(world.rank + 1, state.world_size))
    device = "cuda" if state.device == world.device.type == "cuda" else "cpu"
    tensors = checkpoint_tensors(model, optimizer, spikes, ranks, device)
    try:
        read_metadata(path)  # dcp tells what it finds there less well
        dcp.load(tensors, storage_reader=SafeReader(path, watch), planner=WatchedPlanner(watch))
    except UnsafeCheckpointError as error:
        raise ConfigError(f"{path} is not loaded: {error}. Use a checkpoint that train.py has written.") from error
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if unreadable := next((cause for cause in causes if isinstance(cause, OSError)), None):
            raise unreadable from error
        unsafe = any(isinstance(cause, pickle.UnpicklingError) for cause in causes)
        what = (
            "a file of it holds something other than tensors"
            if unsafe
            else " ".join(str(causes[0]).split()).rstrip(".")
        )
        raise ConfigError(f"{path} is not loaded: {what}. Use a checkpoint that train.py has written.") from error
    for random in tensors.get("random", {}).values():
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    return state


def checkpoint_tensors(
    model: Decoder,
    optimizer: torch.optim.Optimizer | None,
    spikes: SpikeFilter | None,
    ranks: range,
    device: str,
) -> dict[str, Any]:
    """What the checkpoint files hold, random states of `ranks` included, that of a GPU if `device` is cuda.

    Tensors only, each the very one that training works on but for the random states. What a group of the optimizer is
    set to comes from the configuration.
    """
    tensors: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        tensors["optimizer"] = moments(model, optimizer)
        random = {"cpu": torch.get_rng_state()}
        if device == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        tensors["random"] = {f"rank-{rank}": random for rank in ranks}
    if spikes is not None:
        tensors["skip"] = spikes.state()
    return tensors


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, marker first: what a kill leaves of it is none."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path.resolve())
    if path.is_symlink():
        path.unlink()


def prune(run_dir: Path, keep: int | None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that are not permanent, and what interrupted saves left before them.

    None keeps all. Of those that were set aside the newest stays, as evidence. The caller has verified the newest one.
    Returns what was deleted; raises the first OSError after all others were tried.
    """
    whole = find_checkpoints(run_dir)
    if not whole:
        return []
    unfinished = [path for path in checkpoint_folders(run_dir) if not (path / MARKER).exists()]
    order = checkpoint_folders(run_dir)
    deleted = [path for path in unfinished if order.index(path) < order.index(whole[-1])]
    if keep is not None:
        deleted += [path for path in whole if not read_marker(path).state.permanent][:-keep]
    deleted += checkpoint_folders(run_dir, ASIDE)[:-1]
    failures = []
    for path in deleted:
        try:
            remove_checkpoint(path)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return deleted


def size_in_bytes(path: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir())
