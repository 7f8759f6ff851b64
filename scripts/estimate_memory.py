"""Does a configuration fit a GPU: `python scripts/estimate_memory.py model=moda_700m [--gpus 8] [--device-gb 150]`.

In: overrides of train.py; no data and no GPU are needed. Out: parameters, operations and memory of a rank item by item,
and for each kind of activation checkpointing the largest micro-batch that fits; of a sweep (`-m`), the memory of each
run. Exit status 1 when the configuration itself, or one of them, does not fit.
"""

from __future__ import annotations

import argparse
import math
import sys
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.accounting import Memory, count_parameters, describe
from models.config import ACTIVATION_CHECKPOINTING, ConfigError
from models.cross_entropy import chunk_tokens
from scripts.console import run
from training.compose import plan
from training.config import Config
from training.memory_estimate import estimate
from training.out_of_memory import USABLE

LEAST_PROBE = 4  # the smaller of the two micro-batches that the growth is taken from, or larger


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate. Returns the exit status: 0 fits, 1 does not, 2 for a mistake."""
    parser = argparse.ArgumentParser(description="Memory of a training run on a rank, before it is started.")
    parser.add_argument("overrides", nargs="*", help="as for train.py: model=moda_700m training.micro_batch_size=8 ...")
    parser.add_argument("-m", "--multirun", action="store_true", help="a row for each run of a sweep, as train.py -m")
    parser.add_argument("--gpus", type=int, default=1, help="ranks of the run")
    parser.add_argument("--device-gb", type=float, help="memory of a GPU in 10^9 bytes (default: of this machine's)")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow options
    try:
        configs = _configs(options.overrides, options.gpus, options.multirun)
        capacity = _capacity(options.device_gb)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.multirun or len(configs) > 1:
        return _sweep(configs, options.gpus, capacity)
    (config,) = configs.values()
    held = on_gpu(config, options.gpus)
    print(describe(config.model, config.data.sequence_length, held))
    fits = held.total <= USABLE * capacity
    verdict = "fits" if fits else "does not fit"
    print(f"\nThis {verdict} {capacity / 1e9:.0f} GB, of which {USABLE:.0%} are counted on.\n")
    print(_of_evaluation(config), end="")
    print("| activation checkpointing | this micro-batch | largest micro-batch that fits, about |\n|---|---|---|")
    for kind in ACTIVATION_CHECKPOINTING:
        total = on_gpu(config, options.gpus, kind).total
        largest = largest_that_fits(config, options.gpus, kind, capacity)
        print(f"| {kind} | {total / 1e9:.1f} GB | {largest or 'none'} |")
    return 0 if fits else 1


def on_gpu(config: Config, gpus: int, checkpointing: str | None = None) -> Memory:
    """The memory of `config` on a rank of a GPU run, by default as it is configured."""
    return estimate(
        config,
        gpus,
        compute_dtype=_dtype(config),
        compiled=config.parallel.compile is not False,
        activation_checkpointing=checkpointing,
    )


def _dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.training.precision == "fp32" else torch.bfloat16


def sized(config: Config, gpus: int, micro_batch_size: int) -> Config:
    """`config` with another micro-batch, and as many of them a step."""
    training = config.training
    micro_batches = training.global_batch_size // (training.micro_batch_size * gpus)
    batch = micro_batch_size * gpus * micro_batches
    return replace(config, training=replace(training, micro_batch_size=micro_batch_size, global_batch_size=batch))


def largest_that_fits(config: Config, gpus: int, checkpointing: str, capacity: float) -> int:
    """Instances of the largest micro-batch, 0 for none.

    What is held at each moment of a step grows in proportion to it, once the loss takes several chunks of tokens.
    """
    usable, widest = USABLE * capacity, chunk_tokens(sys.maxsize, config.model.padded_vocab_size, _dtype(config))
    least = max(LEAST_PROBE, -(-widest // config.data.sequence_length))

    def held_with(size: int) -> Memory:
        return on_gpu(sized(config, gpus, size), gpus, checkpointing)

    fewer, more = held_with(least), held_with(3 * least)
    if fewer.total > usable:
        return bisect_right(range(1, least), usable, key=lambda size: held_with(size).total)
    largest = math.inf
    for moment, held in fewer.moments.items():
        growth = (more.moments[moment] - held) / (2 * least)
        largest = min(largest, least + (usable - held) / growth if growth else math.inf)
    return math.floor(largest)


def _capacity(device_gb: float | None) -> float:
    if device_gb is None and not torch.cuda.is_available():
        raise ConfigError("--device-gb is needed where no GPU is visible: give the memory of one, such as 150 (H200).")
    if device_gb is not None and not 0 < device_gb * 1e9 < math.inf:
        raise ConfigError(f"--device-gb {device_gb:g} cannot be used: give the memory of a GPU, such as 150 (H200).")
    return device_gb * 1e9 if device_gb else float(torch.cuda.get_device_properties(0).total_memory)


def _configs(overrides: list[str], gpus: int, multirun: bool = False) -> dict[str, Config]:
    """The configurations of the runs, by what tells them apart."""
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus} cannot be used: use a positive integer.")
    configs = {job.label: job.config for job in plan(["-m", *overrides] if multirun else overrides).jobs}
    for label, config in configs.items():
        try:
            config.validate(gpus)
            if config.model.vocab_size is None:
                raise ConfigError(
                    "model.vocab_size=null is known with the data only: give a number, as in 100278 (dolma2)."
                )
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}" if label else str(error)) from error
    return configs


def _of_evaluation(config: Config) -> str:
    """A line where evaluation computes more at a time than training, which is not counted; else nothing."""
    size = config.evaluation.micro_batch_size or 0
    if config.evaluation.every == 0 or size <= config.training.micro_batch_size:
        return ""
    return (
        f"warning: evaluation.micro_batch_size={size} is more than training takes at a time, and is not counted: leave "
        "it away, and evaluation takes as much.\n\n"
    )


def _sweep(configs: dict[str, Config], gpus: int, capacity: float) -> int:
    """Print a row for each run. Returns 1 when one of them does not fit."""
    print(
        f"| run | parameters | memory of a rank | fits {capacity / 1e9:.0f} GB, of which {USABLE:.0%} are counted on |"
    )
    print("|---|---|---|---|")
    status = 0
    for label, config in configs.items():
        held, parameters = on_gpu(config, gpus), count_parameters(config.model).total
        fits = held.total <= USABLE * capacity
        print(
            f"| {label} | {parameters / 1e6:,.1f} M | {held.total / 1e9:.1f} GB | {'yes' if fits else 'no'} |",
            flush=True,
        )
        status |= not fits
    return int(status)


if __name__ == "__main__":
    run(main)
