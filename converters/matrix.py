"""The one in-memory form that every encoding is made from and decoded to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SparseMatrix"]


@dataclass(frozen=True)
class SparseMatrix:
    """A weight whose kept entries are named by a mask, independent of their values.

    A kept weight may be exactly zero: what is pruned is what the mask says, so counts never depend on the values.

    Attributes:
        mask: bool ``[rows, columns]``, True where a weight is kept.
        values: ``[nnz]`` kept weights in row-major order, in the model's dtype.
    """

    mask: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> SparseMatrix:
        """Take the entries of ``weight`` ``[rows, columns]`` under ``mask`` (default: wherever it is not zero)."""
        mask = weight != 0 if mask is None else mask
        return cls(mask, weight[mask])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (output features) and columns (input features)."""
        rows, columns = self.mask.shape
        return rows, columns

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.values.numel()

    @property
    def row_counts(self) -> Tensor:
        """int64 ``[rows]``: kept weights of each row."""
        return self.mask.count_nonzero(dim=1)

    def to_dense(self) -> Tensor:
        """The weight with exact zeros where it was pruned, ``[rows, columns]``."""
        weight = torch.zeros(self.mask.shape, dtype=self.values.dtype, device=self.values.device)
        weight[self.mask] = self.values
        return weight
