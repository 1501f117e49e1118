"""CSR against scipy, and hostile pointers and indices one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from strategies import dense64, matrices
from torch import Tensor

from trim_export.converters import Csr, SparseMatrix, nbytes
from trim_export.errors import ArtifactError

SHAPE = (4, 6)
STORED = {
    "weight_values": torch.tensor([1.0, 2.0, 0.0, 4.0]),
    "weight_columns": torch.tensor([1, 5, 0, 1], dtype=torch.int16),
    "weight_row_ptr": torch.tensor([0, 2, 2, 4, 4], dtype=torch.int32),
}


def decode(**changed: list[int]) -> SparseMatrix:
    tensors = {f"weight_{name}": torch.tensor(numbers) for name, numbers in changed.items()}
    return Csr().decode(STORED | {name: t.to(STORED[name].dtype) for name, t in tensors.items()}, SHAPE)


def refused(tensors: dict[str, Tensor], shape: tuple[int, int]) -> bool:
    try:
        decoded = Csr().decode(tensors, shape)
    except ArtifactError:
        return True
    again = Csr().encode(decoded)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    return False


def test_the_layout_on_disk_is_fixed() -> None:
    decoded = decode()
    assert decoded.mask.nonzero().tolist() == [[0, 1], [0, 5], [2, 0], [2, 1]]
    assert decoded.values.tolist() == [1, 2, 0, 4]
    stored = Csr().encode(decoded)
    assert all(torch.equal(stored[name], tensor) for name, tensor in STORED.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in STORED.items())


@settings(max_examples=60, deadline=None)
@given(matrix=matrices())
def test_scipy_reads_the_same_matrix(matrix: SparseMatrix) -> None:
    stored = Csr().encode(matrix)
    arrays = (
        stored["weight_values"].double().numpy(),
        stored["weight_columns"].int().numpy(),
        stored["weight_row_ptr"].numpy(),
    )
    reference = csr_array(arrays, shape=matrix.shape)
    reference.check_format(full_check=True)
    assert reference.has_canonical_format
    np.testing.assert_array_equal(reference.toarray(), dense64(matrix))
    value = matrix.values.element_size()
    assert nbytes(stored) == matrix.nnz * (value + 2) + 4 * (matrix.shape[0] + 1)


@pytest.mark.parametrize(("columns", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_indices_widen_when_they_must(columns: int, dtype: torch.dtype) -> None:
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[:, -1] = True
    stored = Csr().encode(SparseMatrix(mask, torch.ones(2)))
    assert stored["weight_columns"].dtype == dtype
    assert torch.equal(Csr().decode(stored, (2, columns)).mask, mask)


@pytest.mark.parametrize(
    ("row_ptr", "reason"),
    [
        ([1, 2, 2, 4, 4], "weight_row_ptr starts at 1 instead of 0"),
        ([-1, 2, 2, 4, 4], "weight_row_ptr starts at -1 instead of 0"),
        ([0, 3, 2, 4, 4], "weight_row_ptr decreases at row 1"),
        ([0, 2, 2, 5, 4], "weight_row_ptr decreases at row 3"),
        ([0, 2**31 - 1, -(2**31), 4, 4], "weight_row_ptr decreases at row 1"),
        ([0, 2, 2, 4, 3], "weight_row_ptr decreases at row 3"),
        ([0, 2, 2, 3, 3], "weight_row_ptr ends at 3, but weight_columns has 4"),
        ([0, 2, 2, 4, 5], "weight_row_ptr ends at 5, but weight_columns has 4"),
        ([0, 2, 2, 4, 2**31 - 1], "weight_row_ptr ends at 2147483647, but weight_columns has 4"),
        ([0, 2, 2, 4], r"weight_row_ptr has shape \[4\]; expected \[5\]"),
        ([0, 2, 2, 4, 4, 4], r"weight_row_ptr has shape \[6\]; expected \[5\]"),
        ([], r"weight_row_ptr has shape \[0\]; expected \[5\]"),
    ],
)
def test_hostile_row_pointers(row_ptr: list[int], reason: str) -> None:
    with pytest.raises(ArtifactError, match=f"^tensor {reason}"):
        decode(row_ptr=row_ptr)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ([-1, 5, 0, 1], r"has an index outside 0\.\.5"),
        ([1, 6, 0, 1], r"has an index outside 0\.\.5"),
        ([1, 32767, 0, 1], r"has an index outside 0\.\.5"),
        ([5, 1, 0, 1], "is not strictly increasing in row 0"),
        ([1, 1, 0, 1], "is not strictly increasing in row 0"),
        ([1, 5, 1, 0], "is not strictly increasing in row 2"),
        ([1, 5, 1, 1], "is not strictly increasing in row 2"),
    ],
)
def test_hostile_column_indices(columns: list[int], reason: str) -> None:
    with pytest.raises(ArtifactError, match=f"^tensor weight_columns {reason}$"):
        decode(columns=columns)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_as_many_values_as_indices(count: int) -> None:
    with pytest.raises(ArtifactError, match=f"weight_values has {count} values, but weight_columns has 4"):
        decode(values=[1] * count)


@pytest.mark.parametrize(("name", "dtype"), [("weight_columns", torch.int32), ("weight_row_ptr", torch.int64)])
def test_there_is_one_right_index_dtype(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ArtifactError, match=f"{name} holds {str(dtype)[6:]}; expected int"):
        Csr().decode(STORED | {name: STORED[name].to(dtype)}, SHAPE)


def test_a_few_bytes_cannot_claim_a_huge_matrix() -> None:
    tensors = {
        "weight_values": torch.zeros(0),
        "weight_columns": torch.zeros(0, dtype=torch.int32),
        "weight_row_ptr": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(ArtifactError, match="8 stored bytes cannot be a matrix of 1 x 1099511627776 weights"):
        Csr().decode(tensors, (1, 2**40))
    assert not refused(tensors, (1, 2**17))


@settings(max_examples=150, deadline=None)
@given(
    row_ptr=st.lists(st.integers(-1, 4), min_size=2, max_size=4).map(lambda some: [0, *some]),
    columns=st.lists(st.integers(-1, 4), max_size=4),
)
def test_what_is_accepted_is_what_would_be_written(row_ptr: list[int], columns: list[int]) -> None:
    width = 4
    tensors = {
        "weight_values": torch.ones(len(columns)),
        "weight_columns": torch.tensor(columns, dtype=torch.int16),
        "weight_row_ptr": torch.tensor(row_ptr, dtype=torch.int32),
    }
    # Slicing forgives wild bounds, so this must come after them.
    steady = row_ptr == sorted(row_ptr) and row_ptr[-1] == len(columns)
    in_range = all(0 <= column < width for column in columns)
    rows = [columns[start:stop] for start, stop in pairwise(row_ptr)]
    valid = steady and in_range and all(row == sorted(set(row)) for row in rows)
    assert refused(tensors, (len(row_ptr) - 1, width)) == (not valid)
