"""A sparse matrix laid out for the kernels: rows as a bitmap, and rows as slots and lists."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from trim_export.converters import Bitmap4x64, SparseMatrix
from trim_export.converters.sell8 import BLOCK, list_entries
from trim_export.errors import UsageError
from trim_export.runtimes.native.library import TAIL, VALUE_TYPES, address, refuse, required

__all__ = ["LIST_COLUMNS", "NativeMatrix", "lay_out"]

LIST_COLUMNS = 2**16
"""Columns that a list can name; wider matrices are bitmaps throughout."""

_GROUP = 4  # rows of a bitmap that stand together
_WINDOW = 16  # columns of a window
_ROW_SLOTS = 4  # slots of a row in a step
_STEP_BYTES = 16  # of the columns of a step


class _Struct(ctypes.Structure):
    """`TrimNativeMatrix`."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bitmap_rows", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("order_size", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_size", ctypes.c_int64),
        ("group_start", ctypes.c_void_p),
        ("group_start_size", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("values_size", ctypes.c_int64),
        ("slot_start", ctypes.c_void_p),
        ("slot_start_size", ctypes.c_int64),
        ("slot_columns", ctypes.c_void_p),
        ("slot_columns_size", ctypes.c_int64),
        ("slot_values", ctypes.c_void_p),
        ("slot_values_size", ctypes.c_int64),
        ("list_start", ctypes.c_void_p),
        ("list_start_size", ctypes.c_int64),
        ("list_columns", ctypes.c_void_p),
        ("list_columns_size", ctypes.c_int64),
        ("list_values", ctypes.c_void_p),
        ("list_values_size", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scales_size", ctypes.c_int64),
        ("value_type", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class NativeMatrix:
    """What ``trim_native.h`` calls a matrix; dtypes, shapes and places are checked here, contents by the kernels.

    Attributes:
        columns: of W; it has as many rows as ``order`` has entries.
        order: int32 ``[rows]``, the row of W at each place of the layout.
        counts: int32 ``[rows]``, the weights kept at each place; the kernels do without.
        mask: int64 ``[groups, words, 4]``, the rows of the first groups as in `trim_export.converters.Bitmap4x64`.
        group_start: int64 ``[groups + 1]``, where each group begins in the values.
        values: ``[group_start[-1]]`` and `TAIL` more; float32, bfloat16, float16 or int8.
        slot_start: int64 ``[blocks + 1]``, the steps of slots before each block of eight of the other rows.
        slot_columns: uint8 ``[slot_start[-1] * 16]``, two columns within a window of sixteen in each.
        slot_values: ``[slot_start[-1] * 32]`` in the dtype of ``values``.
        list_start: int64 ``[blocks + 1]``, where the list of each block begins.
        list_columns: int16 (read as unsigned) ``[list_start[-1]]``.
        list_values: ``[list_start[-1]]`` in the dtype of ``values``.
        scales: float32 ``[rows]`` by which the rows of int8 values are multiplied, else None.

    Raises:
        UsageError: they do not fit together.
    """

    columns: int
    order: Tensor
    counts: Tensor
    mask: Tensor
    group_start: Tensor
    values: Tensor
    slot_start: Tensor
    slot_columns: Tensor
    slot_values: Tensor
    list_start: Tensor
    list_columns: Tensor
    list_values: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        if self.order.dim() != 1 or self.mask.dim() != 3 or self.columns < 1:
            raise UsageError(
                "the native kernel needs an order [rows], a mask [groups, words, 4] and some columns, "
                f"not {list(self.order.shape)}, {list(self.mask.shape)} and {self.columns}"
            )
        rows, groups = len(self.order), len(self.mask)
        blocks = max(-(-(rows - _GROUP * groups) // BLOCK), 0)
        dtype, entries, steps = self.values.dtype, self.list_columns.numel(), self.slot_columns.numel() // _STEP_BYTES
        wanted = {
            "order": (torch.int32, (rows,)),
            "counts": (torch.int32, (rows,)),
            "mask": (torch.int64, (min(groups, -(-rows // _GROUP)), -(-self.columns // 64), _GROUP)),
            "group_start": (torch.int64, (groups + 1,)),
            "values": (dtype, (self.values.numel(),)),
            "slot_start": (torch.int64, (blocks + 1,)),
            "slot_columns": (torch.uint8, (steps * _STEP_BYTES,)),
            "slot_values": (dtype, (steps * _STEP_BYTES * 2,)),
            "list_start": (torch.int64, (blocks + 1,)),
            "list_columns": (torch.int16, (entries,)),
            "list_values": (dtype, (entries,)),
            "scales": (torch.float32, (rows,)),
        }
        for name, (want, shape) in wanted.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != want or tensor.shape != shape or not tensor.is_cpu:
                raise UsageError(
                    f"the native kernel needs {name} as {want} {list(shape)} on the CPU, "
                    f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
            if not tensor.is_contiguous():
                raise UsageError(f"the native kernel needs {name} without gaps; make it contiguous")
        if dtype not in VALUE_TYPES or (dtype == torch.int8) != (self.scales is not None):
            raise UsageError(
                "the native kernel needs values in float32, bfloat16 or float16, or in int8 and then with scales, "
                f"not {dtype} {'without' if self.scales is None else 'with'} scales"
            )

    @property
    def rows(self) -> int:
        """Rows of W."""
        return len(self.order)

    def tensors(self) -> dict[str, Tensor | None]:
        """Everything but the number of columns, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    def multiply(self, inputs: Tensor, threads: int) -> Tensor:
        """``inputs @ W.T`` summed in float32; the same bits for any number of threads.

        Args:
            inputs: float32 ``[..., columns]`` on the CPU.
            threads: at most so many.

        Returns:
            float32 ``[..., rows]``.

        Raises:
            UsageError: inputs do not fit, or the contents of the matrix disagree.
            EnvironmentLacks: there is no library.
        """
        shape, rows = inputs.shape, self.order.shape[0]
        if inputs.dtype is not torch.float32 or not shape or shape[-1] != self.columns or not inputs.is_cpu:
            raise UsageError(
                f"the native kernel needs inputs as torch.float32 [..., {self.columns}] on the CPU, "
                f"not {inputs.dtype} {list(shape)} on {inputs.device}"
            )
        inputs = inputs.contiguous()
        outputs = torch.empty((*shape[:-1], rows))
        status = required().trim_native_linear(
            self._struct,
            inputs.data_ptr(),
            inputs.numel() // self.columns,
            self.columns,
            outputs.data_ptr(),
            rows,
            threads,
        )
        if status:
            refuse(status, f"a matrix of {rows} x {self.columns}")
        return outputs

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit; of int8 values their products with the scales, in float32."""
        top = min(_GROUP * len(self.mask), self.rows)
        mask = torch.zeros(self.rows, self.columns, dtype=torch.bool)
        dense = torch.zeros(self.rows, self.columns, dtype=self.values.dtype)
        if top:
            values = self.values[:-TAIL]
            parts = {
                "weight_order": torch.arange(top, dtype=torch.int32),
                "weight_mask": self.mask,
                "weight_values": values.half() if self.scales is not None else values,  # holds every int8
            }
            upper = Bitmap4x64().decode(parts, (top, self.columns))
            mask[:top], dense[:top] = upper.mask, upper.to_dense().to(dense.dtype)
        rows, window_columns, slot_values = self._slots(top)
        mask[rows, window_columns] = True
        dense[rows, window_columns] = slot_values
        place, entry = list_entries(self.counts[top:] - mask[top:].sum(dim=1), self.list_start)
        column = self.list_columns[entry].long() & 0xFFFF
        mask[top + place, column] = True
        dense[top + place, column] = self.list_values[entry]
        back = self.order.long().argsort()
        mask, dense = mask[back], dense[back]
        return SparseMatrix(mask, dense[mask] if self.scales is None else (dense * self.scales[:, None])[mask])

    def _slots(self, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Place, column and value of each weight that stands in a slot; the first ``top`` places are a bitmap."""
        windows = -(-self.columns // _WINDOW)
        steps = self.slot_start.diff() // windows
        places, columns, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)], []
        for count in steps.unique().tolist():
            blocks = (steps == count).nonzero()[:, 0]
            step = self.slot_start[blocks, None] + torch.arange(windows * count)
            pairs = self.slot_columns.view(-1, _ROW_SLOTS, BLOCK // 2)[step]
            slots = torch.cat([pairs & 15, pairs >> 4], dim=-1).view(len(blocks), windows, count * _ROW_SLOTS, BLOCK)
            kept = torch.ones_like(slots, dtype=torch.bool)
            if count:
                kept[:, :, 1:] = slots[:, :, 1:] > slots[:, :, :-1]
                kept[:, :, 0] = slots[:, :, 0] <= slots[:, :, 1]
            block, window, _, row = kept.nonzero(as_tuple=True)
            places.append(top + blocks[block] * BLOCK + row)
            columns.append(window * _WINDOW + slots[kept])
            values.append(self.slot_values.view(-1, _ROW_SLOTS, BLOCK)[step].view(slots.shape)[kept])
        return torch.cat(places), torch.cat(columns), torch.cat([self.slot_values[:0], *values])

    @functools.cached_property
    def _struct(self) -> ctypes.Array[_Struct]:
        rows, size = self.rows, torch.Tensor.numel
        return (_Struct * 1)(
            _Struct(
                rows,
                self.columns,
                min(_GROUP * len(self.mask), rows),
                address(self.order),
                rows,
                address(self.mask),
                size(self.mask),
                address(self.group_start),
                size(self.group_start),
                address(self.values),
                size(self.values),
                address(self.slot_start),
                size(self.slot_start),
                address(self.slot_columns),
                size(self.slot_columns),
                address(self.slot_values),
                size(self.slot_values),
                address(self.list_start),
                size(self.list_start),
                address(self.list_columns),
                size(self.list_columns),
                address(self.list_values),
                size(self.list_values),
                address(self.scales),
                0 if self.scales is None else rows,
                VALUE_TYPES[self.values.dtype],
            )
        )


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
    top = min(fuller + -fuller % _GROUP, rows)
    words, values = torch.zeros(0, -(-columns // 64), _GROUP, dtype=torch.int64), matrix.values[:0]
    if top:
        mask = matrix.mask[order[:top]]
        upper = Bitmap4x64().encode(SparseMatrix(mask, matrix.to_dense()[order[:top]][mask]))
        words, values = upper["weight_mask"], upper["weight_values"]
    of_groups = pad(sorted_counts[:top], (0, -top % _GROUP)).reshape(-1, _GROUP).sum(dim=1)
    return NativeMatrix(
        columns,
        order,
        sorted_counts.int(),
        words,
        pad(of_groups.cumsum(0), (1, 0)),
        pad(values, (0, TAIL)),
        *_blocks(matrix, order[top:].contiguous(), pad(counts.cumsum(0), (1, 0)), preference.step_cost),
        scales,
    )


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
    slot_columns = torch.zeros(int(slot_start[-1]) * _STEP_BYTES, dtype=torch.uint8)
    slot_values = torch.zeros(2 * len(slot_columns), dtype=values.dtype)
    list_columns = torch.zeros(int(list_start[-1]), dtype=torch.int16)
    list_values = torch.zeros(len(list_columns), dtype=values.dtype)
    arrays = slot_columns, slot_values, list_columns, list_values
    status = status or required().trim_native_lay_out(
        ctypes.byref(given), starts[0], starts[1], starts[2], *map(address, arrays)
    )
    if status:
        refuse(status, f"rows of a matrix of {rows} x {columns}")
    return slot_start, slot_columns, slot_values, list_start, list_columns, list_values
