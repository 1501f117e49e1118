"""One bit per weight and the kept values: the form of the artifact on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trim_export.converters._checks import FLOATS, check_shape, take
from trim_export.converters.encoding import nbytes
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import ArtifactError

__all__ = ["Bitmap"]


@dataclass(frozen=True)
class Bitmap:
    """A bit mask and the kept values in row-major order.

    ``weight_mask`` is uint8 ``[rows, ceil(columns / 8)]``: column ``j`` is bit ``j % 8``, counted from the lowest, of
    byte ``j // 8``; bits past the last column are 0. ``weight_values`` is ``[nnz]``. The structure costs 1 bit per
    weight whatever the sparsity, which is less than 16-bit indices up to 93.75 % sparsity.
    """

    name: ClassVar[str] = "bitmap"
    tensors: ClassVar[tuple[str, ...]] = ("weight_mask", "weight_values")

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The two tensors of ``matrix``; explicit zeros among its values are kept."""
        bits = np.packbits(matrix.mask.numpy(), axis=1, bitorder="little")
        return {"weight_mask": torch.from_numpy(bits), "weight_values": matrix.values}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix; `ArtifactError` also when a padding bit is set or bits and values differ in number."""
        check_shape(shape, nbytes(tensors))
        rows, columns = shape
        bits = take(tensors, "weight_mask", (torch.uint8,), (rows, -(-columns // 8))).numpy()
        values = take(tensors, "weight_values", FLOATS, (None,))
        if columns % 8 and (bits[:, -1] >> columns % 8).any():
            raise ArtifactError(f"tensor weight_mask has bits set beyond column {columns - 1}")
        mask = np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(np.bool_)
        kept = int(np.count_nonzero(mask))
        if kept != values.numel():
            raise ArtifactError(f"tensor weight_mask keeps {kept} weights, but weight_values has {values.numel()}")
        return SparseMatrix(torch.from_numpy(mask), values)
