"""AdamW as OLMo 2 uses it: weight decay on everything, norms too, but the input embedding."""

from __future__ import annotations

import torch

from models.decoder import Decoder
from training.config import OptimizerConfig


def build_optimizer(model: Decoder, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`, in two groups; a tied embedding counts as the input embedding."""
    embedding = model.embedding.weight
    decayed = [p for p in model.parameters() if p is not embedding]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [embedding], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=embedding.is_cuda
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
