"""The values of a record of `metrics.jsonl`: what the device knows of a step, and what the host does.

In: loss, gradient norm and skipped steps, tensors of a step that is queued. Out: floats by name. No GPU stands still
for them where the next step is queued in between: it copies the numbers to the host when it comes to them, and has work
while they are read.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch
from torch import Tensor

from data.loader import BatchLoader
from models.accounting import training_flops_per_token
from training.checkpoint import TrainState
from training.config import Config
from training.distributed import World, bf16_peak
from training.metrics import TrainingClock
from training.skip import SpikeFilter


class Numbers:
    """Scalars of the device on their way to the host, and the moment at which the device had them."""

    def __init__(self, scalars: list[Tensor]) -> None:
        """`scalars`: [] each, of one device, when all that is queued is done."""
        self._values = torch.stack([scalar.double() for scalar in scalars])
        self._done: torch.cuda.Event | None = None
        if self._values.is_cuda:
            on_host = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
            self._values = on_host.copy_(self._values, non_blocking=True)
            self._done = torch.cuda.Event(enable_timing=True)
            self._done.record()

    def read(self) -> list[float]:
        """The numbers; waits for the device to come to them."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()

    def seconds_since(self, before: Numbers) -> float | None:
        """Of the device, between two that were read; None where the host does all by itself."""
        if self._done is None or before._done is None:
            return None
        return before._done.elapsed_time(self._done) / 1e3


@dataclass
class _Step:
    """A step, and what the host knew when it was queued."""

    step: int
    tokens: int
    lr: float
    numbers: Numbers
    memory: int  # bytes, peak
    elapsed: float  # seconds of all starts, by the clock
    paused: float  # seconds of this start, by the clock
    data_waited: float  # likewise, by the loader


@dataclass
class StepValues:
    """What a record holds of a step."""

    step: int
    tokens: int
    values: dict[str, float]
    longest_skip: int  # steps in a row


class StepMetrics:
    """Values of steps, one after the other: `begin` when one is queued, `finish` when its record is to be written."""

    def __init__(self, config: Config, world: World, compute_dtype: torch.dtype) -> None:
        self.world = world
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        self.peak = bf16_peak(world.device, compute_dtype)
        self.flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
        self.masked = config.data.document_mask
        self._begun: _Step | None = None
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of an earlier job of this process

    def start(self, state: TrainState, clock: TrainingClock, loader: BatchLoader, spikes: SpikeFilter) -> None:
        """Speed and waits count from here."""
        self.clock, self.loader, self.spikes = clock, loader, spikes
        nothing = torch.zeros(2, device=self.world.device)
        self._recorded = self._step(state, nothing, nothing[0], 0.0)

    @property
    def at_once(self) -> bool:
        """Whether a step is done when it is queued, so that nothing is gained by reading its values later."""
        return self.world.device.type == "cpu"

    @property
    def pending(self) -> bool:
        """Whether a step was begun and is not finished."""
        return self._begun is not None

    def begin(self, state: TrainState, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Take note of the step that was just queued; `loss`: cross-entropy and z-loss [2], `grad_norm`: []."""
        self._begun = self._step(state, loss, grad_norm, lr)

    def _step(self, state: TrainState, loss: Tensor, grad_norm: Tensor, lr: float) -> _Step:
        numbers = Numbers([*loss, grad_norm, *self.spikes.counts()])
        return _Step(
            state.step,
            state.tokens,
            lr,
            numbers,
            memory=self._peak_memory(),
            elapsed=self.clock.elapsed,
            paused=self.clock.paused_seconds,
            data_waited=self.loader.waited,
        )

    def finish(self) -> StepValues:
        """The values of the step that was begun; waits for the device to have done it.

        A pause of the clock between the two must be one in which the device stands still, as while the files of a
        profile are written: in another it works on.
        """
        assert self._begun is not None, "a step was begun"
        before, self._recorded = self._recorded, self._begun
        step, self._begun = self._begun, None
        cross_entropy, z_loss, grad_norm, skipped, longest_skip = step.numbers.read()
        seconds = step.numbers.seconds_since(before.numbers)
        if seconds is not None:
            step.elapsed = before.elapsed + seconds  # when it was done, not when it was queued
            seconds -= step.paused - before.paused
        seconds = self.clock.lap(step.step, seconds)
        rate = self.tokens_per_step / seconds
        values = {
            "train/loss": cross_entropy,
            "train/z_loss": z_loss,
            "train/grad_norm": grad_norm,
            "train/lr": step.lr,
            "train/skipped_steps": skipped,
            "throughput/tokens_per_second": rate,
            **{f"throughput/{name}": share for name, share in self.utilization(rate).items()},
            "memory/peak_gb": step.memory / 1e9,
            "time/data_wait_share": (step.data_waited - before.data_waited) / (seconds * (step.step - before.step)),
            "time/elapsed_seconds": step.elapsed,
        }
        return StepValues(step.step, step.tokens, values, int(longest_skip))

    def utilization(self, tokens_per_second: float) -> dict[str, float]:
        """Shares of all ranks' peak, attention counted full (`mfu`) and causal; empty where no peak is known.

        Documents that are masked from each other have fewer pairs than the causal count: it is left out.
        """
        if self.peak is None:
            return {}
        full, causal = (tokens_per_second * flops / (self.peak * self.world.size) for flops in self.flops_per_token)
        return {"mfu": full} if self.masked else {"mfu": full, "mfu_causal": causal}

    def _peak_memory(self) -> int:
        """Bytes: of the device's allocator, or of this process on a CPU."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
