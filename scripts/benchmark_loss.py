"""The output layer and its loss beside others: `python scripts/benchmark_loss.py [--tokens 32768] [--hidden 1024]`.

In: a shape; a GPU. Out: a table of milliseconds (forward and backward, z-loss included), peak memory beyond the inputs,
and the errors of the loss and of both gradients against float64 on the first 2048 tokens. Beside ours: PyTorch with all
logits at once, compiled or not, and `liger-kernel` where it is installed, with its weight gradient in the dtype of the
weight and in fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cross_entropy import linear_cross_entropy
from scripts.console import run
from scripts.kernel_benchmarks.timing import milliseconds

CHECKED = 2048  # tokens
Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float) -> Tensor:
    """All logits at once, in fp32 from the product on."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets) + z_weight * logits.logsumexp(-1).square().mean()


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float) -> Tensor:
    """`models.cross_entropy`."""
    return sum(linear_cross_entropy(hidden, weight, targets, z_weight), torch.zeros((), device=hidden.device))


def rivals() -> dict[str, Loss]:
    """By name, what is compared; ours first."""
    found: dict[str, Loss] = {"ours": ours, "PyTorch": plain, "PyTorch, compiled": torch.compile(plain, dynamic=False)}
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger-kernel is not installed: left out")
        return found
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    def liger(accumulate: torch.dtype | None) -> Loss:
        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float) -> Tensor:
            options = (None, None, -100, z_weight, 0.0, "mean", None, False, accumulate)
            return Liger.apply(hidden, weight, targets, *options)[0]

        return loss

    return found | {"liger-kernel": liger(None), "liger-kernel, fp32 sums": liger(torch.float32)}


def main(arguments: list[str] | None = None) -> int:
    """Print the table. Returns the exit status: 2 without a GPU."""
    parser = argparse.ArgumentParser(description="The output layer and its loss beside others.")
    parser.add_argument("--tokens", type=int, default=8 * 4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=100_352)
    parser.add_argument("--z-weight", type=float, default=1e-5)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this measures a GPU, and there is none here.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(options.vocabulary, options.hidden, device="cuda") / 32).bfloat16().requires_grad_()
    targets = torch.randint(options.vocabulary, (options.tokens,), device="cuda")
    few = hidden.detach()[:CHECKED].requires_grad_()
    want = _with_gradients(plain, few.detach().double(), weight.detach().double(), targets[:CHECKED], options.z_weight)
    shape = f"{options.tokens:,} tokens, {options.hidden:,} wide, {options.vocabulary:,} words"
    print(f"{shape}, bf16. {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| | forward and backward, ms | peak memory, GB | error of the loss | of d hidden | of d weight |")
    print("|---|---|---|---|---|---|")
    for name, loss in rivals().items():
        got = _with_gradients(loss, few, weight, targets[:CHECKED], options.z_weight)
        errors = [f"{((a.double() - b).norm() / b.norm()).item():.1e}" for a, b in zip(got, want, strict=True)]
        del got
        try:
            step = lambda loss=loss: _with_gradients(loss, hidden, weight, targets, options.z_weight)  # noqa: E731
            step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e9
            print(f"| {name} | {milliseconds(step):.2f} | {peak:.2f} | {' | '.join(errors)} |", flush=True)
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | | {' | '.join(errors)} |", flush=True)
    return 0


def _with_gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(hidden, weight, targets, z_weight)
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


if __name__ == "__main__":
    run(main)
