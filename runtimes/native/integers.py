"""Values in int8, and inputs that are rounded to integers so that sums of their products are exact."""

from __future__ import annotations

from dataclasses import replace

from trim_export.converters import SparseMatrix
from trim_export.converters.int8 import balance_columns, quantize_rows
from trim_export.runtimes.native.layout import Preference, lay_out
from trim_export.runtimes.native.matrix import NativeMatrix

__all__ = ["lay_out_int8"]


def lay_out_int8(matrix: SparseMatrix, preference: Preference) -> NativeMatrix:
    """`lay_out` with values rounded to int8, columns having been balanced.

    Args:
        matrix: of finite values.
        preference: of the instruction set for int8.
    """
    balanced, input_scales = balance_columns(matrix)
    quantized, scales = quantize_rows(balanced)
    return replace(lay_out(quantized, scales, preference), input_scales=input_scales)
