"""AdamW as OLMo 2 uses it: weight decay on everything, norms too, but the input embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from models.decoder import Decoder
from training.config import OptimizerConfig


def build_optimizer(model: Decoder, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`, in two groups; a tied embedding counts as the input embedding.

    Fused on every device: only so can `training.skip` leave out a step without asking the device.
    """
    embedding = model.embedding.weight
    decayed = [p for p in model.parameters() if p is not embedding]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [embedding], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What `optimizer` steps: sharded, with gradients, whatever FSDP2 has the model hold in their place at the time."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def moments(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by the name of its weight: the tensors themselves, made as AdamW makes them where none are yet.

    `step` [], fp32; `exp_avg` and `exp_avg_sq` in the shape, dtype and sharding of the weight.
    """
    found = {}
    for name, weight in model.state_dict(keep_vars=True).items():  # it frees gathered weights: these are sharded
        state = optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format, requires_grad=False)
        found[name] = {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return found
