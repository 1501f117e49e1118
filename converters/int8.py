"""Weights in 8 bits with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from trim_export.converters.matrix import SparseMatrix

__all__ = ["quantize_rows", "quantize_weight"]

_CHUNK = 4096
"""Rows that are widened at a time."""


def quantize_rows(matrix: SparseMatrix) -> tuple[SparseMatrix, Tensor]:
    """``matrix`` with int8 values, and the float32 scale ``[rows]`` of each row by which they are multiplied.

    Symmetric: a row's largest magnitude becomes 127, every value is rounded to the nearest step, half to even. The mask
    stays; a kept weight may become zero. Values must be finite.
    """
    counts = matrix.row_counts
    values = matrix.values.float()
    largest = torch.zeros(len(counts))
    row = torch.repeat_interleave(counts)
    largest.scatter_reduce_(0, row, values.abs(), "amax")
    scales = largest / 127
    steps = (values / scales[row]).nan_to_num(0.0).round().clamp(-127, 127)  # 0 / 0 in a row of zeros
    return SparseMatrix(matrix.mask, steps.to(torch.int8)), scales


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[rows, columns]`` and float32 scales ``[rows]``: a row's largest magnitude becomes 127, half to even."""
    pieces = [(rows.float(), rows.float().abs().amax(dim=1) / 127) for rows in weight.detach().split(_CHUNK)]
    steps = [(rows / scale[:, None]).nan_to_num(0.0).round().to(torch.int8) for rows, scale in pieces]
    return torch.cat(steps), torch.cat([scale for _, scale in pieces])
