"""Validation loss by domain of a checkpoint: `python scripts/evaluate.py runs/NAME` (or runs/NAME/checkpoints/step-N).

In: a checkpoint, and by default the shards and instances that its run was validated on. Out: a table, the numbers as
JSON on request, and on standard error how far it is. On one process or, with torchrun, on several; the numbers are
those of the training loop.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.remote import is_remote
from data.shards import DataError, read_manifest
from eval.perplexity import PerplexityEvaluator
from models.config import ConfigError
from models.decoder import Decoder
from models.parallelize import parallelize
from scripts.console import run
from training.checkpoint import MARKER, load_checkpoint, newest_marked, verify
from training.compose import config_of_checkpoint
from training.config import LARGEST_MICRO_BATCH
from training.data import validation_folders
from training.distributed import distributed_world
from training.evaluation_progress import EvaluationProgress
from training.metrics import Console


def main(arguments: list[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit status: 0, or 2 for something that cannot be evaluated."""
    parser = argparse.ArgumentParser(description="Validation loss, perplexity and bits per byte of a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="runs/NAME/checkpoints/step-N, or runs/NAME for its newest")
    parser.add_argument("--data", help="shards directory (default: that of the run)")
    parser.add_argument("--instances", type=int, help="of each domain, 0 for all (default: as in the run)")
    parser.add_argument(
        "--micro-batch-size", type=int, help="instances a rank computes at a time (default: as in the run)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        metrics = evaluate(options)
    except (ConfigError, DataError) as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if speaks:
        print(table(metrics))
        if options.json is not None:
            options.json.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, float]:
    """The metrics of `eval.perplexity`, with the step of the checkpoint. Raises ConfigError or DataError."""
    if options.instances is not None and options.instances < 0:
        raise ConfigError(f"--instances {options.instances} cannot be used: use a positive integer, or 0 for all.")
    if options.micro_batch_size is not None and options.micro_batch_size < 1:
        raise ConfigError(f"--micro-batch-size {options.micro_batch_size} cannot be used: use a positive integer.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda cannot be used: no CUDA device is visible, so use auto or cpu.")
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json} cannot be written: {options.json.parent} does not exist.")
    if options.json is not None and (options.json.is_dir() or not os.access(options.json.parent, os.W_OK)):
        raise ConfigError(f"--json {options.json} cannot be written: name a new file in a folder with access.")
    if options.data is not None and "://" not in options.data and not Path(options.data).is_dir():
        raise ConfigError(f"--data {options.data} is no folder: name a prepared shards directory.")
    checkpoint = newest_marked(options.checkpoint)
    if not (checkpoint / MARKER).is_file():
        raise ConfigError(
            f"{checkpoint} is no whole checkpoint, nor a run that has one: give runs/NAME or "
            "runs/NAME/checkpoints/step-N."
        )
    state = verify(checkpoint).state
    config = config_of_checkpoint(checkpoint, state.config)
    most = LARGEST_MICRO_BATCH // config.data.sequence_length
    if options.micro_batch_size is not None and options.micro_batch_size > most:
        raise ConfigError(
            f"--micro-batch-size {options.micro_batch_size} cannot be used: use at most {most:,} instances of "
            f"data.sequence_length={config.data.sequence_length}."
        )
    data = replace(config.data, path=options.data, mixture=[]) if options.data else config.data
    shards = ", ".join(data.paths)
    instances = config.evaluation.instances if options.instances is None else options.instances or None
    size = options.micro_batch_size or config.evaluation.micro_batch_size or config.training.micro_batch_size
    folders = validation_folders(data)
    gone = [path for path in data.paths if not is_remote(path) and not Path(path).is_dir()]
    if not folders and gone:
        raise DataError(
            f"{gone[0]}, where the data of {checkpoint} was, does not exist: bring it back, or name a prepared shards "
            "directory with --data."
        )
    if not folders:
        raise DataError(f"{shards} has no validation domains: name a prepared shards directory with --data.")
    for folder in folders.values():
        if read_manifest(folder).tokenizer["sha256"] != state.tokenizer:
            raise DataError(
                f"{shards} has another tokenizer than the data of {checkpoint}: name shards of the run's tokenizer "
                "with --data."
            )
    with distributed_world(options.device) as world:
        evaluator = PerplexityEvaluator(
            folders,
            data.sequence_length,
            instances=instances,
            micro_batch_size=size,
            document_mask=data.document_mask,
            rank=world.rank,
            world_size=world.size,
            reduce=world.sum,
        )
        with torch.device("meta"):
            model = Decoder(config.model)
        model = parallelize(model, world.mesh, compute_dtype=world.compute_dtype(config.training.precision))
        load_checkpoint(checkpoint, model, None, world)
        console = Console(evaluator.size, enabled=world.is_main, stream=sys.stderr)
        progress = EvaluationProgress(evaluator.size, data.sequence_length, console.say)
        return {"step": state.step} | (evaluator.evaluate(model, world.device, done=progress) or {})


def table(metrics: dict[str, float]) -> str:
    """A row a domain, aligned."""
    names = ("loss", "perplexity", "bits_per_byte")
    domains = [key.split("/")[1] for key in metrics if key.endswith("/loss")]
    head = f"step {metrics['step']:,}"
    rows = [f"{head:<24}" + "".join(f"{name:>15}" for name in names)]
    for domain in domains:
        values = [metrics.get(f"validation/{domain}/{name}") for name in names]
        rows.append(f"{domain:<24}" + "".join(" " * 15 if value is None else f"{value:15.4f}" for value in values))
    return "\n".join(rows)


if __name__ == "__main__":
    run(main)
