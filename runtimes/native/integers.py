"""Values in int8, and inputs that are rounded to integers so that sums of their products are exact."""

from __future__ import annotations

from dataclasses import replace

import torch

from trim_export.converters import SparseMatrix
from trim_export.converters.int8 import balance_columns, quantize_rows
from trim_export.runtimes.native.layout import Preference, lay_out
from trim_export.runtimes.native.matrix import NativeMatrix

__all__ = ["LEAST_LIMIT", "MOST_LIMIT", "lay_out_int8"]

_EXACT = 2**24 - 1  # up to which every integer is a float

MOST_LIMIT = 2**22
"""Integers up to which the engine rounds inputs at most."""

LEAST_LIMIT = 255
"""Least limit with which inputs are rounded. Their scales are powers of two, so it is as fine as 8 bits at worst."""


def lay_out_int8(matrix: SparseMatrix, preference: Preference) -> NativeMatrix:
    """`lay_out` with values rounded to int8, and the finest integers for inputs with which no sum is inexact.

    A row that keeps 800 weights of the usual spread allows some 700 steps to either side. A matrix whose fullest row
    allows fewer than `LEAST_LIMIT` (it keeps two thousand and more) gets its inputs as they are, and then products have
    the same bits for any number of threads, but not for any instruction set.

    Args:
        matrix: of finite values.
        preference: of the instruction set for int8.
    """
    balanced, input_scales = balance_columns(matrix)
    quantized, scales = quantize_rows(balanced)
    row = torch.repeat_interleave(quantized.row_counts)
    sums = torch.zeros(matrix.shape[0], dtype=torch.int64).scatter_add_(0, row, quantized.values.long().abs())
    limit = min(_EXACT // max(int(sums.max()), 1), MOST_LIMIT)
    made = lay_out(quantized, scales, preference)
    return replace(made, input_scales=input_scales, input_limit=limit if limit >= LEAST_LIMIT else 0)
