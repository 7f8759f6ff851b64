"""Figures of the paper (arXiv 2603.15619) that the measurements stand beside: Tables 2 and 7, taken on one A100."""

from __future__ import annotations

from typing import NamedTuple

HEAD_DIM, KV_HEADS = 64, 8  # of both tables


class Table2Row(NamedTuple):
    """One row: sequence length T, group G (queries a kv head), slots L; forward + backward in ms."""

    time: int
    group: int
    slots: int
    fa2_ms: float
    moda_ms: float

    @property
    def ratio(self) -> float:
        """MoDA over FA2-Triton."""
        return self.moda_ms / self.fa2_ms


TABLE_2 = (
    Table2Row(4096, 8, 64, 7.970, 10.750),
    Table2Row(8192, 8, 64, 28.700, 35.427),
    Table2Row(16384, 8, 64, 116.700, 127.661),
    Table2Row(32768, 8, 64, 459.854, 480.914),
    Table2Row(65536, 8, 64, 1831.668, 1883.026),
    Table2Row(16384, 2, 64, 28.982, 39.741),
    Table2Row(16384, 4, 64, 58.071, 68.939),
    Table2Row(16384, 16, 64, 233.700, 244.900),
    Table2Row(16384, 32, 64, 467.107, 480.767),
    Table2Row(16384, 8, 128, 116.700, 138.224),
    Table2Row(16384, 8, 256, 116.700, 167.958),
)

# Table 7: T = 1024, G = 8, 64 query heads, L = 64, forward + backward, ms.
TABLE_7_TIME, TABLE_7_GROUP, TABLE_7_SLOTS = 1024, 8, 64
TABLE_7 = {"naive": 2128.9, "flat": 13.102, "chunk-aware": 6.286, "group-aware": 1.460}
