"""What holds for every encoding of the registry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, assert_same, matrices

from trim_export.converters import ENCODINGS, Encoding, SparseMatrix, nbytes
from trim_export.errors import ArtifactError

EXACT = [ENCODINGS[name] for name in ("bitmap", "csr", "bitmap-4x64", "g8", "csr-interleaved")]
ZERO_DROPPING = [ENCODINGS["bsr"], ENCODINGS["dense"]]
ALL = EXACT + ZERO_DROPPING


def names(encoding: Encoding) -> str:
    return encoding.name


@pytest.fixture
def matrix() -> SparseMatrix:
    """5 x 9, about half kept, the second row empty."""
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    weight[weight < 0] = 0
    weight[1] = 0
    return SparseMatrix.from_dense(weight)


def test_the_registry_is_keyed_by_name() -> None:
    assert list(ENCODINGS) == ["bitmap", "csr", "bsr", "bitmap-4x64", "g8", "csr-interleaved", "dense"]
    assert all(name == encoding.name for name, encoding in ENCODINGS.items())


@pytest.mark.parametrize("encoding", EXACT, ids=names)
@settings(max_examples=80, deadline=None)
@given(matrix=matrices())
def test_round_trip_is_exact_to_the_bit(encoding: Encoding, matrix: SparseMatrix) -> None:
    assert_same(encoding.decode(encoding.encode(matrix), matrix.shape), matrix)


@pytest.mark.parametrize("encoding", ZERO_DROPPING, ids=names)
@settings(max_examples=80, deadline=None)
@given(matrix=matrices())
def test_round_trip_prunes_kept_zeros_and_nothing_else(encoding: Encoding, matrix: SparseMatrix) -> None:
    without_zeros = matrix.mask.clone()
    without_zeros[matrix.mask] = matrix.values != 0
    expected = SparseMatrix(without_zeros, matrix.values[matrix.values != 0])
    assert_same(encoding.decode(encoding.encode(matrix), matrix.shape), expected)


@pytest.mark.parametrize("encoding", ALL, ids=names)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_tensors_are_the_declared_ones(encoding: Encoding, dtype: torch.dtype, matrix: SparseMatrix) -> None:
    typed = SparseMatrix(matrix.mask, matrix.values.to(dtype))
    stored = encoding.encode(typed)
    assert set(stored) == set(encoding.tensors)
    assert nbytes(stored) == sum(len(bytes(tensor.untyped_storage())) for tensor in stored.values())
    assert_same(encoding.decode(stored | {"bias": torch.zeros(5)}, typed.shape), typed)


@pytest.mark.parametrize("encoding", ALL, ids=names)
def test_each_missing_tensor_is_named(encoding: Encoding, matrix: SparseMatrix) -> None:
    stored = encoding.encode(matrix)
    for name in encoding.tensors:
        rest = {other: tensor for other, tensor in stored.items() if other != name}
        with pytest.raises(ArtifactError, match=f"^tensor {name} is missing$"):
            encoding.decode(rest, matrix.shape)


@pytest.mark.parametrize("encoding", ALL, ids=names)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64])
def test_no_tensor_may_hold_a_foreign_dtype(encoding: Encoding, dtype: torch.dtype, matrix: SparseMatrix) -> None:
    stored = encoding.encode(matrix)
    for name in encoding.tensors:
        with pytest.raises(ArtifactError, match=f"^tensor {name} holds {str(dtype)[6:]}; expected "):
            encoding.decode(stored | {name: stored[name].to(dtype)}, matrix.shape)


@pytest.mark.parametrize("encoding", ALL, ids=names)
def test_no_tensor_may_have_another_rank(encoding: Encoding, matrix: SparseMatrix) -> None:
    stored = encoding.encode(matrix)
    for name in encoding.tensors:
        for wrong in (stored[name][None], stored[name].flatten()[0]):
            with pytest.raises(ArtifactError, match=f"^tensor {name} has shape .*; expected "):
                encoding.decode(stored | {name: wrong}, matrix.shape)


@pytest.mark.parametrize("encoding", ALL, ids=names)
@pytest.mark.parametrize("shape", [(0, 9), (5, 0), (-5, 9), (5, -9), (5.0, 9), (True, 9), (5,), (5, 9, 1), ("5", 9)])
def test_a_shape_is_two_positive_integers(encoding: Encoding, shape: tuple[int, int], matrix: SparseMatrix) -> None:
    with pytest.raises(ArtifactError, match="is not two positive integers"):
        encoding.decode(encoding.encode(matrix), shape)


@pytest.mark.parametrize("encoding", ALL, ids=names)
@pytest.mark.parametrize("shape", [(1, 9), (9, 9), (5, 1), (2**62, 9), (5, 2**62), (2**200, 2**200)])
def test_another_shape_is_refused_without_allocating_it(
    encoding: Encoding, shape: tuple[int, int], matrix: SparseMatrix
) -> None:
    with pytest.raises(ArtifactError):
        encoding.decode(encoding.encode(matrix), shape)


@pytest.mark.parametrize("encoding", ALL, ids=names)
def test_a_large_matrix_survives(encoding: Encoding) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(211, 577, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    matrix = SparseMatrix.from_dense(weight, torch.rand(211, 577, generator=generator) < 0.2)
    assert_same(encoding.decode(encoding.encode(matrix), matrix.shape), matrix)
