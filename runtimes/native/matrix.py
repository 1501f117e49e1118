"""A sparse matrix as the kernels take it: rows as a bitmap, and rows as slots and lists."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trim_export.converters import Bitmap4x64, SparseMatrix
from trim_export.converters.sell8 import BLOCK, list_entries
from trim_export.errors import UsageError
from trim_export.runtimes.native.library import TAIL, VALUE_TYPES, address, refuse, required

__all__ = ["GROUP", "NativeMatrix"]

GROUP = 4
"""Rows of a bitmap that stand together."""

_WINDOW, _QUAD_WINDOW = 8, 16  # columns of a window; with int8 values
_QUAD = 4  # steps of a quad


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
        ("input_limit", ctypes.c_int32),
        ("input_scales", ctypes.c_void_p),
        ("input_scales_size", ctypes.c_int64),
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
        slot_columns: int32 ``[slot_start[-1]]``, the columns of eight rows within a window, four bits each.
        slot_values: ``[slot_start[-1] * 8]`` in the dtype of ``values``; int8 are in quads.
        list_start: int64 ``[blocks + 1]``, where the list of each block begins.
        list_columns: int16 (read as unsigned) ``[list_start[-1]]``.
        list_values: ``[list_start[-1]]`` in the dtype of ``values``.
        scales: float32 ``[rows]`` by which the rows of int8 values are multiplied, else None.
        input_scales: float32 ``[columns]``, powers of two by which inputs are multiplied, or None.
        input_limit: of int8 values, the integers up to which inputs are rounded, else 0.

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
    input_scales: Tensor | None = None
    input_limit: int = 0

    def __post_init__(self) -> None:
        if self.order.dim() != 1 or self.mask.dim() != 3 or self.columns < 1:
            raise UsageError(
                "the native kernel needs an order [rows], a mask [groups, words, 4] and some columns, "
                f"not {list(self.order.shape)}, {list(self.mask.shape)} and {self.columns}"
            )
        rows, groups = len(self.order), len(self.mask)
        blocks = max(-(-(rows - GROUP * groups) // BLOCK), 0)
        dtype, entries, steps = self.values.dtype, self.list_columns.numel(), self.slot_columns.numel()
        wanted = {
            "order": (torch.int32, (rows,)),
            "counts": (torch.int32, (rows,)),
            "mask": (torch.int64, (min(groups, -(-rows // GROUP)), -(-self.columns // 64), GROUP)),
            "group_start": (torch.int64, (groups + 1,)),
            "values": (dtype, (self.values.numel(),)),
            "slot_start": (torch.int64, (blocks + 1,)),
            "slot_columns": (torch.int32, (steps,)),
            "slot_values": (dtype, (steps * BLOCK,)),
            "list_start": (torch.int64, (blocks + 1,)),
            "list_columns": (torch.int16, (entries,)),
            "list_values": (dtype, (entries,)),
            "scales": (torch.float32, (rows,)),
            "input_scales": (torch.float32, (self.columns,)),
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
        """Everything but the number of columns and the limit, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:-1]}

    def multiply(self, inputs: Tensor, threads: int) -> Tensor:
        """``inputs @ W.T`` summed in float32; the same bits for any number of threads.

        With an ``input_limit`` also for any number of tokens and any instruction set: sums of integers, without error.

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
        """The stored weights, bit for bit; of int8 values their products with all scales, in float32."""
        top = min(GROUP * len(self.mask), self.rows)
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
        if self.scales is not None:
            dense = dense * self.scales[:, None]
        if self.input_scales is not None:
            dense = dense * self.input_scales
        return SparseMatrix(mask, dense[mask])

    def _slots(self, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Place, column and value of each weight that stands in a slot; the first ``top`` places are a bitmap."""
        in_quads = self.values.dtype is torch.int8
        width = _QUAD_WINDOW if in_quads else _WINDOW
        block = torch.repeat_interleave(self.slot_start.diff())
        steps = self.slot_start.diff()[block] // -(-self.columns // width)
        within = torch.arange(len(block)) - self.slot_start[block]
        window, slot = within // steps, within % steps
        if in_quads:
            columns, values = self._quads()
            before = columns.roll(1, dims=0)
            none = (columns == width - 1) & (columns.roll(-1, dims=0) == 0)
            kept = torch.where((slot == 0)[:, None], ~none, columns > before)
        else:
            columns = self.slot_columns[:, None] >> torch.arange(0, 4 * BLOCK, 4) & 15
            values, kept = self.slot_values.reshape(-1, BLOCK), columns < width
        step, row = kept.nonzero(as_tuple=True)
        return top + block[step] * BLOCK + row, window[step] * width + columns[step, row], values[step, row]

    def _quads(self) -> tuple[Tensor, Tensor]:
        """Columns and values of quads as if they were steps: ``[steps, rows of a block]``."""
        row, slot = torch.arange(BLOCK), torch.arange(_QUAD)[:, None]
        word, shift = row // 4 * 2 + row % 2, 8 * slot + 4 * (row // 2 % 2)
        columns = self.slot_columns.reshape(-1, 1, _QUAD)[:, :, word] >> shift & 15
        values = self.slot_values.reshape(-1, BLOCK, _QUAD).transpose(1, 2)
        return columns.reshape(-1, BLOCK), values.reshape(-1, BLOCK)

    @functools.cached_property
    def _struct(self) -> ctypes.Array[_Struct]:
        rows, size = self.rows, torch.Tensor.numel
        return (_Struct * 1)(
            _Struct(
                rows,
                self.columns,
                min(GROUP * len(self.mask), rows),
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
                self.input_limit,
                address(self.input_scales),
                0 if self.input_scales is None else self.columns,
            )
        )
