"""What FSDP2 does for the sake of other ranks, left out where a rank shares its weights with none.

That is a run on one rank, and one with as many copies of the model as ranks. FSDP2 goes the way of several there too:
it copies what it would communicate.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def holds_whole_weights(weight: Tensor) -> bool:
    """Whether ranks share no weights, going by one of them: a DTensor, sharded over the last dimension of its mesh."""
    assert isinstance(weight, DTensor)
    return weight.device_mesh.shape[-1] == 1


def reduce_in_place(model: nn.Module) -> None:
    """Have gradients reduced in the memory that they are gathered in; nothing changes where ranks share weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and holds_whole_weights(weight := next(module.parameters())):
            module.set_custom_reduce_scatter(_InPlace(weight))  # type: ignore[arg-type]  # its base class is private


class _InPlace:
    """The memory of a module's reduction, as `set_custom_reduce_scatter` takes it: the output is the input.

    FSDP2 takes memory for the input, casts the gradients into it, takes memory for the output and, on one rank, calls
    no collective but copies. A tensor is not copied to itself.

    The input's memory belongs to the stream of the computation, and FSDP2 goes on with the output in another stream. So
    it is handed out again only where it becomes the gradients themselves, which live until the one stream has waited
    for the other: not where they are cast from it, or added from it to gradients that were there.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """`weight`: one of the module's own. They get their gradients together."""
        self._weight = weight
        self._input: weakref.ref[Tensor] | None = None  # weak: what an exception has left behind dies with its frames

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of `size`, for an input and an output in turn."""
        memory = self._input() if self._input is not None else None
        self._input = None
        if memory is None or memory.shape != torch.Size(size):
            memory = torch.empty(size, dtype=dtype, device=device)
            if dtype == self._weight.dtype and self._weight.grad is None:
                self._input = weakref.ref(memory)
        return memory


def keep_gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Gather weights once, and have each step of `optimizer` write the gathered ones anew, in one operation.

    `model` is sharded, not yet run, and the optimizer's step alone changes its weights from here on, but for what is
    loaded into its `state_dict()`: that frees what is gathered, and the next forward gathers again. While weights are
    gathered, `model.parameters()` are those, in the compute dtype and without gradients; the sharded ones are the
    optimizer's. Nothing changes, and False is returned, where ranks share weights.
    """
    sharded = dict(model.named_parameters())
    if not holds_whole_weights(next(iter(sharded.values()))):
        return False
    model.set_reshard_after_backward(False)  # type: ignore[operator]

    @torch.no_grad()
    def refresh(*_: object) -> None:
        gathered: list[Tensor] = []
        masters: list[Tensor] = []
        for name, weight in model.named_parameters():
            if not isinstance(weight, DTensor):  # a checkpoint begun since the backward has freed what was gathered
                gathered.append(weight)
                masters.append(sharded[name].to_local())  # type: ignore[attr-defined]
        if gathered:
            torch._foreach_copy_(gathered, masters)

    optimizer.register_step_post_hook(refresh)
    return True
