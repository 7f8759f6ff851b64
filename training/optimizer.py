"""AdamW as OLMo 2 uses it: weight decay on everything, norms too, but the input embedding."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

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


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of all gradients together, over all ranks, [], of the same bits on each."""
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights(optimizer) if weight.grad is not None])
    if not isinstance(norm, DTensor):
        return norm
    mesh, norm = norm.device_mesh, norm.full_tensor()
    if mesh.ndim > 1:  # each group of shards sums by itself, and NCCL may do it in another order elsewhere
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=mesh.get_group(0))
    return norm


def clip(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float) -> None:
    """Have the next step take gradients of this `norm` [] as if they had one of at most `limit`; 0 is no limit.

    The fused kernel divides by `grad_scale` on its way, for torch.amp's gradient scaler; `clip_grad_norm_` would read
    and write all gradients once more.
    """
    scale = ((norm + 1e-6) / limit).clamp_min(1.0) if limit else None  # what clip_grad_norm_ multiplies by, inverted
    optimizer.grad_scale = scale  # type: ignore[attr-defined]


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
