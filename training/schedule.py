"""Learning rate over steps: a pure function of the step, so that nothing about it needs to be saved."""

from __future__ import annotations

import math

from training.config import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of the step after `step` finished ones, as a fraction of the peak.

    Warm-up is linear to the peak at step `warmup_steps`. Then, down to `final_lr_ratio` at `total_steps`: cosine,
    linear, or wsd (constant, then linear over the last `decay_fraction` of all steps); constant stays at the peak.
    """
    step += 1
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.name == "constant":
        return 1.0
    begin = config.warmup_steps
    if config.name == "wsd":
        begin = max(begin, total_steps - round(config.decay_fraction * total_steps))
    progress = min(max(0.0, (step - begin) / max(1, total_steps - begin)), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1 - progress
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining
