"""Calls of the fused backend on guarded inputs and outputs, and their comparison with the definition in float64.

As in `kernel_cases`, every tensor lies between bands of NaN: a read outside turns results into NaN, a write outside
changes a band. What the backend allocates is guarded too, and is NaN until it is written.
"""

from unittest.mock import patch

import torch

from moda import fused, reference
from moda.readers import Readers
from tests.moda.kernel_cases import Arena

# batch, time, kv_heads, group, head_dim, slots
SHAPES = [
    (1, 1, 1, 1, 32, 0),
    (2, 1, 2, 8, 64, 7),
    (3, 2, 1, 2, 48, 1),
    (1, 63, 2, 2, 64, 7),
    (2, 65, 1, 1, 32, 1),
    (1, 65, 1, 3, 64, 0),
    (1, 33, 2, 8, 128, 2),
    (2, 17, 1, 32, 32, 3),
    (1, 40, 1, 6, 96, 7),
    (1, 9, 1, 12, 80, 1),
    (1, 20, 3, 2, 16, 2),
    (1, 6, 1, 128, 32, 1),
]
# Of 2 rows of 36 tokens: documents of one token and of none, across the end of a row, of all tokens, of one each.
DOCUMENTS = [[0, 1, 1, 2, 3, 30, 50, 50, 51, 72], [0, 17, 72], [0, 72], list(range(73))]
EXTREMES = [
    {"spread": 30.0},
    {"dominant": 50.0},
    {"spread": 0.0},
    {"scale": -0.3},
    {"scale": 0.0},
    {"equal": True},
]


class Call:
    """One call: inputs, forward, backward, and what all of it should be.

    key_time: tokens of k and v, more than those of q. spread multiplies q and all keys; dominant the keys of slot 0;
    equal makes all slots alike. layout of q, k, v in memory: "tokens" (contiguous), "projection" (views of one fused
    projection), "heads" ([batch, heads, time, head_dim]) or "gaps" (every other element).
    """

    def __init__(
        self,
        shape,
        dtype=torch.float32,
        device="cpu",
        documents=None,
        key_time=None,
        scale=None,
        spread=1.0,
        dominant=1.0,
        equal=False,
        layout="tokens",
        seed=0,
    ):
        batch, time, kv_heads, group, head_dim, slots = shape
        generator = torch.Generator().manual_seed(seed)
        self.arena, self.dtype = Arena(device), dtype
        self.scale = head_dim**-0.5 if scale is None else scale
        self.cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32, device=device)

        def random(*sizes):
            return torch.randn(*sizes, generator=generator).to(device)

        token = (batch, key_time or time, kv_heads, head_dim)
        q, k, v = random(batch, time, kv_heads * group, head_dim) * spread, random(*token) * spread, random(*token)
        keys, values = (random(slots, batch, time, kv_heads, head_dim) for _ in range(2))
        if equal:
            keys, values = keys[:1].expand_as(keys), values[:1].expand_as(values)
        keys = keys * spread
        keys[:1] *= dominant
        self.do = self.arena.put(random(*q.shape), dtype)
        self.q, self.k, self.v = self._lay(layout, [q, k, v])
        self.slots = self.arena.pair(keys, values, dtype)
        self._define()

    def _lay(self, layout, tensors):
        if layout == "projection":
            return self.arena.put(torch.cat(tensors, 2), self.dtype).split([t.shape[2] for t in tensors], 2)
        if layout == "heads":
            return [self.arena.put(t.transpose(1, 2), self.dtype).transpose(1, 2) for t in tensors]
        if layout == "gaps":
            return [self.arena.put(t.repeat_interleave(2, -1), self.dtype)[..., ::2] for t in tensors]
        return [self.arena.put(t, self.dtype) for t in tensors]

    def _define(self):
        wide = [t.double().requires_grad_() for t in (self.q, self.k, self.v, *self.slots)]
        out, lse = reference.definition(*wide, scale=self.scale, cu_seqlens=self.cu_seqlens)
        gradients = torch.autograd.grad(out, wide, self.do.double(), allow_unused=True)
        gradients = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wide, strict=True)]
        self.want = dict(zip(["o", "lse", "dq", "dk", "dv", "d_keys", "d_values"], [out, lse, *gradients], strict=True))
        # Where one key takes all, do.v and delta cancel: errors are then measured by what there was to cancel.
        with torch.no_grad():
            q, k, v, keys, values = wide
            apart = (lse, 0 * lse, self.scale)
            dq, dk, _ = reference.sequence_backward(self.do.double(), q, k, v, *apart, self.cu_seqlens)
            dq_slots = reference.depth_backward_query(self.do.double(), q, keys, values, *apart)
            d_keys, _ = reference.depth_backward_slots(self.do.double(), q, keys, values, *apart)
            self.floors = {"dq": dq.norm() + dq_slots.norm(), "dk": dk.norm(), "d_keys": d_keys.norm()}
            # The rounding of a score to fp32 is an error of p relative to 1.
            self.score = (q.norm(dim=-1).max() * torch.cat((k.flatten(), keys.flatten())).abs().max()).item()
            self.score *= abs(self.scale)

    def ranges(self, split=None):
        """The slots, as one range or, split after some of them, as two."""
        keys, values = self.slots
        parts = [(keys[:split], values[:split])] + ([] if split is None else [(keys[split:], values[split:])])
        return [part for part in parts if len(part[0])]

    def guarded(self):
        """Guards what is allocated meanwhile."""
        plain = torch.empty

        def empty(*sizes, dtype, device):
            shape = plain(*sizes, device="meta").shape
            return (
                self.arena.empty(*shape, dtype=dtype)
                if dtype.is_floating_point
                else plain(shape, dtype=dtype, device=device)
            )

        return patch.object(torch, "empty", empty)

    def run(self, split=None):
        """Everything that a call gives, by name."""
        slots = self.ranges(split)
        with self.guarded():
            o, lse = fused.joint_forward(self.q, self.k, self.v, slots, self.scale, self.cu_seqlens)
            inputs = (self.do, self.q, self.k, self.v, o, lse, slots, self.scale, self.cu_seqlens)
            dq, dk, dv, read = fused.joint_backward(*inputs)
        assert lse.transpose(1, 2).is_contiguous()
        nothing = [torch.zeros_like(t) for t in self.slots]
        d_keys, d_values = (torch.cat(parts) for parts in zip(*read, strict=True)) if read else nothing
        return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "d_keys": d_keys, "d_values": d_values}

    def run_as_layers(self, split=None):
        """The same through the interface of the stream, as two layers that read alike: twice the slots' gradients."""
        slots = self.ranges(split)
        with self.guarded():
            o, lse = fused.joint_forward(self.q, self.k, self.v, slots, self.scale, self.cu_seqlens)
            readers = Readers(2, lse)
            for layer in range(2):
                inputs = (self.do, self.q, self.k, self.v, o, lse, slots, self.scale, self.cu_seqlens)
                dq, dk, dv = fused.reader_backward(*inputs, readers, layer)
            d_keys, d_values = fused.pull(readers, range(2), *self.slots, self.scale, None, torch.float32)
        return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "d_keys": d_keys / 2, "d_values": d_values / 2}

    def errors(self, got):
        """Relative errors of the norms, by name."""
        sizes = {name: max(w.norm().item(), float(self.floors.get(name, 0.0)), 1e-30) for name, w in self.want.items()}
        return {name: (got[name].double() - w).norm().item() / sizes[name] for name, w in self.want.items()}

    def check(self, got, tolerance):
        for name, error in self.errors(got).items():
            assert error <= tolerance + 1e-7 * self.score, f"{name}: relative error {error:.1e}"
        assert self.arena.whole(), "a write outside of the outputs"
