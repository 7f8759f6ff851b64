"""Checks of a valid configuration against the data and the machine, before any process group or file is made.

In: a validated `Config`. Out: the same with what only the data knows filled in (the vocabulary), or `ConfigError` or
`DataError` in one sentence. Every rank comes to its own answer, without communication: the folders and the GPUs of its
host are what it will use.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data.mixture import InstanceStream
from data.shards import DataError, TokenDataset
from models.config import VOCAB_MULTIPLE, ConfigError
from training.compose import Job
from training.config import Config
from training.data import open_stream, validation_folders, verify
from training.environment import rank_variable


def checked(job: Job, say: Callable[[str], None] = lambda line: None) -> Job:
    """`job`, ready to start here and now. Raises what `Config.validate` and `preflight` raise, and names the job.

    `say` gets a line for what takes long.
    """
    try:
        job.config.validate(rank_variable("WORLD_SIZE", 1))
        return replace(job, config=preflight(job.config, say))
    except (ConfigError, DataError) as error:
        if not job.label:
            raise
        raise type(error)(f"{error} (job {job.label})") from error


def preflight(config: Config, say: Callable[[str], None] = lambda line: None) -> Config:
    """`config` with a number in `model.vocab_size`, after all checks; `config` itself is left as it is.

    Raises `ConfigError` for a value that does not fit the data or the machine, `DataError` for data that is missing or
    damaged.
    """
    try:
        _check_paths(config)
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir} cannot be used ({error.strerror}): use another folder.") from error
    stream = _check_data(config, say)
    vocab_size = _vocab_size(config, stream)
    _check_packages(config)
    _check_compiler(config)
    _check_devices(config)  # it imports torch, which takes seconds
    _check_attention(config)
    if config.data.verify:  # last: it may take minutes
        verify(config, say)
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def on_gpu(config: Config) -> bool:
    """Whether a run of `config` will be on this machine's GPUs."""
    if config.training.device == "cpu":
        return False
    import torch  # which takes seconds

    return torch.cuda.is_available()


def _check_paths(config: Config) -> None:
    resume = config.checkpoint.resume
    begun = any(Path(config.run.dir).glob("checkpoints/step-*"))  # then what it began with may be deleted since
    if resume not in ("auto", "never") and not Path(resume).is_dir() and not begun:
        raise ConfigError(
            f"checkpoint.resume={resume} is no folder: use auto, never, or the path of a run or checkpoint, as in "
            f"runs/NAME or runs/NAME/checkpoints/step-1000."
        )
    run_dir = Path(config.run.dir).absolute()
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists() or folder.is_symlink())
    if not existing.exists():
        raise ConfigError(f"run.dir={config.run.dir} cannot be made: {existing} is a link to nothing: remove it.")
    if not existing.is_dir():
        raise ConfigError(f"run.dir={config.run.dir} cannot be made: {existing} is a file, so use another folder.")
    if not os.access(existing, os.W_OK):
        raise ConfigError(
            f"run.dir={config.run.dir} cannot be written: {existing} is not writable, so give access there or use "
            "another folder."
        )


def _check_data(config: Config, say: Callable[[str], None]) -> InstanceStream:
    """The stream of training instances, after all splits that the run reads were looked at."""
    stream = open_stream(config, say)
    if config.evaluation.every == 0:
        return stream
    folders = validation_folders(config.data)
    if not folders:
        raise DataError(
            f"data.path={config.data.path} has no validation domains "
            f"({' or '.join(f'{path}/validation' for path in config.data.paths)}/DOMAIN): prepare some, "
            f"or set evaluation.every=0."
        )
    for folder in folders.values():
        tokenizer = TokenDataset(folder, config.data.sequence_length).manifest.tokenizer
        if tokenizer["sha256"] != stream.tokenizer["sha256"]:
            trained = stream.datasets[0].stream.folder
            raise DataError(f"{folder} and {trained} have different tokenizers: prepare both with the same one.")
    return stream


def _vocab_size(config: Config, stream: InstanceStream) -> int:
    """`model.vocab_size`, or for null the tokenizer's size rounded up; a smaller tokenizer is accepted."""
    needed, chosen = stream.vocab_size, config.model.vocab_size
    if chosen is None:
        return -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if needed > chosen:
        raise ConfigError(
            f"model.vocab_size={chosen} is smaller than the {needed} ids of the tokenizer of data.path="
            f"{config.data.paths[0]} ({stream.tokenizer['name']}): use model.vocab_size=null, "
            f"or data with a smaller tokenizer."
        )
    return chosen


def _check_packages(config: Config) -> None:
    if config.logging.wandb.mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb.mode={config.logging.wandb.mode} needs the package wandb: pip install wandb, "
            f"or set logging.wandb.mode=disabled."
        )


def _check_compiler(config: Config) -> None:
    """PyTorch's compiler builds C++ for a CPU, with what CXX names or g++, no other."""
    if not config.parallel.compile or on_gpu(config):
        return
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise ConfigError(
            f"parallel.compile=true on a CPU needs a C++ compiler, and there is no {compiler}: install it, name "
            "another with CXX, or set parallel.compile=false."
        )


def _check_devices(config: Config) -> None:
    no_memory = (
        "logging.profile.memory=true cannot be used: it records what is allocated on a GPU, and this run is on a CPU, "
        "so set it to false."
    )
    if config.training.device == "cpu":
        if config.logging.profile.memory:
            raise ConfigError(no_memory)
        return
    import torch

    gpus, ranks = torch.cuda.device_count(), rank_variable("LOCAL_WORLD_SIZE", 1)
    if gpus == 0 and config.training.device == "cuda":
        raise ConfigError("training.device=cuda cannot be used: no CUDA device is visible, so use auto or cpu.")
    if gpus == 0 and config.logging.profile.memory:
        raise ConfigError(no_memory)
    if 0 < gpus < ranks:
        raise ConfigError(
            f"training.device={config.training.device} cannot be used: {ranks} ranks of this host share {gpus} GPUs, "
            f"so start torchrun with --nproc-per-node {gpus}, or set training.device=cpu."
        )


def _check_attention(config: Config) -> None:
    """A backend that is asked for by name must be able to take the calls of the model."""
    name, model = config.parallel.attention_backend, config.model
    if name == "auto":
        return
    import torch

    from moda.backends import BACKENDS

    gpu = on_gpu(config)
    dtype = torch.bfloat16 if gpu and config.training.precision != "fp32" else torch.float32
    time, documents = config.data.sequence_length, torch.tensor([0]) if config.data.document_mask else None
    q, k = (
        torch.empty(1, time, heads, model.head_dim, dtype=dtype, device="cuda" if gpu else "cpu")
        for heads in (model.num_heads, model.num_kv_heads)
    )
    if reason := BACKENDS[name].unusable(q, k, documents):
        raise ConfigError(f"parallel.attention_backend={name} cannot be used: {reason}, so set it to auto.")
