"""Validation loss by domain, on the same held-out instances each time.

In: a decoder (sharded or not) and the validation folders of a shards directory. Out: mean cross-entropy in nats,
perplexity and bits per byte of every domain, and their mean over domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.shards import TokenDataset, validation_domains
from models.decoder import Decoder


class PerplexityEvaluator:
    """Reads the first `instances` instances of every domain, dealt out over ranks.

    Args:
        shards: the shards directory; every folder of `validation/` is a domain.
        sequence_length: tokens of an instance.
        instances: instances of each domain (None: all).
        micro_batch_size: instances a rank computes at a time.
        rank, world_size: this process among those that evaluate.
        reduce: sums a float64 tensor over ranks, in place of the identity for one process.
    """

    def __init__(
        self,
        shards: str | Path,
        sequence_length: int,
        *,
        instances: int | None,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> None:
        self.datasets = {
            domain: TokenDataset(Path(shards) / "validation" / domain, sequence_length)
            for domain in validation_domains(shards)
        }
        self.instances, self.micro_batch_size = instances, micro_batch_size
        self.rank, self.world_size, self.reduce = rank, world_size, reduce

    @torch.no_grad()
    def evaluate(self, model: Decoder, device: torch.device) -> dict[str, float]:
        """`validation/DOMAIN/{loss,perplexity,bits_per_byte}` and `validation/mean/loss`, `.../perplexity`.

        Ranks compute equally many batches, since a sharded model gathers weights together; all return the result.
        """
        metrics: dict[str, float] = {}
        losses = []
        for domain, dataset in self.datasets.items():
            total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, targets
            for batch in self._batches(dataset):
                ids = torch.from_numpy(batch).to(device)
                targets = ids[:, 1:]
                count = (targets >= 0).sum()
                total += torch.stack((model(ids[:, :-1].clamp_min(0), targets).cross_entropy.double() * count, count))
            nats, count = self.reduce(total).tolist()
            loss = nats / count
            losses.append(loss)
            prefix = f"validation/{domain}"
            metrics[f"{prefix}/loss"] = loss
            metrics[f"{prefix}/perplexity"] = _exp(loss)
            metrics[f"{prefix}/bits_per_byte"] = loss / math.log(2) / dataset.manifest.bytes_per_token
        if losses:
            metrics["validation/mean/loss"] = sum(losses) / len(losses)
            metrics["validation/mean/perplexity"] = _exp(metrics["validation/mean/loss"])
        return metrics

    def _batches(self, dataset: TokenDataset) -> list[np.ndarray]:
        """This rank's batches, [rows, sequence_length + 1]; rows of -1 fill up a rank that has fewer."""
        size = len(dataset) if self.instances is None else min(self.instances, len(dataset))
        rows = -(-size // self.world_size)  # of every rank
        batches = []
        for start in range(0, rows, self.micro_batch_size):
            indices = [
                row * self.world_size + self.rank for row in range(start, min(start + self.micro_batch_size, rows))
            ]
            empty = np.full(dataset.sequence_length + 1, -1, dtype=np.int64)
            batches.append(np.stack([dataset[i] if i < size else empty for i in indices]))
        return batches


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
