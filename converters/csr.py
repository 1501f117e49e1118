"""Compressed sparse rows: one column index per kept weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trim_export.converters._checks import FLOATS, check_shape, take
from trim_export.converters._rows import COLUMNS, ROW_PTR, decode_rows, encode_rows
from trim_export.converters.encoding import nbytes
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import ArtifactError

__all__ = ["Csr"]


@dataclass(frozen=True)
class Csr:
    """Values, column indices and row pointers, each row sorted by column.

    ``weight_values`` is ``[nnz]``; ``weight_columns`` ``[nnz]`` is int16 up to 32768 columns, else int32;
    ``weight_row_ptr`` ``[rows + 1]`` is int32 below 2**31 kept weights, else int64.
    """

    name: ClassVar[str] = "csr"
    tensors: ClassVar[tuple[str, ...]] = ("weight_values", COLUMNS, ROW_PTR)

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The three tensors of ``matrix``; explicit zeros among its values are kept."""
        return {"weight_values": matrix.values} | encode_rows(matrix.mask)

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix; `ArtifactError` also when pointers or indices are out of range or out of order."""
        check_shape(shape, nbytes(tensors))
        values = take(tensors, "weight_values", FLOATS, (None,))
        mask = decode_rows(tensors, shape)
        entries = tensors[COLUMNS].numel()
        if values.numel() != entries:
            raise ArtifactError(f"tensor weight_values has {values.numel()} values, but {COLUMNS} has {entries}")
        return SparseMatrix(mask, values)
