"""The plain matrix, zeros included: what every other tool can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trim_export.converters._checks import FLOATS, check_shape, take
from trim_export.converters.encoding import nbytes
from trim_export.converters.matrix import SparseMatrix

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense:
    """``weight`` ``[rows, columns]`` with zeros where it was pruned.

    A kept weight that is exactly zero cannot be told from a pruned one, so it is pruned on the way back.
    """

    name: ClassVar[str] = "dense"
    tensors: ClassVar[tuple[str, ...]] = ("weight",)

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The one tensor of ``matrix``."""
        return {"weight": matrix.to_dense()}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix whose kept weights are those that are not zero."""
        check_shape(shape, nbytes(tensors))
        return SparseMatrix.from_dense(take(tensors, "weight", FLOATS, shape))
