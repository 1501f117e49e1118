"""The compiled engine: found, loaded, and called through its C interface (``trim_native.h``)."""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from trim_export.errors import EnvironmentLacks, UsageError
from trim_export.shared_library import load_library

__all__ = ["ISA_VARIABLE", "TAIL", "VALUE_TYPES", "isa", "library", "multiply", "select_isa"]

ISA_VARIABLE = "TRIM_EXPORT_ISA"
"""Environment variable that names the instruction set to use: ``avx512``, ``avx2`` or ``portable``."""

VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""dtypes of values that the kernels read, and the engine's numbers for them."""

TAIL = 64
"""Values behind the last one that a kernel may read."""


class _Matrix(ctypes.Structure):
    """`TrimNativeMatrix`."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("order_size", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_size", ctypes.c_int64),
        ("group_start", ctypes.c_void_p),
        ("group_start_size", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("values_size", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scales_size", ctypes.c_int64),
        ("value_type", ctypes.c_int32),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The engine, or None where it is not installed.

    Raises:
        EnvironmentLacks: `ISA_VARIABLE` names an instruction set that is not there.
    """
    found = load_library("runtimes", "native", "libtrim_native.so")
    if found is None:
        return None
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.trim_native_linear.argtypes = [ctypes.POINTER(_Matrix), address, size, size, address, size, number]
    found.trim_native_linear.restype = number
    found.trim_native_isa.argtypes = []
    found.trim_native_isa.restype = ctypes.c_char_p
    found.trim_native_select_isa.argtypes = [ctypes.c_char_p]
    found.trim_native_select_isa.restype = number
    found.trim_native_message.argtypes = [number]
    found.trim_native_message.restype = ctypes.c_char_p
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        _select(found, wanted)
    return found


def isa() -> str:
    """The instruction set in use; `EnvironmentLacks` without the library."""
    name: bytes = _required().trim_native_isa()
    return name.decode()


def select_isa(name: str | None) -> None:
    """Use the named instruction set from now on, or the best one that this processor has.

    Raises:
        EnvironmentLacks: it is not there, or there is no library.
    """
    _select(_required(), name)


def multiply(
    inputs: Tensor,
    order: Tensor,
    mask: Tensor,
    group_start: Tensor,
    values: Tensor,
    scales: Tensor | None,
    threads: int,
) -> Tensor:
    """``inputs @ W.T`` with W in the layout `bitmap-4x64`, summed in float32.

    Args:
        inputs: float32 ``[tokens, columns]``.
        order, mask: as in `trim_export.converters.Bitmap4x64`.
        group_start: int64 ``[groups + 1]``, where each group of four rows begins in the values.
        values: ``[nnz]`` and `TAIL` more; float32, bfloat16, float16 or int8.
        scales: float32 ``[rows]`` for int8 values, else None.
        threads: at most so many; the result does not depend on it.

    Returns:
        float32 ``[tokens, rows]``.

    Raises:
        UsageError: shapes, dtypes, devices or contents do not fit together.
        EnvironmentLacks: there is no library.
    """
    engine = _required()
    _check(inputs, order, mask, group_start, values, scales, threads)
    if inputs.stride(1) != 1 or inputs.stride(0) < inputs.shape[1]:
        inputs = inputs.contiguous()
    tokens, columns = inputs.shape
    rows = order.shape[0]
    outputs = inputs.new_empty(tokens, rows)
    matrix = _Matrix(
        rows,
        columns,
        order.data_ptr(),
        rows,
        mask.data_ptr(),
        mask.numel(),
        group_start.data_ptr(),
        group_start.numel(),
        values.data_ptr(),
        values.numel(),
        None if scales is None else scales.data_ptr(),
        0 if scales is None else scales.numel(),
        VALUE_TYPES[values.dtype],
    )
    # Of one token the stride means nothing, and torch may leave anything there.
    stride = columns if tokens < 2 else inputs.stride(0)
    status = engine.trim_native_linear(
        ctypes.byref(matrix), inputs.data_ptr(), tokens, stride, outputs.data_ptr(), rows, threads
    )
    if status:
        raise UsageError(f"the native kernel refused a matrix of {rows} x {columns}: {_message(engine, status)}")
    return outputs


def _check(
    inputs: Tensor,
    order: Tensor,
    mask: Tensor,
    group_start: Tensor,
    values: Tensor,
    scales: Tensor | None,
    threads: int,
) -> None:
    if inputs.dim() != 2 or order.dim() != 1:
        raise UsageError(
            "the native kernel needs inputs [tokens, columns] and an order [rows], "
            f"not {list(inputs.shape)} and {list(order.shape)}"
        )
    rows, columns = order.shape[0], inputs.shape[1]
    groups = -(-rows // 4)
    wanted = {
        "inputs": (inputs, torch.float32, inputs.shape),
        "order": (order, torch.int32, (rows,)),
        "mask": (mask, torch.int64, (groups, -(-columns // 64), 4)),
        "group_start": (group_start, torch.int64, (groups + 1,)),
        "values": (values, values.dtype, (values.numel(),)),
    }
    if scales is not None:
        wanted["scales"] = (scales, torch.float32, (rows,))
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu:
            raise UsageError(
                f"the native kernel needs {name} as {dtype} {list(shape)} on the CPU, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if name != "inputs" and not tensor.is_contiguous():
            raise UsageError(f"the native kernel needs {name} without gaps; make it contiguous")
    if values.dtype not in VALUE_TYPES or (values.dtype == torch.int8) != (scales is not None):
        raise UsageError(
            "the native kernel needs values in float32, bfloat16 or float16, or in int8 and then with scales, "
            f"not {values.dtype} {'without' if scales is None else 'with'} scales"
        )
    if threads < 1:
        raise UsageError(f"the native kernel needs at least one thread, not {threads}")


def _required() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise EnvironmentLacks("the native library is not installed; install a C++ compiler and trim-export again")
    return found


def _select(engine: ctypes.CDLL, name: str | None) -> None:
    status = engine.trim_native_select_isa(None if name is None else name.encode())
    if status:
        raise EnvironmentLacks(f"instruction set {name}: {_message(engine, status)}")


def _message(engine: ctypes.CDLL, status: int) -> str:
    message: bytes = engine.trim_native_message(status)
    return message.decode()
