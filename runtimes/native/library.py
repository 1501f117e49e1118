"""The compiled engine: found, loaded, and called through its C interface (``trim_native.h``)."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NoReturn

import torch
from torch import Tensor

from trim_export.errors import EnvironmentLacks, UsageError
from trim_export.shared_library import load_library

__all__ = [
    "ISA_VARIABLE",
    "TAIL",
    "VALUE_TYPES",
    "address",
    "is_traced",
    "isa",
    "library",
    "refuse",
    "required",
    "select_isa",
]

ISA_VARIABLE = "TRIM_EXPORT_ISA"
"""Environment variable that names the instruction set to use: ``avx512``, ``avx2`` or ``portable``."""

VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""dtypes of values that the kernels read, and the engine's numbers for them."""

TAIL = 64
"""Values behind the last one that a kernel may read."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The engine, or None where it is not installed.

    Raises:
        EnvironmentLacks: `ISA_VARIABLE` names an instruction set that is not there.
    """
    found = load_library("runtimes", "native", "libtrim_native.so")
    if found is None:
        return None
    array, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.trim_native_linear.argtypes = [array, array, size, size, array, size, number]
    found.trim_native_linear.restype = number
    found.trim_native_dense.argtypes = [array, array, size, array, size, number]
    found.trim_native_dense.restype = number
    found.trim_native_plan.argtypes = [array, ctypes.c_double, array, array, size]
    found.trim_native_plan.restype = number
    found.trim_native_lay_out.argtypes = [array, array, array, size, array, array, array, array]
    found.trim_native_lay_out.restype = number
    found.trim_native_input_limit.argtypes = [ctypes.c_int64, number]
    found.trim_native_step_cost.argtypes = [number]
    found.trim_native_step_cost.restype = ctypes.c_double
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
    name: bytes = required().trim_native_isa()
    return name.decode()


def select_isa(name: str | None) -> None:
    """Use the named instruction set from now on, or the best one that this processor has.

    Raises:
        EnvironmentLacks: it is not there, or there is no library.
    """
    _select(required(), name)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins, for C."""
    return None if tensor is None else tensor.data_ptr()


def required() -> ctypes.CDLL:
    """The engine; `EnvironmentLacks` where it is not installed."""
    found = library()
    if found is None:
        raise EnvironmentLacks("the native library is not installed; install a C++ compiler and trim-export again")
    return found


def is_traced(inputs: Tensor) -> bool:
    """Whether something other than numbers is expected of a product: a graph, a gradient, or a kind of tensor."""
    return torch.compiler.is_compiling() or inputs.requires_grad or type(inputs) is not Tensor


def refuse(status: int, what: str) -> NoReturn:
    """Say as a `UsageError` what the engine has against its arguments."""
    raise UsageError(f"the native kernel refused {what}: {_message(required(), status)}")


def _select(engine: ctypes.CDLL, name: str | None) -> None:
    status = engine.trim_native_select_isa(None if name is None else name.encode())
    if status:
        raise EnvironmentLacks(f"instruction set {name}: {_message(engine, status)}")


def _message(engine: ctypes.CDLL, status: int) -> str:
    message: bytes = engine.trim_native_message(status)
    return message.decode()
