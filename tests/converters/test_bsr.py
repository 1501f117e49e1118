"""BSR against scipy, its size, and hostile blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import bsr_array
from strategies import assert_same, dense64, matrices
from torch import Tensor

from trim_export.converters import Bsr, SparseMatrix, nbytes
from trim_export.converters.bsr import cost
from trim_export.errors import ArtifactError, UsageError

BLOCKS = st.tuples(st.integers(1, 9), st.integers(1, 9))
SHAPE = (3, 5)


@pytest.fixture
def stored() -> dict[str, Tensor]:
    """3 x 5 in blocks of 2 x 2: the blocks (0, 0), (0, 2) and (1, 2) are kept."""
    weight = torch.tensor([[1.0, 2, 0, 0, 5], [6, 7, 0, 0, 0], [0, 0, 0, 0, 9]])
    return Bsr((2, 2)).encode(SparseMatrix.from_dense(weight))


def test_the_layout_on_disk_is_fixed(stored: dict[str, Tensor]) -> None:
    assert stored["weight_values"].tolist() == [[[1, 2], [6, 7]], [[5, 0], [0, 0]], [[9, 0], [0, 0]]]
    assert stored["weight_columns"].tolist() == [0, 2, 2]
    assert stored["weight_row_ptr"].tolist() == [0, 2, 3]
    assert (stored["weight_columns"].dtype, stored["weight_row_ptr"].dtype) == (torch.int16, torch.int32)


@settings(max_examples=60, deadline=None)
@given(matrix=matrices(), block=BLOCKS)
def test_scipy_reads_the_same_matrix_and_cost_foresees_the_bytes(matrix: SparseMatrix, block: tuple[int, int]) -> None:
    stored = Bsr(block).encode(matrix)
    (rows, columns), (r, c) = matrix.shape, block
    arrays = (
        stored["weight_values"].double().numpy(),
        stored["weight_columns"].int().numpy(),
        stored["weight_row_ptr"].numpy(),
    )
    height, width = (rows + r - 1) // r * r, (columns + c - 1) // c * c
    reference = bsr_array(arrays, shape=(height, width), blocksize=block)
    reference.check_format(full_check=True)
    padded = reference.toarray()
    np.testing.assert_array_equal(padded[:rows, :columns], dense64(matrix))
    assert not padded[rows:].any()
    assert not padded[:, columns:].any()
    assert cost(matrix, block) == nbytes(stored)


@settings(max_examples=60, deadline=None)
@given(matrix=matrices(), block=BLOCKS)
def test_the_block_is_read_from_the_values(matrix: SparseMatrix, block: tuple[int, int]) -> None:
    kept = SparseMatrix.from_dense(matrix.to_dense())
    assert_same(Bsr((4, 4)).decode(Bsr(block).encode(matrix), matrix.shape), kept)


def test_only_blocks_that_keep_something_are_stored() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[8:12, 20:24] = True
    mask[63, 0] = True
    matrix = SparseMatrix(mask, torch.ones(17))
    assert Bsr().encode(matrix)["weight_values"].shape == (2, 4, 4)
    assert cost(matrix, (4, 4)) == 2 * (16 * 4 + 2) + 17 * 4


@pytest.mark.parametrize("block", [(0, 4), (4, 0), (-1, 4)])
def test_an_impossible_block_is_a_usage_error(block: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"a block of {block[0]} x {block[1]} is impossible"):
        Bsr(block)


@pytest.mark.parametrize(("number", "row", "column"), [(1, 0, 1), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_padding_must_be_zero(stored: dict[str, Tensor], number: int, row: int, column: int, value: float) -> None:
    stored["weight_values"][number, row, column] = value
    with pytest.raises(ArtifactError, match="weight_values is not zero beyond the 3 x 5 weights"):
        Bsr().decode(stored, SHAPE)


@pytest.mark.parametrize("blocks", [0, 2, 4])
def test_as_many_blocks_as_indices(stored: dict[str, Tensor], blocks: int) -> None:
    with pytest.raises(ArtifactError, match=f"weight_values has {blocks} blocks, but weight_columns has 3"):
        Bsr().decode(stored | {"weight_values": torch.ones(blocks, 2, 2)}, SHAPE)


@pytest.mark.parametrize("block", [(0, 2), (2, 0)])
def test_blocks_without_weights_are_refused(stored: dict[str, Tensor], block: tuple[int, int]) -> None:
    with pytest.raises(ArtifactError, match=f"weight_values has blocks of {block[0]} x {block[1]} weights"):
        Bsr().decode(stored | {"weight_values": torch.ones(3, *block)}, SHAPE)


@pytest.mark.parametrize("side", [2**31, 2**60])
def test_no_block_at_all_cannot_claim_a_huge_block(side: int) -> None:
    tensors = {
        "weight_values": torch.empty(0, side, 1),
        "weight_columns": torch.zeros(0, dtype=torch.int16),
        "weight_row_ptr": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(ArtifactError, match=f"8 stored bytes cannot be a matrix of {side} x 5 weights"):
        Bsr().decode(tensors, SHAPE)


@pytest.mark.parametrize(
    ("name", "numbers", "reason"),
    [
        ("weight_columns", [0, 3, 2], r"has an index outside 0\.\.2"),
        ("weight_columns", [-1, 2, 2], r"has an index outside 0\.\.2"),
        ("weight_columns", [2, 0, 2], "is not strictly increasing in row 0"),
        ("weight_columns", [2, 2, 2], "is not strictly increasing in row 0"),
        ("weight_row_ptr", [1, 2, 3], "starts at 1"),
        ("weight_row_ptr", [0, 4, 3], "decreases at row 1"),
        ("weight_row_ptr", [0, 2, 2], "ends at 2"),
        ("weight_row_ptr", [0, 2, 3, 3], r"has shape \[4\]; expected \[3\]"),
    ],
)
def test_hostile_structure(stored: dict[str, Tensor], name: str, numbers: list[int], reason: str) -> None:
    with pytest.raises(ArtifactError, match=f"^tensor {name} {reason}"):
        Bsr().decode(stored | {name: torch.tensor(numbers, dtype=stored[name].dtype)}, SHAPE)
