"""Random native layers, and the instruction sets they can be tested on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from strategies import DTYPES
from torch import Tensor

from trim_export.converters import SparseMatrix
from trim_export.converters.int8 import quantize_rows
from trim_export.errors import EnvironmentLacks
from trim_export.runtimes import Layout
from trim_export.runtimes.native import NativeLinear, NativeMatrix, Preference, lay_out
from trim_export.runtimes.native.library import isa, library, select_isa

__all__ = [
    "ALL_FORMS",
    "BITMAP",
    "CPU",
    "LISTS",
    "SHAPES",
    "SLOTS",
    "STORED",
    "available",
    "laid_out",
    "layer",
    "needs_library",
    "random_matrix",
]

needs_library = pytest.mark.skipif(library() is None, reason="installed without the library")
CPU = Layout(torch.device("cpu"))
STORED = (*DTYPES, torch.int8)

SHAPES: dict[str, Any] = {
    "rows": st.integers(1, 21),
    "columns": st.sampled_from([1, 7, 8, 31, 63, 64, 65, 127, 200]),
    "density": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
}
"""Strategies: fewer than a block of rows to some, columns around the widths of windows and words."""

BITMAP = Preference(-1.0, math.inf)
LISTS = Preference(1.0, math.inf)
SLOTS = Preference(1.0, 0.0)  # with lists only where even more slots would save none
ALL_FORMS = Preference(0.3, 3.0)


def available() -> list[str]:
    if library() is None:
        return []
    names, before = [], isa()
    for name in ("portable", "avx2", "avx512"):
        try:
            select_isa(name)
        except EnvironmentLacks:
            continue
        names.append(name)
    select_isa(before)
    return names


def random_matrix(rows: int, columns: int, density: float = 0.3, seed: int = 0) -> SparseMatrix:
    """Rows of very different density."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density * 2 * torch.rand(rows, 1, generator=generator)
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))


def laid_out(matrix: SparseMatrix, stored: torch.dtype, form: Preference) -> NativeMatrix:
    """A random matrix in some form, with values of some dtype."""
    if stored == torch.int8:
        return lay_out(*quantize_rows(matrix), form)
    return lay_out(SparseMatrix(matrix.mask, matrix.values.to(stored)), None, form)


def layer(matrix: SparseMatrix, stored: torch.dtype = torch.float32, bias: Tensor | None = None) -> NativeLinear:
    """Made as a runtime makes it, with some rows in either form."""
    with mock.patch("trim_export.runtimes.native.linear.preference", return_value=ALL_FORMS):
        return NativeLinear(matrix, bias, replace(CPU, values=stored))
