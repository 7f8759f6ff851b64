"""The rows of the training benchmark: what each one runs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Row:
    """One measurement: a model, the shape of its micro-batch, a number of GPUs, and overrides of train.py."""

    name: str
    model: str  # option of the `model` group
    micro_batch_size: int
    sequence_length: int = 4096
    gpus: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The command line of train.py, data and run directory left out. One micro-batch a rank and step."""
        return [
            f"model={self.model}",
            f"data.sequence_length={self.sequence_length}",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.global_batch_size={self.micro_batch_size * self.gpus}",
            *self.overrides,
        ]


PLAIN = ("parallel.compile=false",)
SELECTIVE = ("parallel.activation_checkpointing=selective",)
FULL = ("parallel.activation_checkpointing=full",)

# Micro-batches about as large as scripts/estimate_memory.py says that 150 GB hold, and such as do not fit.
LARGEST = [
    ("olmo2_700m", "", (), (22, 24, 28)),
    ("olmo2_700m", "-selective", SELECTIVE, (78, 86, 94)),
    ("olmo2_700m", "-full", FULL, (184, 208, 256)),
    ("moda_700m", "", (), (18, 20, 24)),
    ("moda_700m", "-selective", SELECTIVE, (64, 72, 80)),
    ("moda_700m", "-full", FULL, (76, 84, 94)),
]

ROWS = [
    *(Row(f"{model}", model, 8) for model in ("olmo2_700m", "moda_700m")),
    *(Row(f"{model}/micro-batch-4", model, 4) for model in ("olmo2_700m", "moda_700m")),
    *(Row(f"{model}/plain", model, 8, overrides=PLAIN) for model in ("olmo2_700m", "moda_700m")),
    *(Row(f"{model}/selective", model, 8, overrides=SELECTIVE) for model in ("olmo2_700m", "moda_700m")),
    *(Row(f"{model}/full", model, 8, overrides=FULL) for model in ("olmo2_700m", "moda_700m")),
    Row("moda_700m/no-ffn-slots", "moda_700m", 8, overrides=("model.ffn_kv_proj=false",)),
    *(Row(f"{model}", model, 8) for model in ("olmo2_1_5b", "moda_1_5b")),
    *(Row(f"{model}/16k", model, 2, 16384) for model in ("olmo2_700m", "moda_700m")),
    *(Row(f"{model}/64k", model, 1, 65536, overrides=SELECTIVE) for model in ("olmo2_700m", "moda_700m")),
    *(Row(f"{model}/{n}-gpus", model, 8, gpus=n) for n in (2, 4) for model in ("olmo2_700m", "moda_700m")),
    *(
        Row(f"{model}/largest-{size}{kind}", model, size, overrides=overrides)
        for model, kind, overrides, sizes in LARGEST
        for size in sizes
    ),
]


def chosen(patterns: list[str]) -> list[Row]:
    """The rows whose names match one of the shell patterns. Raises ValueError for a pattern without any."""
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) for row in ROWS):
            raise ValueError(f"--rows {pattern} matches none of {', '.join(row.name for row in ROWS)}.")
    return [row for row in ROWS if any(fnmatch(row.name, pattern) for pattern in patterns)]
