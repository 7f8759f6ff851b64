"""A small stack of layers with depth, once through `DepthStream` and once by the definition, to compare gradients."""

from functools import partial

import torch
from torch import nn

import moda
from moda import reference


class Layer(nn.Module):
    """Attention that writes its K and V, then a tanh layer whose input is projected to a second slot."""

    def __init__(self, width, heads, kv_heads, head_dim):
        super().__init__()
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.q = nn.Linear(width, heads * head_dim)
        self.kv = nn.Linear(width, 2 * kv_heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)
        self.slot = nn.Linear(width, 2 * kv_heads * head_dim)
        self.ffn = nn.Linear(width, width)

    def split(self, kv):
        return kv.unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)

    def forward(self, x, handle, stream, layer, cache=None, **options):
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        k, v, handle = stream.write(handle, layer, 0, *self.split(self.kv(x)))
        if cache is not None:
            cache.append((k, v))
            k, v = (torch.cat(parts, 1) for parts in zip(*cache, strict=True))
        out, handle = stream.attend(handle, layer, q, k, v, **options)
        x = x + self.out(out.flatten(2))
        if stream.slots_per_layer == 2:
            _, _, handle = stream.write(handle, layer, 1, *self.split(self.slot(x)))
        return x + torch.tanh(self.ffn(x)), handle


class Stack(nn.Module):
    """`forward` goes through a stream; `definition` concatenates every earlier K, V and leaves all to autograd."""

    def __init__(self, num_layers=6, width=16, heads=4, kv_heads=2, head_dim=8, slots_per_layer=2, **bounds):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, head_dim) for _ in range(num_layers))
        self.slots_per_layer, self.bounds = slots_per_layer, bounds
        self.double()

    def stream(self, x):
        first = self.layers[0]
        return moda.DepthStream(
            len(self.layers),
            *x.shape[:2],
            first.kv_heads,
            first.head_dim,
            slots_per_layer=self.slots_per_layer,
            dtype=x.dtype,
            device=x.device,
            **self.bounds,
        )

    def forward(self, x, stream=None, call=None, stop=None, **options):
        """`call` wraps a layer (checkpointing); `stop` returns after that many layers, before `finish`."""
        stream = stream or self.stream(x)
        handle = stream.start()
        for layer, block in enumerate(self.layers):
            x, handle = call(block, x, handle, stream, layer) if call else block(x, handle, stream, layer, **options)
            if layer + 1 == stop:
                return x
        return stream.finish(handle, x)

    def decode(self, x, caches):
        """The next tokens x, after those whose keys and values are in the caches, which grow."""
        stream = self.stream(x)
        handle = stream.start()
        for layer, block in enumerate(self.layers):
            x, handle = block(x, handle, stream, layer, cache=caches[layer])
        return stream.finish(handle, x)

    def definition(self, x, stop=None, scales=None, **options):
        recent, first = self.bounds.get("recent_layers"), self.bounds.get("first_layers", 0)
        slots = []
        for layer, block in enumerate(self.layers):
            read = [s for i, s in enumerate(slots) if recent is None or layer - i <= recent or i < first]
            pairs = [pair for written in read for pair in written]
            depth = (torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])) if pairs else ()
            k, v = block.split(block.kv(x))
            q = block.q(x).unflatten(-1, (-1, block.head_dim))
            if scales is not None:
                options["scale"] = scales[layer]
            out, _ = reference.definition(q, k, v, *depth, **options)
            x = x + block.out(out.flatten(2))
            slots.append([(k, v)] + ([tuple(block.split(block.slot(x)))] if self.slots_per_layer == 2 else []))
            x = x + torch.tanh(block.ffn(x))
            if layer + 1 == stop:
                break
        return x

    def gradients(self, loss, **options):
        """Gradients of all parameters, zeros where a parameter is not part of the loss."""
        parameters = list(self.parameters())
        got = torch.autograd.grad(loss, parameters, allow_unused=True, **options)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, got, strict=True)]


def random_input(batch=2, time=7, width=16, seed=0):
    return torch.randn(batch, time, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(x):
    """A loss that weighs every element differently."""
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)).sum()


def assert_equal_gradients(got, want):
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11, msg=lambda m, i=index: f"parameter {i}: {m}")


def kept_gradients(
    how, backend="reference", *, num_layers, slots_per_layer, dtype=torch.float64, device="cpu", retain=False
):
    """Gradients of the keys and values written by each layer, kept as leaves or by hooks while the rest of a backward
    pass goes on, of a stream and of the definition in float64."""
    torch.manual_seed(0)
    shape, options = (2, 5, 2, 16), {"dtype": dtype, "device": device}
    queries = [torch.randn(2, 5, 4, 16, **options) for _ in range(num_layers)]
    leaves = [torch.randn(2, *shape, **options) for _ in range(num_layers * slots_per_layer)]
    sides = []
    for side in ("stream", "definition"):
        exact = side == "definition"
        pairs = [list((pair.double() if exact else pair).unbind()) for pair in leaves]
        kept = {}
        for number, pair in enumerate(pairs):
            for part in range(2):
                leaf = pair[part] = pair[part].clone().requires_grad_()
                if how == "hooks" and not exact:
                    pair[part] = leaf * 1
                    pair[part].register_hook(partial(kept.__setitem__, (number, part)))
        stream = moda.DepthStream(num_layers, *shape, slots_per_layer=slots_per_layer, **options)
        handle, total, written = stream.start(), 0.0, []
        for layer, q in enumerate(queries):
            own = pairs[layer * slots_per_layer : (layer + 1) * slots_per_layer]
            if exact:
                depth = [torch.stack(parts) for parts in zip(*written, strict=True)]
                out, _ = reference.definition(q.double(), *own[0], *depth)
                written += own
            else:
                k, v, handle = stream.write(handle, layer, 0, *own[0])
                out, handle = stream.attend(handle, layer, q, k, v, backend=backend)
                for slot, pair in enumerate(own[1:], 1):
                    _, _, handle = stream.write(handle, layer, slot, *pair)
            total = total + out
        loss = total if exact else stream.finish(handle, total)
        loss.double().square().sum().backward(retain_graph=retain and not exact)
        places = [(number, part) for number in range(len(pairs)) for part in range(2)]
        if how == "hooks" and not exact:
            sides.append([kept[place] for place in places])
        else:
            sides.append([pairs[number][part].grad for number, part in places])
    return [
        (got.double(), torch.zeros_like(got).double() if want is None else want)
        for got, want in zip(*sides, strict=True)
    ]
