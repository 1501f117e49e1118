"""To scipy and back, and hostile .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.sparse import csr_array, load_npz, save_npz
from strategies import assert_same, dense64, matrices

from trim_export.converters import SparseMatrix
from trim_export.converters.scipy import from_scipy, load, save, to_scipy
from trim_export.errors import ArtifactError

VALID: dict[str, Any] = {
    "format": np.array("csr".encode("ascii")),
    "shape": np.array([3, 4]),
    "indptr": np.array([0, 2, 2, 3], dtype=np.int32),
    "indices": np.array([0, 3, 1], dtype=np.int32),
    "data": np.array([1, 0, -2], dtype=np.float32),
}


class Trap:
    """An object that writes to `sprung` when it is unpickled."""

    sprung: list[int] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[Any, ...]:
        return Trap.sprung.append, (1,)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "matrix.npz"


@settings(max_examples=60, deadline=None)
@given(matrix=matrices())
def test_round_trip_through_memory_is_exact(matrix: SparseMatrix) -> None:
    array = to_scipy(matrix)
    assert array.dtype == np.float32
    assert array.nnz == matrix.nnz
    np.testing.assert_array_equal(array.toarray().astype(np.float64), dense64(matrix))
    assert_same(from_scipy(array, matrix.values.dtype), matrix)


@settings(max_examples=20, deadline=None)
@given(matrix=matrices())
def test_round_trip_through_a_file_is_exact(tmp_path_factory: pytest.TempPathFactory, matrix: SparseMatrix) -> None:
    path = tmp_path_factory.mktemp("npz") / "matrix.npz"
    save(path, matrix)
    assert_same(load(path, matrix.values.dtype), matrix)
    np.testing.assert_array_equal(load_npz(path).toarray().astype(np.float64), dense64(matrix))


def test_unsorted_and_duplicate_entries_are_put_in_order_on_a_copy() -> None:
    array = csr_array((np.array([1.0, 2.0, 3.0, 4.0]), np.array([2, 0, 2, 1]), np.array([0, 3, 4])), shape=(2, 3))
    matrix = from_scipy(array, torch.float32)
    assert matrix.to_dense().tolist() == [[2, 0, 4], [0, 4, 0]]
    assert array.indices.tolist() == [2, 0, 2, 1]


def test_the_file_has_the_given_name(tmp_path: Path) -> None:
    save(tmp_path / "weights.sparse", SparseMatrix.from_dense(torch.eye(3)))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.sparse"]
    assert load(tmp_path / "weights.sparse").to_dense().tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_files_of_scipy_are_read(path: Path, dtype: type[np.floating[Any]], index: type[np.integer[Any]]) -> None:
    data, indices, indptr = (VALID[name] for name in ("data", "indices", "indptr"))
    save_npz(path, csr_array((data.astype(dtype), indices.astype(index), indptr.astype(index)), shape=(3, 4)))
    assert_same(load(path), SparseMatrix(load(path).mask, torch.tensor([1.0, 0.0, -2.0])))
    assert load(path).mask.nonzero().tolist() == [[0, 0], [0, 3], [2, 1]]


def test_a_valid_file_is_the_base_of_the_hostile_ones(path: Path) -> None:
    np.savez(path, **VALID)
    assert load(path).values.tolist() == [1, 0, -2]


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("format", np.array(b"bsr"), "is in format b'bsr'; expected csr"),
        ("shape", np.array([3, 0]), "is not two positive integers"),
        ("shape", np.array([3.0, 4.0]), "is not two positive integers"),
        ("shape", np.array([3, 4, 5]), "is not two positive integers"),
        ("shape", np.array([3, 2**50]), "stored bytes cannot be a matrix"),
        ("shape", np.array([4, 4]), "is not a CSR matrix of 4 x 4"),
        ("shape", np.zeros(10_000, dtype=np.int64), "the array shape claims 80128 bytes"),
        ("indptr", np.array([1, 2, 2, 3]), "tensor indptr starts at 1"),
        ("indptr", np.array([0, 3, 2, 3]), "tensor indptr decreases at row 1"),
        ("indptr", np.array([0, 2, 2, 2]), "tensor indptr ends at 2, but indices has 3"),
        ("indptr", np.array([0, 2, 2, 3.0]), "the indices hold float64 and int32"),
        ("indices", np.array([0, 4, 1]), "tensor indices has an index outside"),
        ("indices", np.array([0, -1, 1]), "tensor indices has an index outside"),
        ("indices", np.array([3, 0, 1]), "tensor indices is not strictly increasing in row 0"),
        ("indices", np.array([0, 3]), "is not a CSR matrix of 3 x 4"),
        ("indices", np.array([0, 3, 1], dtype=np.uint64), "the indices hold int32 and uint64"),
        ("data", np.array([1, 2, 3]), "the data holds int64"),
        ("data", np.array([1, 2, 3], dtype=">f4"), "the data holds >f4"),
        ("data", np.array([[1.0, 2.0, 3.0]]), "is not a CSR matrix of 3 x 4"),
        ("data", np.zeros(10_000), "the array data claims 80128 bytes"),
    ],
)
def test_hostile_arrays(path: Path, name: str, array: Any, reason: str) -> None:
    np.savez(path, **(VALID | {name: array}))
    with pytest.raises(ArtifactError, match=f"matrix.npz: .*{reason}"):
        load(path)


@pytest.mark.parametrize("name", list(VALID))
def test_a_missing_array_is_refused(path: Path, name: str) -> None:
    np.savez(path, **{other: array for other, array in VALID.items() if other != name})
    with pytest.raises(ArtifactError, match=f"matrix.npz cannot be read .*{name}"):
        load(path)


@pytest.mark.parametrize("name", list(VALID))
def test_nothing_is_unpickled(path: Path, name: str) -> None:
    np.savez(path, **(VALID | {name: np.array([Trap()], dtype=object)}))
    with pytest.raises(ArtifactError, match=r"matrix.npz cannot be read .*allow_pickle"):
        load(path)
    assert Trap.sprung == []


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        load(path)


def test_every_truncation_is_refused(path: Path) -> None:
    save(path, SparseMatrix.from_dense(torch.eye(3)))
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError):
            load(path)


def test_a_flipped_byte_is_refused_or_harmless(path: Path) -> None:
    expected = SparseMatrix.from_dense(torch.eye(3))
    save(path, expected)
    whole = path.read_bytes()
    refusals = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert_same(load(path), expected)
        except ArtifactError:
            refusals += 1
    assert refusals > 50
