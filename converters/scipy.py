"""The matrix as a scipy CSR array, in memory and as an ``.npz`` file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, save_npz

from trim_export.converters._checks import check_shape
from trim_export.converters._rows import COLUMNS, ROW_PTR, encode_rows, rows_to_mask
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import ArtifactError

__all__ = ["from_scipy", "load", "save", "to_scipy"]

# Room for the header of an array, and for the two arrays that describe the matrix.
_HEADER_BYTES = 4096


def to_scipy(matrix: SparseMatrix) -> csr_array:
    """A CSR array of ``matrix`` in float32, which holds every bfloat16 and float16 exactly.

    Kept zeros stay explicit. The values of a float32 matrix are shared, not copied.
    """
    rows = encode_rows(matrix.mask)
    # scipy knows no 16-bit indices, and one index dtype for both.
    index = rows[ROW_PTR].dtype
    structure = rows[COLUMNS].to(index).numpy(), rows[ROW_PTR].numpy()
    return csr_array((matrix.values.float().numpy(), *structure), shape=matrix.shape)


def from_scipy(array: csr_array, dtype: torch.dtype) -> SparseMatrix:
    """The stored entries of a trusted CSR ``array``, rounded to ``dtype``; entries of one place are added up."""
    rows = array.copy()
    rows.sum_duplicates()
    return _matrix(rows.indptr, rows.indices, rows.data, rows.shape, dtype)


def save(path: str | Path, matrix: SparseMatrix) -> None:
    """Write ``matrix`` to ``path`` in the format of `scipy.sparse.save_npz`, in float32."""
    # Given a name, scipy would append ".npz" to it; given a file, it writes to what the caller asked for.
    with open(path, "wb") as file:
        save_npz(file, to_scipy(matrix))


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> SparseMatrix:
    """Read an untrusted ``.npz`` file of `save`, or any of `scipy.sparse.save_npz` in sorted CSR, as ``dtype``.

    `ArtifactError` when it cannot be read, needs a pickle, or holds an inconsistent matrix. scipy's own reader is
    not used, because it passes the indices unchecked to compiled code.
    """
    try:
        return _read(path, dtype)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except Exception as error:  # numpy and zipfile answer a hostile file with nearly any exception
        raise ArtifactError(f"{path} cannot be read as a scipy .npz file ({error})") from error


def _read(path: str | Path, dtype: torch.dtype) -> SparseMatrix:
    with ZipFile(path) as archive:
        kind = _array(archive, "format", 0).item()
        if kind not in (b"csr", "csr"):
            raise ArtifactError(f"the matrix is in format {kind!r}; expected csr")
        shape = tuple(_array(archive, "shape", 0).tolist())
        check_shape(shape, Path(path).stat().st_size)
        rows, columns = shape
        indptr = _array(archive, "indptr", 8 * (rows + 1))
        indices, data = (_array(archive, name, 8 * rows * columns) for name in ("indices", "data"))
    if indptr.shape != (rows + 1,) or indices.ndim != 1 or data.shape != indices.shape:
        raise ArtifactError(
            f"the arrays have shapes {indptr.shape} (indptr), {indices.shape} (indices), {data.shape} (data), "
            f"which is not a CSR matrix of {rows} x {columns}"
        )
    if not all(index.dtype in (np.int32, np.int64) for index in (indptr, indices)):
        raise ArtifactError(f"the indices hold {indptr.dtype} and {indices.dtype}; expected int32 or int64")
    if data.dtype not in (np.float16, np.float32, np.float64):
        raise ArtifactError(f"the data holds {data.dtype}; expected float16, float32 or float64")
    return _matrix(indptr, indices, data, shape, dtype)


def _array(archive: ZipFile, name: str, most_bytes: int) -> NDArray[Any]:
    """One array of the archive, refused before it is unpacked when it is larger than ``most_bytes``."""
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > most_bytes + _HEADER_BYTES:
        raise ArtifactError(f"the array {name} claims {member.file_size} bytes; expected {most_bytes} at most")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _matrix(
    indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any], shape: tuple[int, int], dtype: torch.dtype
) -> SparseMatrix:
    return SparseMatrix(rows_to_mask(indptr, indices, shape, ("indptr", "indices")), torch.from_numpy(data).to(dtype))
