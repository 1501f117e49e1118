"""The bit layout, against plain arithmetic, and what a hostile bit mask does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import dense64, matrices
from torch import Tensor

from trim_export.converters import Bitmap, SparseMatrix, nbytes
from trim_export.errors import ArtifactError

SHAPE = (2, 11)
MASK = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
STORED = {
    "weight_mask": torch.tensor([[0b10000001, 0b010], [0, 0b100]], dtype=torch.uint8),
    "weight_values": torch.tensor([1.0, -0.0, 3.0, 4.0]),
}


def decode(**changed: Tensor) -> SparseMatrix:
    return Bitmap().decode(STORED | changed, SHAPE)


def test_the_layout_on_disk_is_fixed() -> None:
    stored = Bitmap().encode(SparseMatrix(MASK, STORED["weight_values"]))
    assert torch.equal(stored["weight_mask"], STORED["weight_mask"])
    assert torch.equal(stored["weight_values"], STORED["weight_values"])
    assert torch.equal(decode().mask, MASK)


@settings(max_examples=60, deadline=None)
@given(matrix=matrices())
def test_every_bit_says_whether_its_weight_is_kept(matrix: SparseMatrix) -> None:
    stored = Bitmap().encode(matrix)
    rows, columns = matrix.shape
    assert stored["weight_mask"].shape == (rows, (columns + 7) // 8)
    values = iter(stored["weight_values"].tolist())
    dense = np.zeros(matrix.shape)
    for row, line in enumerate(stored["weight_mask"].tolist()):
        for column in range(columns):
            if line[column // 8] >> column % 8 & 1:
                dense[row, column] = next(values)
    np.testing.assert_array_equal(dense, dense64(matrix))
    assert nbytes(stored) == rows * ((columns + 7) // 8) + matrix.nnz * matrix.values.element_size()


@pytest.mark.parametrize("bit", [3, 4, 5, 6, 7])
def test_bits_beyond_the_width_are_refused(bit: int) -> None:
    mask = STORED["weight_mask"].clone()
    mask[0, 1] |= 1 << bit
    # One more value, so that nothing but the padding is wrong.
    values = torch.ones(5)
    with pytest.raises(ArtifactError, match="weight_mask has bits set beyond column 10"):
        decode(weight_mask=mask, weight_values=values)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_as_many_values_as_bits(count: int) -> None:
    with pytest.raises(ArtifactError, match=f"weight_mask keeps 4 weights, but weight_values has {count}"):
        decode(weight_values=torch.ones(count))


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (2, 1), (2, 3), (2, 11)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ArtifactError, match=r"weight_mask has shape .* expected \[2, 2\]"):
        decode(weight_mask=torch.zeros(shape, dtype=torch.uint8))
