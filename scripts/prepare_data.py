"""Text to token shards, for example

    python scripts/prepare_data.py source=files source.path=DIR tokenizer=PATH_OR_ID output=SHARDS

In: a source (`source=files`, `datasets`, `embedded`, `token_files` or `several`, see configs/source/) and a tokenizer
(a file, a folder, a hub id, or `train`). Out: `output/train`, `output/validation/DOMAIN` and `output/tokenizer.json`,
which `train.py data.path=output` reads. An interrupted command is continued by running it again. `--cfg job` prints the
configuration and stops.

A mistake of the user is one sentence on standard error and exit status 2; a task that waits for others exits with 3;
SIGTERM, SIGINT and SIGUSR1 end it with 143, 130 and 138.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.host_lock import host_lock
from data.interruption import Interrupted, interruptible
from data.prepare import PrepareOptions, WaitingForTasks, prepare, summary
from data.remote import is_remote
from data.several_sources import SINGLE_SOURCES, SeveralSources
from data.shards import DataError
from data.sources import Source
from data.tokenizer_choice import TokenizerRequest

WAITING = 3  # exit status of a task that other tasks have to end before
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SOURCES: dict[str, type[Source]] = SINGLE_SOURCES | {"several": SeveralSources}


@dataclass
class PrepareConfig:
    """Types of configs/prepare_data.yaml; the `source` group has those of its class in `data.sources`."""

    source: Any = MISSING
    output: str = MISSING
    tokenizer: str = MISSING
    tokenizer_vocab_size: int = MISSING
    eos_token: str | None = None
    model_vocab_size: int | None = None
    dtype: str | None = None
    filters: list[Any] = field(default_factory=list)
    on_error: str = MISSING
    tokens_per_file: int = MISSING
    workers: int | None = None
    task: int = MISSING
    tasks: int = MISSING


def load_config(overrides: list[str]) -> DictConfig:
    """Compose and check the configuration; its `source` node has the class of the chosen source as type.

    Raises `DataError` with one sentence for any mistake in `overrides`.
    """
    given = dict(_parse(override) for override in overrides)
    kind = given.pop("source", None)
    if kind not in SOURCES:
        root = [entry.name for entry in fields(PrepareConfig)]
        _check_known([key for key in given if not key.startswith("source.")], root)
        what = "source is not set" if kind is None else f"source={kind} is not a source"
        raise DataError(f"{what}: choose source={', source='.join(SOURCES)}.")
    if "filters" in given and not isinstance(given["filters"], list):
        raise DataError(
            f"filters={given['filters']} is no list: write it as "
            "'filters=[{name: duplicate}, {name: length, min_characters: 200}]'; [] is none."
        )
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        _check_known(list(given), list(_values(compose("prepare_data", [f"source={kind}"]))))
        config = compose("prepare_data", overrides)
    for key, value in _values(config).items():
        if value == "???":
            raise DataError(f"{key} is not set: add {key}=... to the command.")
        if value == "":  # of a shell variable that is not set: as a path it would be the folder one happens to be in
            raise DataError(f"{key}= is empty: give it a value, or leave it out.")
    schema = OmegaConf.structured(PrepareConfig)
    schema.source = OmegaConf.structured(SOURCES[kind])
    try:
        typed = OmegaConf.merge(schema, config)
        OmegaConf.resolve(typed)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{error.full_key}={given.get(str(error.full_key))} cannot be used: {reason}.") from error
    assert isinstance(typed, DictConfig)
    if is_remote(typed.output):  # else a local folder of that name would be made, from which no run reads
        raise DataError(
            f"output={typed.output} is an address: name a folder here, and copy it there when it is ready, which "
            "data.path of a run can then name."
        )
    return typed


def _parse(override: str) -> tuple[str, Any]:
    """Key and value of one `key=value`, by Hydra's own grammar."""
    key, equals, value = override.partition("=")
    if not equals:
        raise DataError(f"{override} is not an override: write key=value.")
    try:
        parsed = OverridesParser.create().parse_override(override)
        if parsed.is_sweep_override():
            raise DataError(f"{override} is several values: give one, in quotes if it contains a comma.")
        return key, parsed.value()
    except HydraException as error:
        raise DataError(f"{override} cannot be parsed: quote the value, as in '{key}=\"{value}\"'.") from error


def _check_known(keys: list[str], known: list[str]) -> None:
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise DataError(f"{key} is not a key of this configuration: the nearest is {nearest}.")


def _values(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values as written, interpolations not resolved."""
    values: dict[str, Any] = {}
    for key in config:
        name, node = prefix + str(key), config._get_node(key)
        if isinstance(node, DictConfig):
            values |= _values(node, f"{name}.")
        else:
            assert isinstance(node, Node)
            values[name] = node._value()
    return values


def run(config: DictConfig) -> None:
    """Prepare what `config` asks for and say what to do with it."""
    chosen: Any = OmegaConf.to_object(config)  # a PrepareConfig, its source one of SOURCES
    source: Source = chosen.source
    request = TokenizerRequest(chosen.tokenizer, chosen.tokenizer_vocab_size, chosen.eos_token, chosen.model_vocab_size)
    options = PrepareOptions(**{entry.name: getattr(chosen, entry.name) for entry in fields(PrepareOptions)})
    output = Path(config.output).expanduser()

    def waiting() -> None:
        print(f"another command prepares output={config.output}: waiting for its end", flush=True)

    with host_lock(output / f"task-{options.task}", waiting):
        manifests = prepare(source, request, output, options)
    first = next(iter(manifests.values()))
    print(
        f"\n{config.output} is ready (tokenizer {first.tokenizer['name']}, each document ends with id {first.eos_id}):"
    )
    for name, manifest in manifests.items():
        print(f"  {name}: {summary(manifest)}")
    command = ["python", "train.py", "model=moda_tiny", *_data_overrides(source, str(output))]
    if not any("validation/" in name for name in manifests):
        print("  no validation text was given, so runs on this data have no validation loss")
        command.append("evaluation.every=0")
    print(f"Train on it with: {shlex.join(command)}")


def _data_overrides(source: Source, output: str) -> list[str]:
    """How a run reads what was prepared from `source`."""
    if not isinstance(source, SeveralSources):
        return [f"data.path={output}"]
    entries = [f"{{path: {output}/{name}, weight: {weight:g}}}" for name, weight in source.weights().items()]
    return ["data=mixture", f"data.mixture=[{', '.join(entries)}]"]


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 a mistake of the user or bad data, 3 other tasks have to end first, 128 + a signal."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        print((CONFIGS / "prepare_data.yaml").read_text(encoding="utf-8"))
        for kind in SOURCES:
            print(f"source={kind}:\n{(CONFIGS / 'source' / f'{kind}.yaml').read_text(encoding='utf-8')}")
        return 0
    show = "--cfg" in arguments
    try:
        config = load_config([argument for argument in arguments if not show or argument not in ("--cfg", "job")])
        if show:
            print(OmegaConf.to_yaml(config), end="")
        else:
            run(config)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WaitingForTasks as waiting:
        print(waiting, file=sys.stderr)
        return WAITING
    except Interrupted as interrupted:
        print(f"{interrupted}: stopped. The same command continues, and keeps all finished parts.", file=sys.stderr)
        return interrupted.status
    return 0


if __name__ == "__main__":
    with interruptible():
        status = main(sys.argv[1:])
    sys.exit(status)
