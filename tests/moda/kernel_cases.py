"""Inputs for the depth kernels, surrounded by poison, and their comparison with `moda.reference` in float64.

Every tensor lies between guard bands of NaN: a read outside turns results into NaN, and a write outside changes a band.
What a kernel only writes starts as NaN as well. Keys and values lie interleaved in one buffer, so that strides are not
those of a tensor alone; every reader's q and do lie somewhere.
"""

import torch

from moda import reference
from moda.kernels import depth

GUARD = 128  # elements


class Arena:
    """Allocates guarded tensors, and knows whether the guards are whole."""

    def __init__(self, device):
        self.device, self.bands = device, []

    def empty(self, *shape, dtype):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=self.device)
        self.bands += [buffer[:GUARD], buffer[GUARD + size :]]
        return buffer[GUARD : GUARD + size].view(shape)

    def put(self, tensor, dtype):
        return self.empty(*tensor.shape, dtype=dtype).copy_(tensor)

    def pair(self, first, second, dtype):
        """Two tensors [n, ...] interleaved along their first axis."""
        return self.put(torch.stack((first, second), 1), dtype).unbind(1)

    def whole(self):
        return all(band.isnan().all().item() for band in self.bands)


class Case:
    """One reader at a time, or several, of some slots: inputs in the kernel's dtype and the float64 of the same values.

    `spread` multiplies queries and keys; `dominant` multiplies the keys of slot 0.
    """

    def __init__(self, shape, dtype, device="cpu", readers=1, spread=1.0, dominant=1.0, seed=0):
        batch, time, kv_heads, group, head_dim, slots = shape
        generator = torch.Generator().manual_seed(seed)

        def random(*sizes):
            return torch.randn(*sizes, generator=generator).to(dtype).to(device)

        queries, slot_shape = (batch, time, kv_heads * group, head_dim), (slots, batch, time, kv_heads, head_dim)
        self.arena, self.dtype, self.scale = Arena(device), dtype, head_dim**-0.5
        q, do = random(readers, *queries) * spread, random(readers, *queries)
        keys, values = random(*slot_shape) * spread, random(*slot_shape)
        keys[:1] *= dominant
        o, lse = random(readers, *queries), 2 * torch.randn(readers, *queries[:3], generator=generator).to(device)
        self.sequence = (o.double(), lse.double())
        self.q, self.do, self.keys, self.values = q.double(), do.double(), keys.double(), values.double()
        joint = [
            reference.depth_forward(self.q[r], self.keys, self.values, o[r].double(), lse[r].double(), self.scale)
            for r in range(readers)
        ]
        # Backward starts from what the forward has stored: o rounded to its dtype, lse to fp32.
        self.o = torch.stack([o for o, _ in joint]).to(dtype).double()
        self.lse = torch.stack([lse for _, lse in joint]).float().double()
        self.delta = (self.do * self.o).sum(-1).float().double()
        scores = torch.einsum("rbthgd,sbthd->", self.q.unflatten(3, (kv_heads, group)).abs(), self.keys.abs())
        terms = readers * batch * time * kv_heads * group * max(slots, 1)
        self.mean_score = scores.item() / terms * self.scale
        # Where one slot takes all, do.v and delta cancel: errors are then measured by what there was to cancel.
        self.floors = {"dq": 0.0, "dk": 0.0}
        for r in range(readers):
            apart = (self.do[r], self.q[r], self.keys, self.values, self.lse[r], 0 * self.delta[r], self.scale)
            self.floors["dq"] += reference.depth_backward_query(*apart).norm().item()
            self.floors["dk"] += reference.depth_backward_slots(*apart)[0].norm().item()

    def put(self, tensor, dtype=None):
        return self.arena.put(tensor, dtype or self.dtype)

    def slots(self):
        return self.arena.pair(self.keys, self.values, self.dtype)

    def unwritten_slots(self, dtype=None):
        nothing = torch.full_like(self.keys, float("nan"))
        return self.arena.pair(nothing, nothing, dtype or self.dtype)

    def strided_lse(self, lse):
        """[batch, time, query_heads] in the memory order [batch, query_heads, time] of most sequence kernels."""
        return self.put(lse.transpose(1, 2), torch.float32).transpose(1, 2)

    def check(self, names, got, want, tolerance):
        """Relative errors of the norms, and whole guards."""
        for name, g, w in zip(names.split(), got, want, strict=True):
            size = max(w.norm().item(), self.floors.get(name, 0.0), 1e-30)
            error = (g.double() - w).norm().item() / size
            # The rounding of a score to fp32 is an error of p relative to 1.
            assert error <= tolerance + 1e-6 * self.mean_score, f"{name}: relative error {error:.1e}"
        assert self.arena.whole(), "a write outside of the outputs"


def forward(case, config=None):
    """Runs the forward kernel on reader 0; returns (o, lse) and what they should be."""
    keys, values = case.slots()
    o, lse = case.put(case.sequence[0][0]), case.strided_lse(case.sequence[1][0])
    want = reference.depth_forward(
        case.q[0], case.keys, case.values, case.sequence[0][0], case.sequence[1][0], case.scale
    )
    depth.depth_forward(case.put(case.q[0]), keys, values, o, lse, case.scale, config)
    return (o, lse), want


def backward_query(case, config=None, everything=False):
    """Runs the query kernel on reader 0: dq alone, or with all that it can do besides."""
    keys, values = case.slots()
    q, do, lse = case.put(case.q[0]), case.put(case.do[0]), case.strided_lse(case.lse[0])
    arguments = (case.do[0], case.q[0], case.keys, case.values, case.lse[0], case.delta[0], case.scale)
    begun = torch.ones_like(case.q[0])
    dq, want_dq = case.put(begun), begun + reference.depth_backward_query(*arguments)
    if not everything:
        delta = case.put(case.delta[0], torch.float32)
        depth.depth_backward_query(do, q, keys, values, lse, delta, dq, case.scale, config=config)
        return (dq,), (want_dq,)
    delta, reader_lse = (case.arena.empty(*case.lse[0].shape, dtype=torch.float32) for _ in range(2))
    address = torch.full((2,), -1, dtype=torch.int64, device=q.device)
    dk, dv = case.unwritten_slots()
    depth.depth_backward_query(
        do,
        q,
        keys,
        values,
        lse,
        delta,
        dq,
        case.scale,
        o=case.put(case.o[0]),
        address=address,
        reader_lse=reader_lse,
        dk=dk,
        dv=dv,
        config=config,
    )
    assert address.tolist() == [q.data_ptr(), do.data_ptr()]
    assert torch.equal(reader_lse, lse)
    want_dk, want_dv = reference.depth_backward_slots(*arguments)
    return (dq, delta, dk, dv), (want_dq, case.delta[0], want_dk, want_dv)


def backward_slots(case, first, last, config=None, blocked=False):
    """Runs the pull over the readers first..last-1: plain, or in the two passes of a blocked pull (the first
    leaves fp32 partials)."""
    k, v = case.slots()
    left = [(case.put(q), case.put(do)) for q, do in zip(case.q, case.do, strict=True)]
    addresses = torch.tensor([[q.data_ptr(), do.data_ptr()] for q, do in left], device=k.device)
    lse, delta = case.put(case.lse, torch.float32), case.put(case.delta, torch.float32)
    readers = (addresses, lse, delta, first, last, k, v)
    want_dk, want_dv = torch.zeros_like(case.keys), torch.zeros_like(case.keys)
    for r in range(first, last):
        arguments = (case.do[r], case.q[r], case.keys, case.values, case.lse[r], case.delta[r], case.scale)
        read_dk, read_dv = reference.depth_backward_slots(*arguments)
        want_dk, want_dv = want_dk + read_dk, want_dv + read_dv
    options = {}
    if blocked:
        partial_dk, partial_dv = case.unwritten_slots(torch.float32)
        middle = (first + last) // 2
        later = (addresses, lse, delta, middle, last, k, v)
        depth.depth_backward_slots(*later, partial_dk, partial_dv, case.scale, config=config)
        options = {"partial_dk": partial_dk, "partial_dv": partial_dv}
        readers = (addresses, lse, delta, first, middle, k, v)
    dk, dv = case.unwritten_slots()
    depth.depth_backward_slots(*readers, dk, dv, case.scale, config=config, **options)
    return (dk, dv), (want_dk, want_dv)
