"""Rows to micro-batches: marked ids are inputs and no targets, documents end at EOS and at the end of a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.documents import document_boundaries, inputs_of, micro_batch

EOS = 9


def test_a_marked_id_is_an_input_and_no_target() -> None:
    rows = np.array([[1, 2, ~3, 4, EOS], [5, EOS, ~EOS, ~EOS, ~0]])
    batch = micro_batch(rows, None, weight=0.25)
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [5, EOS, EOS, EOS]]
    assert (batch.targets >= 0).tolist() == [[True, False, True, True], [True, False, False, False]]
    assert batch.targets[0].tolist()[2:] == [4, EOS]
    assert (batch.cu_seqlens, batch.weight) == (None, 0.25)
    assert inputs_of(rows).flags.c_contiguous


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        ([[1, 2, 3, 4]], [4]),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], [4, 8]),
        ([[1, EOS, 3, 4]], [2, 4]),
        ([[1, EOS, 3, EOS], [EOS, EOS, 7, 8]], [2, 4, 5, 6, 8]),
    ],
)
def test_documents_end_after_eos_and_with_the_row(ids: list[list[int]], ends: list[int]) -> None:
    found = document_boundaries(np.array(ids), EOS)
    assert found.dtype == np.int32
    total = np.array(ids).size
    assert found.tolist() == [0, *ends] + [total] * (len(found) - 1 - len(ends))
    assert len(found) - 1 in (1, 2, 4, 8)
    assert len(found) - 1 < 2 * len(ends)


def test_boundaries_of_many_random_rows_take_few_shapes() -> None:
    generator = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        ids = np.where(generator.random((4, 64)) < 0.05, EOS, 1)
        found = document_boundaries(ids, EOS)
        shapes.add(len(found))
        lengths = np.diff(found)
        assert lengths.min() >= 0
        assert lengths.sum() == ids.size
        assert (ids.reshape(-1)[np.cumsum(lengths)[:-1][lengths[1:] > 0] - 1] == EOS).sum() >= (ids == EOS).sum() - 4
    assert len(shapes) <= 4


def test_moving_keeps_everything() -> None:
    batch = micro_batch(np.array([[1, EOS, 3, 4, 5]]), EOS, weight=0.5)
    moved = batch.to(torch.device("meta"))
    assert [x.device.type for x in (moved.inputs, moved.targets, moved.cu_seqlens)] == ["meta"] * 3
    assert moved.weight == 0.5
