"""Weights in 8 bits with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from trim_export.converters.matrix import SparseMatrix

__all__ = ["balance_columns", "column_scales", "divide_columns", "quantize_rows", "quantize_weight"]

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


def balance_columns(matrix: SparseMatrix) -> tuple[SparseMatrix, Tensor]:
    """``matrix`` with columns of about the same size, and the scales ``[columns]`` to multiply its inputs by instead.

    Columns that meet large inputs tend to have small weights, which a step that suits a whole row would round away, and
    with them what matters most. Each column is divided by the root mean square of its kept weights, those of each row
    being taken relative to the row's, rounded to a power of two, so that no bit is lost. Scales on both sides without
    calibration are from SINQ (arXiv 2509.22944), which repeats this; here once is enough.
    """
    row, column = matrix.mask.nonzero(as_tuple=True)
    values = matrix.values.float()
    scales = _column_scales(values, row, column, matrix.shape)
    return SparseMatrix(matrix.mask, values / scales[column]), scales


def column_scales(matrix: SparseMatrix) -> Tensor:
    """float32 ``[columns]``: the powers of two of `balance_columns`."""
    row, column = matrix.mask.nonzero(as_tuple=True)
    return _column_scales(matrix.values.float(), row, column, matrix.shape)


def divide_columns(matrix: SparseMatrix, scales: Tensor) -> SparseMatrix:
    """``matrix``, in float32, with each column divided by its scale."""
    column = matrix.mask.nonzero()[:, 1]
    return SparseMatrix(matrix.mask, matrix.values.float() / scales[column])


def _column_scales(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int]) -> Tensor:
    relative = values / _root_mean_square(values, row, shape[0])[row]
    return _root_mean_square(relative, column, shape[1]).log2().round().clamp(-60, 60).exp2()


def _root_mean_square(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """float32 ``[groups]``; 1 where a group is empty or zero."""
    squares = torch.zeros(groups, dtype=torch.float64).scatter_add_(0, group, values.double().square())
    found = (squares / group.bincount(minlength=groups).clamp(min=1)).sqrt().float()
    return torch.where(found > 0, found, 1.0)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[rows, columns]`` and float32 scales ``[rows]``: a row's largest magnitude becomes 127, half to even."""
    pieces = [(rows.float(), rows.float().abs().amax(dim=1) / 127) for rows in weight.detach().split(_CHUNK)]
    steps = [(rows / scale[:, None]).nan_to_num(0.0).round().to(torch.int8) for rows, scale in pieces]
    return torch.cat(steps), torch.cat([scale for _, scale in pieces])
