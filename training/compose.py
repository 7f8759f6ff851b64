"""Hydra to `Config`: the command line and `configs/` put together, every mistake in them one sentence.

In: the arguments of train.py, or the `config.yaml` of a run directory. Out: a typed `Config` for each job, all of them
before the first starts, or a `ConfigError` that names the key and the nearest valid one. Nothing is written.

A sweep is expanded here, in Hydra's grammar and by its rule (the product of all lists, the last one fastest), because
Hydra's own sweeper knows nothing of our checks and writes files on every rank before the first job starts.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import EnumType
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from models.config import ConfigError
from training.config import Config, resolved

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ConfigStore.instance().store(name="schema", node=Config)  # the first entry of configs/config.yaml's defaults


@dataclass
class Job:
    """One run of a command."""

    config: Config  # composed and typed, not yet validated
    label: str = ""  # in a sweep, the overrides that tell this job from the others


@dataclass
class Plan:
    """What a command asks for: jobs, text, or something of Hydra's."""

    jobs: list[Job] = field(default_factory=list)  # in the order in which they run; a single run is one job
    text: str = ""  # what the command only wants to see
    hydra_arguments: list[str] | None = None  # for Hydra's own command line: its help, or a launcher for `jobs`


def plan(arguments: list[str]) -> Plan:
    """What the arguments of train.py ask for, every job composed. Raises `ConfigError`."""
    command = _parse_flags(arguments)
    if command.shell_completion:
        return Plan(hydra_arguments=arguments)
    texts = list(command.overrides)
    if command.config_dir is not None:
        texts.append(f"hydra.searchpath=['file://{Path(command.config_dir).resolve()}']")
    directory = CONFIGS.parent / (command.config_path or CONFIGS)
    name = command.config_name or "config"
    with initialize_config_dir(version_base="1.3", config_dir=str(directory), job_name="train"):
        overrides = _parse(texts)
        swept = [override for override in overrides if override.is_sweep_override()]
        base = _compose(name, [override for override in overrides if not override.is_sweep_override()])
        if command.help or command.hydra_help or command.info or command.cfg in ("hydra", "all"):
            return Plan(hydra_arguments=arguments)
        if command.multirun or base.hydra.mode == RunMode.MULTIRUN:
            planned = _sweep(name, directory, overrides, base)
        elif swept:
            raise ConfigError(
                f"{swept[0].input_line} holds several values: add -m to run one job for each, or quote a value that "
                f"has commas in it."
            )
        else:
            planned = Plan([Job(_to_config(base))])
    if command.cfg == "job":
        return Plan(text="---\n".join(as_yaml(job.config, command.package) for job in planned.jobs))
    return planned


def job_config(composed: DictConfig) -> Config:
    """The `Config` of a job that one of Hydra's launchers has started, with the job's run directory."""
    settings = HydraConfig.get()
    config = _to_config(composed)
    _place(config, settings.sweep.dir, settings.sweep.subdir, config.run.name)
    return config


def _place(config: Config, directory: str, subdir: str, first: str) -> None:
    """The run directory of a job in the `directory` of a sweep, whose first job has the name `first`."""
    config.run.dir = str(Path(directory) / subdir)
    config.run.sweep_key = "run.name" if directory == f"sweeps/{first}" else "hydra.sweep.dir"  # as in config.yaml


def load_config(path: str | Path) -> Config:
    """The configuration of a run; `path` is its directory or the `config.yaml` in it. Raises `ConfigError`."""
    path = Path(path)
    if path.is_dir():
        path /= "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give the directory of a run, which holds a config.yaml.")
    try:
        return _typed(OmegaConf.load(path))
    except (ConfigError, *_COMPOSITION_ERRORS) as error:
        raise ConfigError(f"{path}: {_explained(error)}") from error


def config_of_checkpoint(path: Path, state: Mapping[str, Any]) -> Config:
    """The configuration that the checkpoint in `path` holds as nested mappings. Raises `ConfigError`."""
    try:
        return _typed(OmegaConf.create(dict(state)))
    except (ConfigError, *_COMPOSITION_ERRORS) as error:
        raise ConfigError(f"{path}: {_explained(error)}") from error


def as_yaml(config: Config, package: str | None = None) -> str:
    """The resolved configuration, or the part of it under the key `package`, as YAML. Raises `ConfigError`."""
    tree: Any = resolved(config)
    for part in package.split(".") if package else ():
        if not isinstance(tree, dict) or part not in tree:
            raise ConfigError(_unknown_key(str(package)))
        tree = tree[part]
    return OmegaConf.to_yaml(OmegaConf.create(tree)) if isinstance(tree, dict | list) else f"{tree}\n"


# Composition ---------------------------------------------------------------------------------------------------------


def _parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Hydra's flags and, in `.overrides`, the rest."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        command, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see --hydra-help.") from error
    if unknown:
        example = unknown[0].lstrip("-") if "=" in unknown[0] else "model=moda_tiny"
        raise ConfigError(f"{unknown[0]} is not a flag: keys are written without dashes, for example {example}.")
    if command.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun is not supported: the same command continues a run.")
    if (command.resolve or command.package) and not (command.cfg or command.help):
        raise ConfigError("--resolve and --package go with --cfg: add --cfg job.")
    if command.config_dir is not None and not Path(command.config_dir).is_dir():
        raise ConfigError(f"--config-dir {command.config_dir} does not exist: give a folder of configuration files.")
    if command.multirun and command.cfg in ("hydra", "all"):
        raise ConfigError(f"--cfg {command.cfg} shows one job: leave out -m, or use --cfg job.")
    return command


def _parse(texts: list[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not (equals or key.startswith("~")):
            raise ConfigError(f"{text} is not an override: write key=value, for example model=moda_tiny.")
        try:
            overrides += parser.parse_overrides([text])
        except HydraException as error:
            if value.startswith("~"):
                raise ConfigError(
                    f"{text} cannot be read: write the folder out, as in {key}={Path(value).expanduser()}."
                ) from error
            raise ConfigError(
                f"{text} cannot be read: quote a value that has special characters, as in {key}='\"{value}\"'."
            ) from error
    return overrides


def _compose(name: str, overrides: list[Override]) -> DictConfig:
    """The whole configuration, Hydra's own part included."""
    for override in overrides:
        _refuse_what_hydra_lets_pass(override)
    try:
        texts = [str(override.input_line) for override in overrides]
        composed = compose(name, texts, return_hydra_config=True)
    except _COMPOSITION_ERRORS as error:
        raise ConfigError(_explained(error)) from error
    sections = OmegaConf.to_container(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    for key in _walk(sections):
        if key not in _KEYS:  # `+model.new=1` and `+new=1` get past the schema
            raise ConfigError(_unknown_key(key))
    return composed


def _refuse_what_hydra_lets_pass(override: Override) -> None:
    key, value = override.key_or_group, override.value()
    if key == "hydra.run.dir":
        raise ConfigError(f"{override.input_line} has no effect: the directory of a run is run.dir.")
    if override.is_add() and key in (*_KEYS, *_CHOSEN_ONLY):
        raise ConfigError(f"{override.input_line} adds a key that exists already: write it without the +.")
    if _KEYS.get(key) is bool and not isinstance(value, bool | str):  # OmegaConf takes any number for a truth value
        raise ConfigError(_wrong_type(key, value))
    options = GlobalHydra.instance().config_loader().get_group_options(key)
    names = value if isinstance(value, list) else [value]
    if options and not override.is_delete() and not all(isinstance(name, str | dict) for name in names):
        raise ConfigError(_unknown_option(key, str(override.input_line).partition("=")[2], options))


def _sweep(name: str, configs: Path, overrides: list[Override], base: DictConfig) -> Plan:
    """All jobs of a sweep over the configuration `name` in `configs`. `base` is composed from what is not swept."""
    kind = base.hydra.runtime.choices
    if kind["hydra/sweeper"] != "basic":
        raise ConfigError(
            f"hydra/sweeper={kind['hydra/sweeper']} is not supported: it chooses jobs by the results of others, "
            f"and here all are checked before the first starts."
        )
    if any(override.key_or_group == "run.dir" for override in overrides):
        raise ConfigError(
            "run.dir cannot be set in a sweep, where each job has a directory of its own: set hydra.sweep.dir instead."
        )
    for override in overrides:
        if override.is_sweep_override() and override.is_hydra_override():
            raise ConfigError(f"{override.input_line} holds several values: Hydra's own keys take one for all jobs.")
    written_down = _parse([f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()])
    # A key given twice keeps its first place and its last values, as with Hydra's sweeper: the same numbers for jobs.
    lists = {override.get_key_element(): _values(override) for override in [*written_down, *overrides]}
    swept = [position for position, values in enumerate(lists.values()) if len(values) > 1]
    jobs: list[Job] = []
    directory = ""
    for number, texts in enumerate(itertools.product(*lists.values())):
        composed = _compose(name, _parse(list(texts)))
        with open_dict(composed):
            composed.hydra.job.num = number
            composed.hydra.job.id = str(number)
        config = _to_config(composed)
        directory = directory or composed.hydra.sweep.dir  # one for all: run.name, its default, may itself be swept
        _place(config, directory, composed.hydra.sweep.subdir, jobs[0].config.run.name if jobs else config.run.name)
        for other in jobs:
            if other.config.run.dir == config.run.dir:
                raise ConfigError(
                    f"hydra.sweep.subdir={composed.hydra.sweep.subdir} is the same for two jobs: "
                    f"use for example hydra.sweep.subdir='${{hydra.job.num}}'."
                )
        label = " ".join(texts[position] for position in swept)
        if any(other.label == label for other in jobs):
            raise ConfigError(f"The sweep has {label} twice, two equal jobs: give each value once.")
        jobs.append(Job(config, label))
    if kind["hydra/launcher"] == "basic":
        return Plan(jobs)
    if "RANK" in os.environ:
        raise ConfigError(
            f"hydra/launcher={kind['hydra/launcher']} starts processes of its own, so torchrun cannot be used with it: "
            f"use python train.py, or leave the launcher out."
        )
    arguments = [str(override.input_line) for override in overrides]
    flags = [f"--config-name={name}", f"--config-path={configs}", "--multirun"]
    return Plan(jobs, hydra_arguments=[*flags, *arguments, f"hydra.sweep.dir='{directory}'"])


def _values(override: Override) -> list[str]:
    """The overrides that a possibly swept one stands for."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line} is not a list of values: use a,b,c or range(...) or choice(...).")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _typed(sections: Any) -> Config:
    return _to_config(OmegaConf.merge(OmegaConf.structured(Config), sections))


def _to_config(composed: Any) -> Config:
    """The typed sections, interpolations resolved against the whole of `composed`."""
    try:
        if "hydra" in composed:
            HydraConfig.instance().set_config(composed)  # for ${hydra:...}
        sections: dict[str, Any] = {f.name: OmegaConf.to_object(composed[f.name]) for f in fields(Config)}
        return Config(**sections)
    except _COMPOSITION_ERRORS as error:
        raise ConfigError(_explained(error)) from error


# Mistakes in one sentence --------------------------------------------------------------------------------------------

_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
_TYPE_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _keys_of(kind: Any, prefix: str) -> dict[str, Any]:
    """Dotted keys of a configuration dataclass, sections included, with the types they are declared to have.

    Elements of a list have the keys `name[].key`.
    """
    keys = {}
    for name, hint in get_type_hints(kind).items():
        keys[prefix + name] = hint
        element = get_args(hint)[0] if get_origin(hint) is list else hint
        if is_dataclass(element):
            keys |= _keys_of(element, f"{prefix}{name}[]." if element is not hint else f"{prefix}{name}.")
    return keys


_KEYS = _keys_of(Config, "")
_HYDRA_KEYS = {"hydra": HydraConf, **_keys_of(HydraConf, "hydra.")}
_LAUNCHERS = {  # of Hydra, in packages of their own
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
_CHOSEN_ONLY = ("experiment", "sweep")  # groups whose options set keys of other sections


def _walk(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested dictionaries, sections included."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield f"{prefix}{name}"
            yield from _walk(branch, f"{prefix}{name}.")


def _explained(error: BaseException) -> str:
    """What an exception of Hydra, OmegaConf or YAML says, in one sentence for a user."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1} is not valid YAML: {error.problem}."
    texts = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        texts.append(str(error))
    text = "\n".join(texts)

    def found(pattern: str) -> str:
        match = re.search(pattern, text)
        return match.group(1) if match else ""

    key, override = found(r"full_key: (\S+)"), found(r"Error merging override (.+)")
    wrong = found(r"Value '(.*)' of type|value: (.*)")
    value = override.partition("=")[2] if override else wrong or "null"
    elements = (found(r"Could not override '([^']+)'") or override.partition("=")[0]) + "[]."
    if any(other.startswith(elements) for other in _KEYS) and key not in _KEYS:  # in an element of a list
        if key.startswith(elements[:-2]):  # the element itself: list[n]
            fields = [other.removeprefix(elements) for other in _KEYS if other.startswith(elements)]
            example = ", ".join(f"{field}: ..." for field in fields)
            return f"{override} cannot be used: an element of {elements[:-3]} is written {{{example}}}."
        key, value = elements + key, wrong
    file = found(r"^In '([^']+)': \w+ raised")
    place = f"{file}.yaml: " if file else ""
    if missing := re.search(r"Could not (?:find|load) '([^']+)/([^'/]*)'", text):
        options = re.findall(r"^\t(\w\S*)$", text, re.MULTILINE)
        return _unknown_option(missing.group(1), missing.group(2), options)
    if "not in '" in text or "not in struct" in text:
        return place + _unknown_key(key)
    if "does not support deletion" in text:
        return f"{override} cannot be removed: give it a value."
    if "nterpolation" in text:
        return f"{place}{key} refers to another value that cannot be used: {texts[-1].splitlines()[0]}."
    if key and re.search(r"convert|not Optional|nvalid type|nvalid value|not a valid", text):
        return place + _wrong_type(key, value)
    if get_origin(_KEYS.get(override.partition("=")[0])) is list:
        return place + _wrong_type(override.partition("=")[0], value)
    return " ".join(texts[0].partition("Config search path")[0].split())


def _wrong_type(key: str, value: Any) -> str:
    key = re.sub(r"\[\d+\]$", "", key)  # an element of a list is wrong where the list is
    hint = (_HYDRA_KEYS if key.startswith("hydra") else _KEYS).get(key)
    if is_dataclass(hint):
        example = next(other for other in (*_KEYS, *_HYDRA_KEYS) if other.startswith(f"{key}."))
        words = f"one of its keys, such as {example}"
    elif get_origin(hint) is list:
        words = f"a list such as {_example_list(get_args(hint)[0])}"
    else:
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        words = " or ".join(
            " or ".join(kind.__members__) if isinstance(kind, EnumType) else _TYPE_WORDS.get(kind, str(kind))
            for kind in kinds
        )
    return f"{key}={value} has the wrong type: use {words}."


def _example_list(element: Any) -> str:
    if is_dataclass(element):
        return f"[{{{', '.join(f'{field.name}: ...' for field in fields(element))}}}]"
    return "[10,20]" if element is int else "[a,b]"


def _unknown_key(key: str) -> str:
    """Names the nearest key: in the same section, else one of that name elsewhere; else all keys of the section."""
    keys = list(_HYDRA_KEYS) if key.startswith("hydra") else [*_KEYS, *_CHOSEN_ONLY]
    section, _, leaf = key.rpartition(".")
    siblings = [other for other in keys if other.rpartition(".")[0] == section]
    for candidates, cutoff in ((siblings, 0.6), (keys, 0.75)):
        leaves = {other.rpartition(".")[2]: other for other in reversed(candidates)}
        if near := difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff):
            return f"unknown key `{key}`: did you mean `{leaves[near[0]]}`?"
    if not siblings:
        return _unknown_key(section)
    names = ", ".join(other.rpartition(".")[2] for other in siblings)
    return f"unknown key `{key}`: the keys {f'of {section}' if section else 'at the top'} are {names}."


def _unknown_option(group: str, name: str, options: list[str]) -> str:
    if group == "hydra/launcher" and name in _LAUNCHERS:
        package = _LAUNCHERS[name]
        return f"{group}={name} is not installed: pip install {package}, or leave it out to run one job after another."
    near = difflib.get_close_matches(name, options, n=1)
    guess = f"did you mean {group}={near[0]}? The" if near else "the"
    return f"{group}={name} does not exist: {guess} options are {', '.join(sorted(options)) or 'none'}."
