"""The plain matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import dense64, matrices

from trim_export.converters import Dense, SparseMatrix, nbytes
from trim_export.errors import ArtifactError


@settings(max_examples=60, deadline=None)
@given(matrix=matrices())
def test_weights_stand_where_the_mask_says(matrix: SparseMatrix) -> None:
    stored = Dense().encode(matrix)
    np.testing.assert_array_equal(stored["weight"].double().numpy(), dense64(matrix))
    rows, columns = matrix.shape
    assert nbytes(stored) == rows * columns * matrix.values.element_size()


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (6,), (1, 2, 3)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match=r"^tensor weight has shape .*; expected \[2, 3\]$"):
        Dense().decode({"weight": torch.ones(shape)}, (2, 3))
