"""Which checkpoint a run goes on from, and whether it may.

In: a configuration, its run directory, and the checkpoints there. Out: the newest whole checkpoint, None for a new run,
or `ConfigError` when going on would mix two runs. Nothing is changed, but that a damaged checkpoint is set aside under
another name once the caller holds the lock of the directory.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from data.shards import MANIFEST_NAME
from models.config import ConfigError, shown
from training.checkpoint import (
    ASIDE,
    FOLDER,
    MARKER,
    TrainState,
    checkpoint_folders,
    find_checkpoints,
    newest_marked,
    read_marker,
    run_of,
    verify,
)
from training.config import Config, resolved
from training.data import check_same_data, open_stream
from training.restarts import VERSIONS, earlier_starts, entries
from training.watchdog import UNWATCHED, Watch

# Keys, or groups of keys, that change no result, or none but by rounding. The data may lie elsewhere: its fingerprint
# is compared instead.
MAY_CHANGE = (
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
    "training.skip_limit",
    "training.hang_",
    "parallel.",
    "checkpoint.",
    "evaluation.",
    "logging.",
)
# Those that a run can go on with, as another experiment: `checkpoint.allow_changes` must name them.
MAY_CHANGE_IF_ALLOWED = (
    "optimizer.",
    "schedule.",
    "training.global_batch_size",
    "training.max_grad_norm",
    "training.skip_sigmas",
    "training.steps",
    "model.z_loss",
)
FILES = ("config.yaml", "metrics.jsonl", "summary.json", "curves.png", VERSIONS)  # that a run writes, of that name
CHANGEABLE = ", ".join(f"{key}KEY" if key.endswith(".") else key for key in MAY_CHANGE_IF_ALLOWED)
DATA = "data"  # in `checkpoint.allow_changes`: the tokens, or their shares in a mixture


def choose_checkpoint(config: Config, *, locked: bool = False, watch: Watch = UNWATCHED) -> Path | None:
    """The checkpoint that `checkpoint.resume` means, None for a new run; checked against the configuration.

    Raises ConfigError when it would be another run. `locked` says that nobody else uses the run directory: checksums
    are then verified, and what is damaged is set aside, with a sentence for each on standard error.
    """
    run_dir, resume, key = Path(config.run.dir), config.checkpoint.resume, config.run.placed_by
    if resume == "never" and earlier_starts(run_dir):
        resume = "auto"  # a launcher repeats the command that began this run
    if resume == "never":
        if find_checkpoints(run_dir) or (run_dir / "metrics.jsonl").exists():
            raise ConfigError(
                f"checkpoint.resume=never would overwrite the run in {run_dir}: choose another {key} or remove it."
            )
        _check_own(run_dir, key)
        check_allowed(config, flatten(resolved(config)))
        return None
    path = own = _newest(run_dir, locked, watch, key)
    if resume != "auto":
        source = run_of(Path(resume)).resolve()  # a run, or a checkpoint
        given = path if path is not None and source == run_dir.resolve() else _given(source, run_dir, config)
        began = None if path is None else read_marker(path).state.begun_from
        continues = began is not None and (began == str(given) or Path(began).parent == (source / FOLDER).resolve())
        if not continues:  # else what it began with may be deleted since
            _check_given(given, resume)
        if path is None:
            path = given
            if locked:
                verify(given, "checkpoint.resume", watch)
        elif path != given and path.parent == given.parent:
            raise ConfigError(
                f"checkpoint.resume={resume} is older than {path.name} of the same run: remove the newer checkpoints, "
                f"or set another {key} to continue there."
            )
        elif path != given and not continues:
            raise ConfigError(
                f"checkpoint.resume={resume} is not what the run in {run_dir} began with, and that has checkpoints of "
                f"its own: set another {key}, or checkpoint.resume=auto to continue it."
            )
    if own is None:
        _check_own(run_dir, key)
    if own is None and (run_dir / "metrics.jsonl").exists() and (run_dir / "config.yaml").exists():
        # It ended before its first checkpoint, or they were removed: it begins again, if it is the same run.
        begun = _begun_with(run_dir, key)
        check_resumable(begun, config, run_dir)
        before = begun.get("checkpoint", {}).get("resume", resume)
        if resume == "auto" and before not in ("auto", "never"):
            raise ConfigError(
                f"checkpoint.resume=auto finds no checkpoint in {run_dir}, whose run began with {before}: give "
                f"checkpoint.resume={before} again, or another {key} for new weights."
            )
    if path is not None:
        saved = read_marker(path).state
        check_resumable(saved.config, config, path)
        if saved.step > config.training.steps:
            raise ConfigError(
                f"training.steps={config.training.steps} lies before step {saved.step}, which {path} has come to: use "
                f"that or more, or another {key}."
            )
        limits = {"training.stop_at": config.training.stop_at, "training.steps": config.training.steps}
        reached = [limit for limit, step in limits.items() if step is not None and step <= saved.step]
        if own is None and reached:  # a run of its own, without a step
            allowed = ",".join(sorted({*config.checkpoint.allow_changes, "training.steps"}))
            permitted = f" with checkpoint.allow_changes=[{allowed}]" if "training.steps" in reached else ""
            raise ConfigError(
                f"checkpoint.resume={resume} has come to step {saved.step} already, so there is none to make: give a "
                f"higher {' and '.join(reached)}{permitted}, or a checkpoint before it."
            )
        stream = open_stream(config)
        if DATA not in config.checkpoint.allow_changes:
            check_same_data(saved.data, saved.sources, stream, path, key)
        if saved.tokenizer != stream.tokenizer["sha256"]:
            raise ConfigError(
                f"{path} was trained with another tokenizer than that of data.path={config.data.paths[0]}: its ids "
                f"mean other text there, so give data of the same tokenizer, or start a new run with another {key}."
            )
    else:
        check_allowed(config, flatten(resolved(config)))
    return path


def _given(source: Path, run_dir: Path, config: Config) -> Path:
    """The newest checkpoint of the run `source`, or `source` itself.

    A run directory that has begun with one, and has none of its own, begins with that again, by the same command.
    Raises ConfigError where it is gone.
    """
    newest, resume, key = newest_marked(source).resolve(), config.checkpoint.resume, config.run.placed_by
    starts = entries(run_dir)
    if newest == source or not starts or not (run_dir / "config.yaml").exists() or find_checkpoints(run_dir):
        return newest
    first, before = starts[0]["step"], _begun_with(run_dir, key).get("checkpoint", {}).get("resume")
    begun = newest.with_name(f"step-{first}")
    if not first or before != resume or begun == newest:
        return newest
    if not (begun / MARKER).exists():
        raise ConfigError(
            f"checkpoint.resume={resume} has come to {newest.name}, and the run in {run_dir} has begun with "
            f"{begun.name}, which is gone: set another {key} to begin with the newer one."
        )
    return begun


def _check_given(path: Path, resume: str) -> None:
    """Raise ConfigError unless `path`, which `checkpoint.resume` means, is a checkpoint, whole by its files' sizes."""
    if path.is_dir() and not path.name.startswith("step-") and not (path / MARKER).exists():
        raise ConfigError(
            f"checkpoint.resume={resume} has no whole checkpoint: give a run that has saved one, as in runs/NAME, or a "
            f"checkpoint, as in runs/NAME/{FOLDER}/step-1000."
        )
    read_marker(path, "checkpoint.resume")


def _check_own(run_dir: Path, key: str) -> None:
    """Raise ConfigError where a folder without checkpoints holds what a new run would write over and must not.

    `key` of the configuration gives another folder.
    """
    if (run_dir / "train" / MANIFEST_NAME).exists():
        raise ConfigError(f"{run_dir} holds token shards: set another {key} for the run.")
    foreign = [name for name in FILES if (run_dir / name).exists()]
    if foreign and not entries(run_dir):  # the first that a run writes is versions.json
        raise ConfigError(f"{run_dir} holds {foreign[0]}, and no {VERSIONS} that tells of a run: set another {key}.")
    try:
        stopped_at = int(json.loads((run_dir / "summary.json").read_text("utf-8"))["stopped_at"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return
    if stopped_at:  # it is written when the checkpoint is
        raise ConfigError(
            f"{run_dir} holds a run that has come to step {stopped_at} and none of its checkpoints (folders "
            f"{FOLDER}/step-N with {MARKER}): put them back, or choose another {key} to begin again."
        )


def _begun_with(run_dir: Path, key: str) -> dict[str, Any]:
    """The configuration of the last start in a run directory, nested."""
    path = run_dir / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} is damaged, and there is no checkpoint to tell what the run was: remove {run_dir} to begin again, "
            f"or choose another {key}."
        )
    return content


def _newest(run_dir: Path, locked: bool, watch: Watch, key: str) -> Path | None:
    """The newest checkpoint of a run that is whole, absolute. Raises ConfigError when there are only damaged ones."""
    broken: dict[Path, str] = {}
    newest = None
    for path in reversed(find_checkpoints(run_dir, on_damage=broken.__setitem__)):
        try:
            if locked:
                verify(path, watch=watch)
        except ConfigError as error:
            broken[path] = str(error)
        else:
            newest = path.resolve()
            break
    aside = checkpoint_folders(run_dir, ASIDE)
    if newest is None and (broken or aside):
        what = next(iter(broken.values())).partition(": use")[0] if broken else f"only {aside[-1].name}"
        raise ConfigError(
            f"{run_dir} has no whole checkpoint ({what}): put a good copy in its place, or choose another {key} to "
            "begin again."
        )
    for path, why in broken.items():
        reason = why.partition(": use another")[0]
        if locked:
            shutil.rmtree(path.with_name(path.name + ASIDE), ignore_errors=True)  # of an earlier one
            path.rename(path.with_name(path.name + ASIDE))
            said = f"warning: {reason}: it is set aside as {path.name}{ASIDE}, and {newest} is continued."
            with suppress(OSError):  # standard error may go to a full disk
                print(said, file=sys.stderr)
    return newest


def check_resumable(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Raise ConfigError, with a table of old and new values, when `config` would not continue what `path` holds.

    Args:
        saved: the resolved configuration of the run so far, nested.
        path: of the checkpoint, for the message.
    """
    old, new = flatten(saved), flatten(resolved(config))
    check_allowed(config, old | new)
    allowed = config.checkpoint.allow_changes
    rows: list[tuple[str, ...]] = [("key", "saved", "now", "")]
    refused, askable = [], []
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(MAY_CHANGE) or old.get(key) == new.get(key):
            continue
        if not key.startswith(MAY_CHANGE_IF_ALLOWED):
            refused.append(key)
            why = "cannot change"
        elif key not in allowed:
            askable.append(key)
            why = "changes the run"
        else:
            continue
        rows.append((key, shown(old.get(key)), shown(new.get(key)), why))
    if not refused and not askable:
        return
    go_on = "" if refused else f" add checkpoint.allow_changes=[{','.join(sorted({*allowed, *askable}))}],"
    remedy = f"keep the old values,{go_on} or start a new run with another {config.run.placed_by}"
    raise ConfigError(f"{path} cannot be continued with another configuration: {remedy}.{table(rows)}")


def of_one_level(saved: TrainState, config: Config, fingerprint: str) -> bool:
    """Whether losses and gradient norms of steps to come are comparable with those before `saved`.

    They are not with other tokens (`fingerprint`), instances a step, or weight of the z-loss.
    """
    before, after = flatten(saved.config), flatten(resolved(config))
    keys = "training.global_batch_size", "model.z_loss"
    return saved.data == fingerprint and all(before.get(key) == after[key] for key in keys)


def check_allowed(config: Config, known: Container[str]) -> None:
    """Raise ConfigError for a word of `checkpoint.allow_changes` that is no `known` key, flat, or never may be.

    It would allow nothing and say nothing. A key that only the saved configuration has is known, too.
    """
    for key in config.checkpoint.allow_changes:
        if key in known and not key.startswith((*MAY_CHANGE, *MAY_CHANGE_IF_ALLOWED)):
            raise ConfigError(
                f"checkpoint.allow_changes=[{key}] can never be: a run goes on with another {CHANGEABLE} only. Leave "
                f"it out, and start a new run with another {config.run.placed_by} for what else is to change."
            )
        if key != DATA and key not in known:
            raise ConfigError(
                f"checkpoint.allow_changes=[{key}] names no key: name {DATA}, {CHANGEABLE}, or leave it out."
            )


def table(rows: list[tuple[str, ...]]) -> str:
    """Lines for `rows` of as many cells each, in columns, to follow a sentence."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"\n  {line}" for line in lines)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def continue_command(*, at_stop: bool) -> str:
    """The command of this run, with where to give it unless that is once and here.

    `at_stop`: the run has come to its training.stop_at, or beyond, where the same command would make no step; this one
    goes on to the last.
    """
    environment = os.environ
    script, *arguments = sys.argv
    if at_stop:
        arguments = [argument for argument in arguments if not argument.startswith("training.stop_at=")]
        arguments.append("training.stop_at=null")
    python = Path(sys.executable)
    if shutil.which(python.name) == str(python):
        python = Path(python.name)
    elif python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    if "TORCHELASTIC_RUN_ID" in environment:
        hosts = environment.get("GROUP_WORLD_SIZE", "1")
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", environment["LOCAL_WORLD_SIZE"]]
        if (restarts := environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
            launcher += ["--max-restarts", restarts]  # without them the next lost rank would end the run for good
        if hosts == "1":
            return shlex.join([str(python), *launcher, script, *arguments])
        meeting = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"  # free again once this launch has ended
        launcher += ["--nnodes", hosts, "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting]
        launcher += ["--rdzv-id", environment["TORCHELASTIC_RUN_ID"]]
        return f"on each of the {hosts} hosts, {shlex.join([str(python), *launcher, script, *arguments])}"
    if "RANK" not in environment:
        return shlex.join([str(python), script, *arguments])
    if "SLURM_JOB_ID" in environment:
        options = {"nodes": "JOB_NUM_NODES", "ntasks-per-node": "NTASKS_PER_NODE", "gpus-per-node": "GPUS_PER_NODE"}
        found = [(f"--{option}", environment.get(f"SLURM_{name}")) for option, name in options.items()]
        chosen = [word for option, value in found if value for word in (option, value)]
        return shlex.join(["sbatch", *chosen, "scripts/slurm/train.sbatch", *arguments])
    return f"on every rank, with RANK and WORLD_SIZE as they were, {shlex.join([str(python), script, *arguments])}"
