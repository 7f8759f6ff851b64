"""The whole configuration of a run: one dataclass a group, checked before any process group or file is made.

In: the values that `training.compose` puts together from `configs/` and the command line. Out: `Config.validate`
accepts them or raises `ConfigError` in one sentence; it looks at nothing but the values and the number of ranks, where
`training.preflight` looks at the data and the machine. `models.config.ModelConfig` holds the `model` group.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from models.config import ACTIVATION_CHECKPOINTING, ATTENTION_BACKENDS, ConfigError, ModelConfig, choices, require

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
PACKING = ("none", "best_fit")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
WANDB_MODES = ("online", "offline", "disabled")
LARGEST_STEPS, LONGEST_TIMEOUT = 10**9, 1e9  # the latter about what a lock can wait, in seconds
LONGEST_NAME = 255  # bytes of a file's name, on most systems
LARGEST_LR = 100  # AdamW moves a weight by as much a step: no model is trained by more
LARGEST_WINDOW = 100_000  # steps: each step looks at all of them, on the device
# Far beyond what can be trained: a slip, refused before anything is estimated, listed or allocated for it.
LARGEST_BATCH, LARGEST_MICRO_BATCH, MOST_WORKERS = 2**20, 2**24, 256  # instances; tokens; threads


class TrainingError(RuntimeError):
    """A run that cannot go on, on all ranks alike. The message is one sentence for the user."""


class LostRankError(TrainingError):
    """Another rank is missing: the same command may succeed."""


class RankError(TrainingError):
    """As `TrainingError`, of one rank: the others do not know yet."""


def one_line(error: BaseException | None) -> str:
    """What an error is and says, for a part of a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@dataclass
class RunConfig:
    """Where a run lives and what it is called."""

    name: str = "run"  # label in logs, reports and wandb; the default run directory is named after it
    dir: str = "runs/run"  # everything the run leaves: configuration, metrics, checkpoints, plot

    sweep_key = ""  # no field, as it is not for the user: of a job of a sweep, the key that places all of them

    @property
    def placed_by(self) -> str:
        """The key to change for another run directory: `run.name` where that names it, as in configs/config.yaml."""
        return self.sweep_key or ("run.name" if self.dir == f"runs/{self.name}" else "run.dir")

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        require(bool(self.name.strip()), "run.name", self.name, "use a name such as run.name=first")
        outside = ".." in self.name.split("/") or self.name.startswith("/")
        require(not outside, "run.name", self.name, "use a name, and run.dir for the place of the run directory")
        require(bool(self.dir.strip()), "run.dir", self.dir, "use a folder such as run.dir=runs/first")
        short = all(len(name.encode()) <= LONGEST_NAME for name in self.dir.split("/"))
        require(short, "run.dir", self.dir, f"use names of at most {LONGEST_NAME} bytes, of run.name too")


@dataclass
class MixtureEntry:
    """One dataset of a mixture."""

    path: str = ""  # as `data.path`
    weight: float = 1.0  # its share of the instances, relative to the others


@dataclass
class DataConfig:
    """Token shards and how they are cut."""

    path: str = "shards/c4"  # folder with train/ and validation/DOMAIN/, or its address (s3://, gs://, https://)
    mixture: list[MixtureEntry] = field(default_factory=list)  # in place of `path`: several, each with a weight
    sequence_length: int = 4096  # tokens in an instance
    packing: str = "none"  # none (documents are concatenated and cut), or best_fit (whole documents and padding)
    document_mask: bool = False  # tokens see their own document only, and positions restart with it
    verify: bool = True  # compare shards with their checksums at the start, once for as long as they do not change
    workers: int = 1  # threads of each rank that read batches ahead
    timeout: float = 300.0  # seconds a batch may take to be read before the run stops with a checkpoint
    cache: str | None = None  # folder for copies of remote shards (null: ~/.cache/moda)
    prepare: str = ""  # the command that prepares this data, shown when `path` has no shards

    @property
    def paths(self) -> list[str]:
        """Of all datasets."""
        return [entry.path for entry in self.mixture] or [self.path]

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        if self.mixture:
            remedy = "leave one of them out (data=mixture sets data.path to nothing)"
            require(not self.path.strip(), "data.path", self.path, f"data.mixture is given too: {remedy}")
        else:
            remedy = "use a folder of token shards, as in data.path=SHARDS, or several in data.mixture"
            require(bool(self.path.strip()), "data.path", self.path, remedy)
        for number, entry in enumerate(self.mixture):
            key = f"data.mixture[{number}]"
            require(bool(entry.path.strip()), f"{key}.path", entry.path, "use a folder of token shards")
            require(0 < entry.weight < math.inf, f"{key}.weight", entry.weight, "use a positive number")
            twice = entry.path in self.paths[:number]
            require(
                not twice, f"{key}.path", entry.path, "it is there before: give it once, with the sum of the weights"
            )
        length, largest = self.sequence_length, LARGEST_MICRO_BATCH
        require(1 <= length <= largest, "data.sequence_length", length, f"use 1 to {largest:,} tokens")
        require(self.packing in PACKING, "data.packing", self.packing, choices(PACKING))
        require(1 <= self.workers <= MOST_WORKERS, "data.workers", self.workers, f"use 1 to {MOST_WORKERS} threads")
        most = LONGEST_TIMEOUT
        require(
            0 < self.timeout <= most, "data.timeout", self.timeout, f"use more than 0 and at most {most:.0e} seconds"
        )


@dataclass
class TrainingConfig:
    """Length, batch and seed."""

    steps: int = 95_367  # optimizer steps of the whole schedule (paper: 400 B tokens)
    global_batch_size: int = 1024  # instances an optimizer step sees, over all ranks and micro-batches
    micro_batch_size: int = 8  # instances one rank computes at a time
    seed: int = 0  # of initialisation and of the data order
    stop_at: int | None = None  # stop after this step, schedule untouched (null: run to `steps`)
    device: str = "auto"  # auto (cuda when there is one), cpu or cuda
    precision: str = "auto"  # compute dtype: auto (bf16 on cuda, fp32 on cpu), fp32 or bf16; master weights are fp32
    max_grad_norm: float = 1.0  # global gradient norm is clipped to this (0: off)
    skip_sigmas: float = 6.0  # a step whose loss or gradient norm is so many deviations too high is skipped (0: never)
    skip_window: int = 128  # steps that mean and deviation are taken over; half of them must be known
    skip_limit: int = 20  # the run ends after so many skipped steps in a row, those that are no number included
    hang_factor: float = 30.0  # a run that makes no step for so many median steps ends, with stack traces (0: never)
    hang_seconds: float = 300.0  # but not before this; also the limit between two marks of a start or a save

    @property
    def last_step(self) -> int:
        """The step at which a start ends."""
        return min(self.steps, self.stop_at or self.steps)

    def validate(self, world_size: int) -> None:
        """Raise `ConfigError` for the first value that cannot be used on `world_size` ranks."""
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "use a positive integer")
        steps, largest = self.steps, LARGEST_STEPS
        require(steps <= largest, "training.steps", steps, f"use at most {largest:,}")
        batch, largest = self.global_batch_size, LARGEST_BATCH
        require(batch <= largest, "training.global_batch_size", batch, f"use at most {largest:,} instances")
        require(0 <= self.seed < 2**63, "training.seed", self.seed, "use 0 or a positive integer below 2^63")
        require(
            self.stop_at is None or 1 <= self.stop_at <= self.steps,
            "training.stop_at",
            self.stop_at,
            f"use null (run to the end) or a step from 1 to training.steps={self.steps}",
        )
        require(self.device in DEVICES, "training.device", self.device, choices(DEVICES))
        require(self.precision in PRECISIONS, "training.precision", self.precision, choices(PRECISIONS))
        require(
            0 <= self.max_grad_norm < math.inf,
            "training.max_grad_norm",
            self.max_grad_norm,
            "use 0 (off) or a positive number",
        )
        for name, word in (("skip_sigmas", "skips only what is no number"), ("hang_factor", "never ends a run")):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name}", value, f"use a positive number, or 0 ({word})")
        window, largest = self.skip_window, LARGEST_WINDOW
        require(4 <= window <= largest, "training.skip_window", window, f"use 4 to {largest:,} steps")
        require(self.skip_limit >= 1, "training.skip_limit", self.skip_limit, "use a positive number of steps")
        require(1 <= self.hang_seconds < math.inf, "training.hang_seconds", self.hang_seconds, "use 1 or more")
        if self.global_batch_size % (self.micro_batch_size * world_size):
            raise ConfigError(self._indivisible(world_size))

    def _indivisible(self, world_size: int) -> str:
        unit = self.micro_batch_size * world_size
        below = self.global_batch_size // unit * unit
        remedy = f"use training.global_batch_size={f'{below} or ' if below else ''}{below + unit}"
        share, rest = divmod(self.global_batch_size, world_size)
        if rest == 0:
            divisor = next(d for d in range(min(self.micro_batch_size, share), 0, -1) if share % d == 0)
            remedy += f", or training.micro_batch_size={divisor}"
        return (
            f"training.global_batch_size={self.global_batch_size} is not divisible by "
            f"training.micro_batch_size={self.micro_batch_size} × world size {world_size} = {unit}: {remedy}."
        )


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 3e-4  # peak learning rate
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on everything, norms too, but the input embedding

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        usable = "use a positive number"
        require(0 < self.lr <= LARGEST_LR, "optimizer.lr", self.lr, f"{usable} such as 3e-4, at most {LARGEST_LR}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "use a number from 0 to below 1")
        require(0 < self.eps <= 1, "optimizer.eps", self.eps, f"{usable} such as 1e-8, at most 1")
        require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "use 0 or more")


@dataclass
class ScheduleConfig:
    """Learning rate over steps, as a factor of the peak."""

    name: str = "cosine"  # cosine, linear, constant or wsd (warm-up, stable, decay)
    warmup_steps: int = 2000  # linear from 0 to the peak
    final_lr_ratio: float = 0.1  # learning rate of the last step as a fraction of the peak (constant ignores it)
    decay_fraction: float = 0.2  # wsd: the share of all steps, at the end, over which the rate falls linearly

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        require(self.name in SCHEDULES, "schedule.name", self.name, choices(SCHEDULES))
        require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "use 0 (none) or more")
        ratio, fraction = self.final_lr_ratio, self.decay_fraction
        require(0 <= ratio <= 1, "schedule.final_lr_ratio", ratio, "use a number from 0 to 1")
        require(0 < fraction <= 1, "schedule.decay_fraction", fraction, "use a number above 0, at most 1")


@dataclass
class ParallelConfig:
    """How the model is laid out over devices."""

    # what is computed again in backward: none, selective (all but attention) or full (each block)
    activation_checkpointing: str = "none"
    compile: bool | None = None  # torch.compile of what lies between attention operators (null: on a GPU)
    attention_backend: str = "auto"  # of moda.attention: auto (the fastest that is exact), joined, fused or reference
    # FSDP2 frees gathered weights after forward: saves 2 bytes a weight of the model, and gathers all of them twice.
    reshard_after_forward: bool = False
    replicate: int = 1  # copies of the sharded model (HSDP), each over world size / replicate ranks, say a host's

    def validate(self, world_size: int) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        word = self.activation_checkpointing
        known = word in ACTIVATION_CHECKPOINTING
        require(known, "parallel.activation_checkpointing", word, choices(ACTIVATION_CHECKPOINTING))
        backend = self.attention_backend
        require(backend in ATTENTION_BACKENDS, "parallel.attention_backend", backend, choices(ATTENTION_BACKENDS))
        require(
            self.replicate >= 1 and world_size % self.replicate == 0,
            "parallel.replicate",
            self.replicate,
            f"use a positive divisor of the number of ranks, {world_size}",
        )


@dataclass
class CheckpointConfig:
    """When to save and what to continue."""

    every: int = 1000  # most steps that a kill loses; a save begins as much earlier as its write needs
    keep: int | None = 3  # newest checkpoints kept, permanent ones apart (null: all)
    permanent_every: int | None = None  # steps between checkpoints that are never deleted (null: none)
    asynchronous: bool = True  # write while training goes on (false: training waits, at multiples of `every`)
    resume: str = "auto"  # auto (newest whole checkpoint of run.dir), never, or the path of a run or checkpoint
    allow_changes: list[str] = field(default_factory=list)  # keys that may change the run on resume; data: its tokens

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        require(self.every >= 1, "checkpoint.every", self.every, "use a positive number of steps")
        require(self.keep is None or self.keep >= 1, "checkpoint.keep", self.keep, "use null (all) or at least 1")
        permanent = self.permanent_every
        require(permanent is None or permanent >= 1, "checkpoint.permanent_every", permanent, "use null or at least 1")
        require(
            bool(self.resume.strip()),
            "checkpoint.resume",
            self.resume,
            "use auto, never or the path of a run or checkpoint",
        )


@dataclass
class EvaluationConfig:
    """Validation loss by domain, on the same held-out instances each time."""

    every: int = 1000  # steps between evaluations (0: never); also before the first step and after the last
    instances: int | None = 256  # instances read from each domain (null: all)
    micro_batch_size: int | None = None  # instances one rank computes at a time (null: that of training)

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        require(self.every >= 0, "evaluation.every", self.every, "use 0 (never) or a positive number of steps")
        for name, null in (("instances", "all"), ("micro_batch_size", "that of training")):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluation.{name}", value, f"use null ({null}) or at least 1")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = "online"  # online, offline or disabled
    project: str = "moda"  # project the run belongs to
    entity: str | None = None  # user or team (null: the account's default)
    group: str | None = None  # runs shown together
    tags: list[str] = field(default_factory=list)  # labels

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        require(self.mode in WANDB_MODES, "logging.wandb.mode", self.mode, choices(WANDB_MODES))
        require(bool(self.project.strip()), "logging.wandb.project", self.project, "use a name such as moda")


@dataclass
class ProfileConfig:
    """Steps that are looked into, on every rank: traces in the folder `profile` of the run directory."""

    steps: list[int] = field(default_factory=list)  # numbers of the steps, from 1 on (empty: none)
    memory: bool = False  # record what these steps allocate on a GPU, too

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        first = min(self.steps, default=1)
        require(first >= 1, "logging.profile.steps", self.steps, "use steps from 1 on, such as [20]")
        remedy = "name the steps in logging.profile.steps, such as [20], or use false"
        require(bool(self.steps) or not self.memory, "logging.profile.memory", self.memory, remedy)


@dataclass
class LoggingConfig:
    """What is written, and how often."""

    every: int = 10  # steps between metric records and progress lines
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def validate(self) -> None:
        """Raise `ConfigError` for the first value that cannot be used."""
        require(self.every >= 1, "logging.every", self.every, "use a positive number of steps")
        self.wandb.validate()
        self.profile.validate()


@dataclass
class Config:
    """A run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self, world_size: int = 1) -> None:
        """Raise `ConfigError` for the first value that cannot be used on `world_size` ranks."""
        self.run.validate()
        self.model.validate()
        self.data.validate()
        most = LARGEST_MICRO_BATCH // self.data.sequence_length
        for key, size in (
            ("training", self.training.micro_batch_size),
            ("evaluation", self.evaluation.micro_batch_size),
        ):
            remedy = f"use at most {most:,} instances of data.sequence_length={self.data.sequence_length}"
            require(size is None or size <= most, f"{key}.micro_batch_size", size, remedy)
        self.training.validate(world_size)
        self.optimizer.validate()
        self.schedule.validate()
        self.parallel.validate(world_size)
        self.checkpoint.validate()
        self.evaluation.validate()
        self.logging.validate()
        last = max(self.logging.profile.steps, default=1)
        remedy = f"name steps of the run, of which training.steps={self.training.steps} is the last"
        require(last <= self.training.steps, "logging.profile.steps", self.logging.profile.steps, remedy)

    def warnings(self) -> list[str]:
        """What can run but is probably not meant, a sentence each."""
        steps, warmup = self.training.steps, self.schedule.warmup_steps
        if warmup <= steps:
            return []
        return [
            f"schedule.warmup_steps={warmup} is longer than the run (training.steps={steps}), so the learning rate "
            f"never reaches its peak: use for example schedule.warmup_steps={max(1, steps // 10)}."
        ]


def resolved(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, every value final: what a run directory's `config.yaml` holds."""
    return asdict(config)
