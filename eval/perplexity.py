"""Validation loss by domain, on the same held-out instances each time.

In: a decoder (sharded or not) and a token dataset for each domain. Out: mean cross-entropy in nats,
perplexity and bits per byte of every domain, and their mean over domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.documents import micro_batch
from data.shards import DataError, TokenDataset
from models.decoder import Decoder


class PerplexityEvaluator:
    """Reads the first `instances` instances of every domain, dealt out over ranks.

    Args:
        folders: the token dataset of every domain, by name.
        sequence_length: tokens of an instance.
        instances: instances of each domain (None: all).
        micro_batch_size: instances a rank computes at a time.
        document_mask: tokens see their own document only.
        rank, world_size: this process among those that evaluate.
        reduce: sums a float64 tensor over ranks, in place of the identity for one process.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        sequence_length: int,
        *,
        instances: int | None,
        micro_batch_size: int,
        document_mask: bool = False,
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> None:
        self.datasets = {domain: TokenDataset(folder, sequence_length) for domain, folder in folders.items()}
        self.document_mask = document_mask
        self.instances, self.micro_batch_size = instances, micro_batch_size
        self.rank, self.world_size, self.reduce = rank, world_size, reduce

    @property
    def size(self) -> int:
        """Instances of all domains together, on all ranks."""
        return sum(map(self._size, self.datasets.values()))

    @torch.no_grad()
    def evaluate(
        self,
        model: Decoder,
        device: torch.device,
        stop: Callable[[str | None], bool] = lambda failure: False,
        done: Callable[[int], None] = lambda instances: None,
    ) -> dict[str, float] | None:
        """`validation/DOMAIN/{loss,perplexity,bits_per_byte}` and `validation/mean/loss`, `.../perplexity`.

        Ranks compute equally many batches, since a sharded model gathers weights together; all return the result.
        `stop` is asked before each batch, and must say the same on all ranks: when it is true, the result is None. It
        is told why this rank cannot read its batches, or None; where that is no reason to stop, `DataError` is raised.
        `done` is told after each batch how many instances all ranks took.
        """
        metrics: dict[str, float] = {}
        losses = []
        for domain, dataset in self.datasets.items():
            total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, targets
            eos_id = dataset.manifest.eos_id if self.document_mask else None
            try:
                batches = self._batches(dataset)
            except (DataError, OSError) as error:
                why = str(error) if isinstance(error, DataError) else f"{dataset.folder} cannot be read ({error})."
                if stop(why):  # the others are about to ask before their first batch
                    return None
                raise DataError(why) from error
            left = self._size(dataset)
            for rows in batches:
                if stop(None):
                    return None
                batch = micro_batch(rows, eos_id, weight=1.0).to(device)
                count = (batch.targets >= 0).sum()
                total += torch.stack((model(*batch[:3]).cross_entropy.double() * count, count))
                taken = min(left, len(rows) * self.world_size)
                left -= taken
                done(taken)
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

    def _size(self, dataset: TokenDataset) -> int:
        """Instances of a domain."""
        return len(dataset) if self.instances is None else min(self.instances, len(dataset))

    def _batches(self, dataset: TokenDataset) -> list[np.ndarray]:
        """This rank's batches, [rows, sequence_length + 1]; rows of -1 fill up the last, or a rank.

        All have one size: each would be a graph of its own where the model is compiled, and after eight of a function
        PyTorch compiles no more of it, for training neither.
        """
        size, largest = self._size(dataset), max(map(self._size, self.datasets.values()))
        rows, most = (-(-instances // self.world_size) for instances in (size, largest))  # of every rank
        step = min(self.micro_batch_size, most)
        empty = np.full(dataset.sequence_length + 1, -1, dtype=np.int64)
        batches = []
        for start in range(0, rows, step):
            indices = [row * self.world_size + self.rank for row in range(start, start + step)]
            batches.append(np.stack([dataset[i] if i < size else empty for i in indices]))
        return batches


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
