"""Which form a matrix takes and who multiplies it, from what each way was measured to cost."""

from __future__ import annotations

import torch

from trim_export.runtimes.native.library import isa

__all__ = ["BREAK_EVEN", "list_density"]

BREAK_EVEN = 0.3
"""Sparsity below which a layer is multiplied dense."""

_LIST_DENSITY = {
    "avx2": {torch.float32: 0.5, torch.bfloat16: 0.35, torch.float16: 0.35, torch.int8: 0.3},
    "avx512": {torch.float32: 0.15, torch.bfloat16: 0.1, torch.float16: 0.1, torch.int8: 0.1},
    "portable": {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0, torch.int8: 1.0},
}


def list_density(dtype: torch.dtype) -> float:
    """Share of kept weights up to which a row of values of ``dtype`` is faster as a list of columns."""
    return _LIST_DENSITY[isa()][dtype]
