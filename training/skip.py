"""Steps that are not taken: a loss or gradient norm that is no number, or that stands out from those before it.

In: the loss and the gradient norm of a step, on the device, the same on all ranks. Out: a flag on the device that the
fused AdamW heeds: with it, weights, moments and step count keep every bit, and a NaN never meets them. The host waits
for nothing. OLMo 2 multiplies the update by 0 instead, which lets a NaN through, and forgets its window at a resume;
here the window is a part of the checkpoint, and is forgotten where a resume is allowed to change what it is of.

A step stands out when its loss or its gradient norm is more than `sigmas` standard deviations above the mean of the
last `window` ones (OLMo 2: 6 and 128), once half a window is known. What enters the window then is the limit that was
broken: one spike does not blind the filter, and a new level is taken for normal after some steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Deviations below this share of the mean are noise of the arithmetic, not a spike: it bounds sigma from below.
RELATIVE_FLOOR = 1e-3


class SpikeFilter:
    """The recent losses and gradient norms, and how many steps were left out."""

    def __init__(self, window: int, sigmas: float, device: torch.device) -> None:
        """`sigmas` of 0 leaves out only what is no number."""
        self.sigmas = sigmas
        self._values = torch.zeros(2, window, device=device)  # losses and gradient norms, a ring each
        self._slots = torch.arange(window, device=device)
        self._entered = torch.zeros((), dtype=torch.int64, device=device)  # values that went in so far
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._in_all = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)

    def state(self) -> dict[str, Tensor]:
        """The tensors of this filter themselves, for a checkpoint to save or to fill."""
        return {
            "values": self._values,
            "entered": self._entered,
            "in_a_row": self._in_a_row,
            "in_all": self._in_all,
        }

    def forget(self) -> None:
        """Begin the window anew: steps to come are of another level than those in it. What was left out counts."""
        self._entered.zero_()
        self._in_a_row.zero_()

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 where the step of this loss [] and gradient norm [] is to be left out, else 0.0; fp32, on the device."""
        new = torch.stack((loss, grad_norm)).to(self._values)  # [2]
        window = self._values.shape[1]
        known = self._slots < self._entered  # [window]
        count = known.sum().clamp_min(1)
        values = self._values.double()  # the square of a number of fp32 may be too large for fp32
        mean = (values * known).sum(1) / count
        variance = ((values - mean[:, None]).square() * known).sum(1) / count
        sigma = torch.maximum(variance.sqrt(), RELATIVE_FLOOR * mean.abs())
        enough = self._entered >= max(2, window // 2)
        limit = torch.where(enough & (self.sigmas > 0), mean + self.sigmas * sigma, torch.inf)
        finite = new.isfinite().all()
        skipped = ~finite | (new > limit).any()

        # By a mask: an index that is a tensor would be read by the host.
        enters = (self._slots == self._entered % window) & finite
        self._values.copy_(torch.where(enters, torch.minimum(new, limit)[:, None], self._values))
        self._entered += finite
        self._in_a_row.copy_(torch.where(skipped, self._in_a_row + 1, 0))
        self._in_all += skipped
        self._longest.copy_(torch.maximum(self._longest, self._in_a_row))
        return skipped.float()

    def counts(self) -> tuple[Tensor, Tensor]:
        """Steps left out since the run began, and most of them one after the other in this filter's life: [] each."""
        return self._in_all, self._longest

    @property
    def in_a_row(self) -> int:
        """Steps left out one after the other, up to the last; waits for the device."""
        return int(self._in_a_row)

    @property
    def longest(self) -> int:
        """Most steps left out one after the other, in this filter's life; waits for the device."""
        return int(self._longest)
