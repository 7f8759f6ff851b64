"""Copies of a checkpoint's tensors in host memory, made beside training.

In: nested dicts of tensors, plain ones or DTensors. Out: the same names, with copies in memory of the host that is kept
from save to save. From a GPU they are page-locked once and filled by a stream of their own: the stream of the
computation waits for it before the weights change, the host never does.

dcp's `DefaultStager` is meant for the same. In torch 2.11 it frees its memory after each copy, so that every save pins
it again, and fails at the second one (`KeyError: <class 'type'>`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.host_memory import available_memory

SPARE_BYTES = 2**31  # of host memory that copies leave: a system that runs out of it ends processes
GROUP_BYTES = 2**26  # tensors are page-locked together up to here: a call for each small one would cost more
ALIGNMENT = 512  # bytes


class HostCopy:
    """Memory for copies of tensors, one copy at a time: `prepare` once, then `begin`, `hold` and `finish` for each.

    Another thread may call `finish` and `waited`, before `hold` or after it.
    """

    @torch.no_grad()
    def __init__(self, tensors: dict[str, Any], device: torch.device) -> None:
        """Nothing is copied yet, and hardly any memory taken.

        Args:
            tensors: nested dicts of what will be copied, all of it on `device`.
            device: a CPU, or the current CUDA device.
        """
        self.tensors = _like(tensors)
        self._locked: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None  # the end of the copy
        self._held: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # begin and end of the device's wait for it

    @torch.no_grad()
    def prepare(self) -> None:
        """Take the memory and page-lock it for a GPU: seconds for 10 GB, in any thread with that device current.

        Raises:
            RuntimeError, MemoryError: it is not to be had.
        """
        if self._stream is None:
            return
        needed = sum(_rounded(leaf.nbytes) for leaf in _leaves(self.tensors))
        for group in _groups(_leaves(self.tensors)):
            sizes = [_rounded(leaf.nbytes) for leaf in group]
            free = available_memory()  # anew for each group: other ranks of the host take theirs at the same time
            if free is not None and free < sum(sizes) + SPARE_BYTES:
                raise MemoryError(
                    f"copies of {needed / 1e9:.1f} GB leave less than {SPARE_BYTES / 1e9:.1f} GB of host memory: "
                    f"{free / 1e9:.1f} GB are free"
                )
            memory = torch.zeros(sum(sizes), dtype=torch.uint8)  # written, so that its pages exist when they are locked
            if memory.numel():
                status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
                if status:
                    raise RuntimeError(f"{memory.numel() / 1e6:,.0f} MB could not be page-locked, CUDA error {status}")
                self._locked.append(memory)
            for leaf, part in zip(group, memory.split(sizes), strict=True):
                leaf.set_(part[: leaf.nbytes].view(leaf.dtype).view(leaf.shape))

    @torch.no_grad()
    def begin(self, tensors: dict[str, Any]) -> None:
        """Copy what `tensors` hold when all that is queued on the current stream is done; on a CPU, now.

        They must live, and may not change, until `hold` was called or `finish` has returned.
        """
        self._held = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # nothing where there is none
            for copy, tensor in zip(_leaves(self.tensors), _leaves(tensors), strict=True):
                copy.copy_(tensor, non_blocking=self._stream is not None)
        if self._stream is not None:
            self._copied = self._stream.record_event()

    def hold(self) -> None:
        """Have the current stream wait for the copy: what is queued after this may change the tensors."""
        if self._stream is None:
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda.current_stream().wait_stream(self._stream)
        end.record()
        self._held = begin, end

    def finish(self) -> None:
        """Wait until the copy is whole."""
        if self._copied is not None:
            self._copied.synchronize()

    def waited(self) -> float:
        """After `finish`: how long the device has waited for the copy, in seconds."""
        if self._held is None:
            return 0.0
        begin, end = self._held
        return begin.elapsed_time(end) / 1e3 if end.query() else 0.0  # else the device comes to it now

    def close(self) -> None:
        """Unlock the memory. The copies stay as they are; there are no more after this."""
        if self._stream is not None:
            self._stream.synchronize()
        for memory in self._locked:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._locked.clear()


def _like(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same names with contiguous tensors on the CPU, whose memory is not used yet."""
    return {
        name: _like(value)
        if isinstance(value, dict)
        else torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _leaves(tensors: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor, in the order of names; of a DTensor the part of this rank (without gradients that, and no view)."""
    for _, value in sorted(tensors.items()):
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value.to_local() if isinstance(value, DTensor) else value


def _groups(leaves: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for leaf in leaves:
        group.append(leaf)
        if sum(_rounded(one.nbytes) for one in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
