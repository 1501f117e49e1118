"""How a sparse matrix is laid out for the kernels, by the engine itself where rows become slots and lists."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from trim_export.converters import Bitmap4x64, SparseMatrix
from trim_export.converters.sell8 import BLOCK
from trim_export.runtimes.native.library import TAIL, VALUE_TYPES, address, refuse, required
from trim_export.runtimes.native.matrix import GROUP, NativeMatrix
from trim_export.runtimes.native.pages import zeros

__all__ = ["LIST_COLUMNS", "Preference", "lay_out"]

LIST_COLUMNS = 2**16
"""Columns that a list can name; wider matrices are bitmaps throughout."""


class Preference(NamedTuple):
    """Which forms a layout should take.

    Attributes:
        bitmap_density: rows that keep more than this share of their weights become a bitmap.
        step_cost: what a step of slots costs, in listed weights (``trim_native_plan``); infinite for lists alone.
    """

    bitmap_density: float
    step_cost: float


def lay_out(matrix: SparseMatrix, scales: Tensor | None, preference: Preference) -> NativeMatrix:
    """``matrix`` for the kernels.

    Args:
        matrix: on the CPU; of int8 values (`trim_export.converters.int8.quantize_rows`) with ``scales``.
        scales: float32 ``[rows]`` or None.
        preference: of the instruction set; a row that is wider than `LIST_COLUMNS` becomes a bitmap.

    Raises:
        EnvironmentLacks: there is no library.
    """
    rows, columns = matrix.shape
    counts = matrix.row_counts
    order = counts.argsort(descending=True, stable=True).int()
    sorted_counts = counts[order]
    fuller = rows if columns > LIST_COLUMNS else int((sorted_counts > preference.bitmap_density * columns).sum())
    top = min(fuller + -fuller % GROUP, rows)
    words, values = torch.zeros(0, -(-columns // 64), GROUP, dtype=torch.int64), matrix.values[:0]
    if top:
        mask = matrix.mask[order[:top]]
        upper = Bitmap4x64().encode(SparseMatrix(mask, matrix.to_dense()[order[:top]][mask]))
        words, values = upper["weight_mask"], upper["weight_values"]
    of_groups = pad(sorted_counts[:top], (0, -top % GROUP)).reshape(-1, GROUP).sum(dim=1)
    return NativeMatrix(
        columns,
        order,
        sorted_counts.int(),
        words,
        pad(of_groups.cumsum(0), (1, 0)),
        pad(values, (0, TAIL)),
        *_blocks(matrix, order[top:].contiguous(), pad(counts.cumsum(0), (1, 0)), preference.step_cost),
        scales,
        input_limit=_input_limit(matrix) if matrix.values.dtype is torch.int8 else 0,
    )


def _input_limit(matrix: SparseMatrix) -> int:
    """The finest integers for inputs with which no sum is inexact.

    A row that keeps 800 weights of the usual spread allows some 700 steps to either side. Where the fullest row would
    allow fewer than 255 (it keeps two thousand and more), sums are exact in integers of 32 bits only: inputs have some
    10,000 steps, and products of several tokens, in float32, the same bits for any number of threads only.
    """
    row = torch.repeat_interleave(matrix.row_counts)
    sums = torch.zeros(matrix.shape[0], dtype=torch.int64).scatter_add_(0, row, matrix.values.long().abs())
    limit: int = required().trim_native_input_limit(int(sums.max()), True)
    return limit


class _Rows(ctypes.Structure):
    """`TrimNativeRows`."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_size", ctypes.c_int64),
        ("row_start", ctypes.c_void_p),
        ("row_start_size", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("values_size", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("order_size", ctypes.c_int64),
        ("value_type", ctypes.c_int32),
    )


def _blocks(
    matrix: SparseMatrix, order: Tensor, row_start: Tensor, step_cost: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slots and lists of the rows that ``order`` names: starts, columns and values of both."""
    rows, columns = matrix.shape
    mask, values = matrix.mask.contiguous(), matrix.values.contiguous()
    given = _Rows(
        rows,
        columns,
        address(mask),
        mask.numel(),
        address(row_start),
        len(row_start),
        address(values),
        len(values),
        address(order),
        len(order),
        VALUE_TYPES[values.dtype],
    )
    slot_start, list_start = torch.zeros(2, -(-len(order) // BLOCK) + 1, dtype=torch.int64)
    starts = address(slot_start), address(list_start), len(slot_start)
    status = required().trim_native_plan(ctypes.byref(given), step_cost, *starts)
    slot_columns = zeros((int(slot_start[-1]),), torch.int32)
    slot_values = zeros((len(slot_columns) * BLOCK,), values.dtype)
    list_columns = zeros((int(list_start[-1]),), torch.int16)
    list_values = zeros((len(list_columns),), values.dtype)
    arrays = slot_columns, slot_values, list_columns, list_values
    status = status or required().trim_native_lay_out(
        ctypes.byref(given), starts[0], starts[1], starts[2], *map(address, arrays)
    )
    if status:
        refuse(status, f"rows of a matrix of {rows} x {columns}")
    return slot_start, slot_columns, slot_values, list_start, list_columns, list_values
