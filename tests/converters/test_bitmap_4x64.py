"""The interleaved layout, against a loop over its definition; what a hostile one does; and 8-bit rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_same, dense64, matrices
from torch import Tensor

from trim_export.converters import Bitmap4x64, SparseMatrix, nbytes
from trim_export.converters.int8 import quantize_rows
from trim_export.errors import ArtifactError


def random_matrix(rows: int, columns: int, density: float, seed: int = 0) -> SparseMatrix:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density * 2 * torch.rand(rows, 1, generator=generator)
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))


SHAPES = st.tuples(st.sampled_from([1, 3, 4, 5, 8, 13]), st.sampled_from([1, 2, 63, 64, 65, 127, 128, 130, 200]))
DENSITIES = st.sampled_from([0.0, 0.03, 0.4, 1.0])


def as_defined(stored: dict[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    """The matrix in float64, read as a kernel reads it: both streams strictly forward."""
    rows, columns = shape
    masks: Iterator[int] = iter(stored["weight_mask"].flatten().tolist())
    values: Iterator[float] = iter(stored["weight_values"].tolist())
    order = stored["weight_order"].tolist()
    dense = np.zeros(shape)
    for group in range(-(-rows // 4)):
        for word in range(-(-columns // 64)):
            for i in range(4):
                bits = next(masks) % 2**64
                for bit in range(64):
                    if bits >> bit & 1:
                        dense[order[4 * group + i], 64 * word + bit] = next(values)
    assert next(masks, None) is None
    assert next(values, None) is None
    return dense


@settings(max_examples=60)
@given(shape=SHAPES, density=DENSITIES, seed=st.integers(0, 2**20))
def test_the_streams_hold_what_is_defined_and_come_back(shape: tuple[int, int], density: float, seed: int) -> None:
    matrix = random_matrix(*shape, density, seed)
    stored = Bitmap4x64().encode(matrix)
    np.testing.assert_array_equal(as_defined(stored, shape), dense64(matrix))
    counts = matrix.row_counts[stored["weight_order"].long()].tolist()
    assert counts == sorted(counts, reverse=True)
    groups, words = -(-shape[0] // 4), -(-shape[1] // 64)
    assert nbytes(stored) == 4 * shape[0] + 32 * groups * words + 4 * matrix.nnz
    assert_same(Bitmap4x64().decode(stored, shape), matrix)


@settings(max_examples=40)
@given(matrix=matrices(max_side=9))
def test_any_value_comes_back_to_the_bit(matrix: SparseMatrix) -> None:
    assert_same(Bitmap4x64().decode(Bitmap4x64().encode(matrix), matrix.shape), matrix)


def test_full_and_empty_rows_side_by_side() -> None:
    mask = torch.zeros(6, 100, dtype=torch.bool)
    mask[[1, 4]] = True
    mask[3, 99] = True
    matrix = SparseMatrix(mask, torch.arange(201.0))
    stored = Bitmap4x64().encode(matrix)
    assert stored["weight_order"].tolist() == [1, 4, 3, 0, 2, 5]
    np.testing.assert_array_equal(as_defined(stored, (6, 100)), dense64(matrix))


SHAPE = (5, 70)
MATRIX = random_matrix(*SHAPE, 0.3)
STORED = Bitmap4x64().encode(MATRIX)


def with_entry(name: str, index: int, value: int) -> dict[str, Tensor]:
    changed = STORED[name].clone()
    changed.view(-1)[index] = value
    return STORED | {name: changed}


@pytest.mark.parametrize("row", [-1, 5, 2**31 - 1, -(2**31), int(STORED["weight_order"][1])])
def test_an_order_that_does_not_name_each_row_once(row: int) -> None:
    with pytest.raises(ArtifactError, match=r"^tensor weight_order does not name each of the 5 rows once$"):
        Bitmap4x64().decode(with_entry("weight_order", 0, row), SHAPE)


def test_bits_beyond_the_matrix() -> None:
    beyond_columns, beyond_rows = 4, 9  # group 0, word 1, row 0; group 1, word 0, row 1
    for word, bits in ((beyond_columns, 1 << 6), (beyond_rows, 1)):
        stored = with_entry("weight_mask", word, int(STORED["weight_mask"].view(-1)[word]) | bits)
        # One more value, so that nothing but the place is wrong.
        stored |= {"weight_values": torch.ones(MATRIX.nnz + 1)}
        with pytest.raises(ArtifactError, match="weight_mask has bits set beyond the 5 x 70 weights"):
            Bitmap4x64().decode(stored, SHAPE)


@pytest.mark.parametrize("count", [0, MATRIX.nnz - 1, MATRIX.nnz + 1])
def test_as_many_values_as_bits(count: int) -> None:
    with pytest.raises(ArtifactError, match=f"keeps {MATRIX.nnz} weights, but weight_values has {count}"):
        Bitmap4x64().decode(STORED | {"weight_values": torch.ones(count)}, SHAPE)


@settings(max_examples=60)
@given(shape=SHAPES, density=DENSITIES, seed=st.integers(0, 2**20))
def test_eight_bit_rows_are_within_half_a_step(shape: tuple[int, int], density: float, seed: int) -> None:
    matrix = random_matrix(*shape, density, seed)
    quantized, scales = quantize_rows(matrix)
    assert torch.equal(quantized.mask, matrix.mask)
    assert quantized.values.dtype == torch.int8
    restored = dense64(quantized) * scales.double().numpy()[:, None]
    step = np.abs(dense64(matrix)).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored - dense64(matrix)) <= step / 2 * (1 + 1e-5)).all()
    stored = Bitmap4x64().encode(quantized)
    np.testing.assert_array_equal(as_defined(stored, shape), dense64(quantized))


def test_a_row_of_kept_zeros_stays_zero_in_eight_bits() -> None:
    quantized, scales = quantize_rows(
        SparseMatrix(torch.ones(2, 3, dtype=torch.bool), torch.tensor([0.0] * 3 + [1.0] * 3))
    )
    assert quantized.values.tolist() == [0, 0, 0, 127, 127, 127]
    assert scales[0] == 0
