"""Awkward calls of `moda.attention`, and their errors against the definition in float64.

The measure is PyTorch's own attention in the same dtype on the same queries, keys and values without slots: what a
rounding of operands and outputs costs. Both sides get the inputs rounded to the dtype.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import moda
from moda import reference

NAMES = ("o", "lse", "dq", "dk", "dv", "d_keys", "d_values")


def case(time, group=2, slots=7, head_dim=64, batch=1, kv_heads=2, **options):
    shape = (batch, time, kv_heads, group, head_dim, slots)
    return {"shape": shape, **options}


TIMES, GROUPS, SLOTS, HEAD_DIMS = (
    (1, 2, 63, 64, 65, 127, 1000),
    (1, 2, 3, 8, 16, 32),
    (0, 1, 7, 72, 256),
    (32, 64, 96, 128),
)
CASES = [  # some of them in several rows
    *(case(time, slots=slots) for time in TIMES for slots in (0, 7)),
    *(case(65, group) for group in GROUPS),
    *(case(127, group, slots=1, kv_heads=1) for group in GROUPS),
    *(case(64, slots=slots) for slots in SLOTS),
    *(case(33, 8, slots=slots, head_dim=128) for slots in SLOTS),
    *(case(65, 2, head_dim=head_dim) for head_dim in HEAD_DIMS),
    *(case(127, 8, slots=72, head_dim=head_dim, kv_heads=1) for head_dim in HEAD_DIMS),
    *(case(63, batch=batch) for batch in (2, 3, 4)),
    *(case(40, 2, batch=2, documents=documents) for documents in (range(81), [0, 1, 1, 2, 39, 41, 80], [0, 80])),
    *(case(128, 8, documents=documents) for documents in (range(129), [0, 63, 64, 65, 128])),
    *(case(65, group, spread=spread) for group in (2, 8) for spread in (0.0, 5.0, 30.0)),
    *(case(65, group, dominant=50.0) for group in (2, 8)),
    *(case(65, group, equal=True) for group in (2, 8)),
    *(case(1, 32, slots=256, head_dim=head_dim) for head_dim in (32, 128)),
    case(1000, 32, slots=1, kv_heads=1),
    case(256, 4, slots=72, batch=2),
]
CASES = list({repr(case): case for case in CASES}.values())


# With scores of thousands all of a row goes to one key. What is left of an error is that of scores that are close by
# chance, and where they are so the slots decide: the sequence alone says nothing about the size to expect.
LARGE_SCORES = [case for case in CASES if case.get("spread") == 30.0]


def name(case):
    batch, time, kv_heads, group, head_dim, slots = case["shape"]
    rest = {key: f"{len(value) - 1} documents" if key == "documents" else value for key, value in case.items()}
    rest.pop("shape")
    return f"B{batch} T{time} Hk{kv_heads} G{group} d{head_dim} L{slots} {rest or ''}".strip()


class Awkward:
    """Inputs of a case in a dtype, and the definition's outputs and gradients of them in float64."""

    def __init__(self, case, dtype, device="cpu"):
        batch, time, kv_heads, group, head_dim, slots = case["shape"]
        generator = torch.Generator().manual_seed(0)

        def random(*sizes):
            return torch.randn(*sizes, generator=generator)

        spread = case.get("spread", 1.0)
        q, k, v = (random(batch, time, heads, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads))
        keys, values = (random(slots, batch, time, kv_heads, head_dim) for _ in range(2))
        if case.get("equal"):
            keys, values = keys[:1].expand_as(keys), values[:1].expand_as(values)
        keys = keys * spread
        keys[:1] *= case.get("dominant", 1.0)
        self.inputs = [t.to(device, dtype).requires_grad_() for t in (q * spread, k * spread, v, keys, values)]
        self.do = random(*q.shape).to(device, dtype)
        documents = case.get("documents")
        self.cu_seqlens = None if documents is None else torch.tensor(list(documents), device=device)
        self.slots, self.scale = slots, head_dim**-0.5
        self.want = self._definition(*self.inputs)
        self.alone = self._definition(*self.inputs[:3])
        # Where one key takes all, do.v and delta cancel: errors are measured by what there was to cancel.
        with torch.no_grad():
            wide = [t.double() for t in self.inputs]
            apart = (self.want["lse"], torch.zeros_like(self.want["lse"]), self.scale)
            dq, dk, _ = reference.sequence_backward(self.do.double(), *wide[:3], *apart, self.cu_seqlens)
            dq_slots = reference.depth_backward_query(self.do.double(), wide[0], *wide[3:], *apart)
            d_keys, _ = reference.depth_backward_slots(self.do.double(), wide[0], *wide[3:], *apart)
            self.floors = {"dq": dq.norm() + dq_slots.norm(), "dk": dk.norm(), "d_keys": d_keys.norm()}

    def _definition(self, *inputs):
        wide = [t.detach().double().requires_grad_() for t in inputs]
        out, lse = reference.definition(*wide, cu_seqlens=self.cu_seqlens)
        gradients = torch.autograd.grad(out, wide, self.do.double(), allow_unused=True)
        gradients = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wide, strict=True)]
        return dict(zip(NAMES, [out.detach(), lse.detach(), *gradients], strict=False))

    def run(self, backend):
        """What a backend gives, by name."""
        out, lse = moda.attention(*self.inputs, cu_seqlens=self.cu_seqlens, backend=backend, return_lse=True)
        return dict(zip(NAMES, [out, lse, *torch.autograd.grad(out, self.inputs, self.do)], strict=True))

    def pytorch(self):
        """What PyTorch's own attention gives for the sequence alone (as one document), by name; no lse."""
        inputs = [t.detach().clone().requires_grad_() for t in self.inputs[:3]]
        q, k, v = (t.transpose(1, 2) for t in inputs)
        fused = q.is_cuda and q.dtype != torch.float32
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        return dict(zip(("o", "dq", "dk", "dv"), [out, *torch.autograd.grad(out, inputs, self.do)], strict=True))

    def pytorch_jointly(self):
        """What PyTorch's own attention gives for all of it, by name; no lse. Each slot is a key that one token sees."""
        inputs = [t.detach().clone().requires_grad_() for t in self.inputs]
        q, k, v, *slots = inputs
        k, v = (
            torch.cat((keys, of_slots.permute(1, 2, 0, 3, 4).flatten(1, 2)), 1).transpose(1, 2)
            for keys, of_slots in zip((k, v), slots, strict=True)
        )
        tokens = torch.arange(q.shape[1], device=q.device)
        seen = (tokens[:, None] >= tokens, tokens[:, None] == tokens.repeat_interleave(self.slots))
        with sdpa_kernel(SDPBackend.MATH):
            out = scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=torch.cat(seen, 1), enable_gqa=True
            ).transpose(1, 2)
        names = [name for name in NAMES if name != "lse"]
        return dict(zip(names, [out, *torch.autograd.grad(out, inputs, self.do)], strict=True))

    def error(self, got, want, name):
        """Relative error of the norm."""
        size = max(want[name].norm().item(), float(self.floors.get(name, 0.0)), 1e-30)
        return (got[name].double() - want[name]).norm().item() / size
