"""Every Triton kernel once, for tools that look into kernels: `compute-sanitizer python scripts/run_kernels.py`.

In: names of kernels (all) and a shape; the defaults are small and awkward, with the groups that all kernels of the
configurations occur for. Out: nothing but the calls, each after one
that compiles it. Every tensor has device memory of its own, so that a memory checker sees an access past its end:

    python scripts/run_kernels.py                                        # first: what is compiled is kept
    compute-sanitizer --tool memcheck python scripts/run_kernels.py      # and racecheck
    ncu --kernel-name regex:tensor python scripts/run_kernels.py --only gradients --tokens 16384 --group 8 --slots 64
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import moda
from models.cross_entropy import linear_cross_entropy
from models.norm_rotary import norm_rotary
from models.swiglu import swiglu
from scripts.console import run
from scripts.kernel_benchmarks import depth

ATTENTION = ("fused", "fused with documents", "fused without slots", "fused in fp32")
NAMES = (*depth.KERNELS, *ATTENTION, "norm_rotary", "norm_rotary to a slot", "swiglu", "loss")
JOINED = "joined"  # with the kernels of packages: for profiles, not among those that run by default


def prepare(name: str, tokens: int, group: int, slots: int) -> Callable[[], None]:
    """What runs the kernels of one name on random inputs, forward and backward, on the present CUDA device."""
    if name in depth.KERNELS:
        return depth.prepare(name, depth.Problem(tokens, group, slots, block=4))
    dtype = torch.float32 if "fp32" in name else torch.bfloat16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()

    if name == "loss":
        hidden, weight, targets = random(tokens, 32), random(5003, 32), torch.randint(-1, 5003, (tokens,)).cuda()
        return partial(_both_ways, lambda: linear_cross_entropy(hidden, weight, targets, 1e-5))
    if name.startswith("norm_rotary"):
        product, angles = random(1, tokens, (group + 2) * 8 * 64), torch.randn(1, tokens, 1, 32, device="cuda")
        weights = random(group * 8 * 64), random(8 * 64)
        given = product, *weights, angles.cos(), angles.sin(), 64, 1e-6
        if "slot" not in name:
            return partial(_both_ways, lambda: norm_rotary(*given))
        stream = moda.DepthStream(1, 1, tokens, 8, 64, slots_per_layer=1, dtype=dtype, device="cuda")

        def into_a_slot() -> tuple[torch.Tensor, ...]:
            handle = stream.start()
            q, k, v = norm_rotary(*given, stream.place(handle, 0, 0))
            k, v, handle = stream.write(handle, 0, 0, k, v)
            return stream.finish(handle, q), k, v

        return partial(_both_ways, into_a_slot)
    if name == "swiglu":
        x, weights = random(tokens, 24), (random(2 * 1333, 24), random(24, 1333))
        return partial(_both_ways, lambda: (swiglu(x, *weights),))
    q, k, v = (random(1, tokens, heads, 64) for heads in (8 * group, 8, 8))
    keys, values = (None, None) if "without" in name else (random(slots, 1, tokens, 8, 64) for _ in range(2))
    cu_seqlens = torch.tensor([0, 1, tokens // 3, tokens], device="cuda") if "documents" in name else None
    backend = "joined" if name == JOINED else "fused"
    call = partial(moda.attention, q, k, v, keys, values, cu_seqlens=cu_seqlens, backend=backend)
    return partial(_both_ways, lambda: (call(),))


def _both_ways(forward: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Gradients are random: of ones, products are exact, and two threads' sums agree that need not."""
    outs = forward()
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def main(arguments: list[str] | None = None) -> int:
    """Run them. Returns the exit status: 2 without a GPU."""
    parser = argparse.ArgumentParser(description="Every Triton kernel once.")
    parser.add_argument("--only", nargs="+", choices=(*NAMES, JOINED), default=NAMES)
    parser.add_argument("--tokens", type=int, default=83)
    parser.add_argument("--group", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--slots", type=int, default=5)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: these are kernels of a GPU, and there is none here.", file=sys.stderr)
        return 2
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when the first tensor is made
    torch.manual_seed(0)
    for group in options.group:
        for name in options.only:
            both_ways = prepare(name, options.tokens, group, options.slots)
            for _ in range(2):
                both_ways()
            torch.cuda.synchronize()
            print(f"{name}, groups of {group}: done", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
