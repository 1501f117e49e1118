"""Output quality of every row at every number of pruned weights, computed once per matrix.

For row i with its k least important weights pruned, let ``yhat_i(k)`` be its output on the calibration inputs and
``y_i`` the dense one. Every quality that TRIM (arXiv 2505.16743) compares while it searches for row budgets follows
from ``<y_i, yhat_i(k)>``, ``|yhat_i(k)|^2`` and ``|y_i|^2``: a search becomes a look-up. On the CPU a small C++ library
(``native/curves.cpp``) computes them; without it, and on any other device, plain torch does.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.memory import halving
from trim_export.shared_library import load_library

__all__ = ["Curves", "curves", "native_available"]

_CHUNK_ELEMENTS = 1 << 24  # float32 values of one temporary of the portable code: 64 MiB
_NATIVE_CHUNK = 32  # samples that the library takes at a time


@dataclass(frozen=True)
class Curves:
    """What row qualities are made of, at each number ``k = 0..columns`` of pruned weights.

    A row's cosine to its dense output is ``numerator / sqrt(norm2 * target_norm2)``, its squared error
    ``target_norm2 - 2 * numerator + norm2`` (combine in float64: the difference of large numbers).

    Attributes:
        numerator: float32 ``[rows, columns + 1]``, ``<y_i, yhat_i(k)>``.
        norm2: float32 ``[rows, columns + 1]``, ``|yhat_i(k)|^2``.
        target_norm2: float64 ``[rows]``, ``|y_i|^2``.
    """

    numerator: Tensor
    norm2: Tensor
    target_norm2: Tensor


@torch.no_grad()
def curves(weight: Tensor, order: Tensor, inputs: Tensor) -> Curves:
    """Accumulate each row from its most important weight on and record its output's quality after every step.

    Args:
        weight: float32 ``[rows, columns]``.
        order: int64 ``[rows, columns]``, per row the stable ascending argsort of the importance.
        inputs: float32 ``[columns, samples]``, on the same device as the others.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``order`` names a column that does not exist.
    """
    _check(weight, order, inputs)
    outputs = weight @ inputs
    library = _library() if weight.device.type == "cpu" else None
    if library is None:
        numerator, norm2 = _portable_curves(weight, order, inputs, outputs)
    else:
        numerator, norm2 = _native_curves(library, weight, order, inputs, outputs)
    return Curves(numerator, norm2, outputs.double().square().sum(dim=1))


def native_available() -> bool:
    """Whether the compiled library is installed and loads; `curves` is correct either way, but slower without it."""
    return _library() is not None


def _check(weight: Tensor, order: Tensor, inputs: Tensor) -> None:
    if weight.ndim != 2 or inputs.ndim != 2 or order.shape != weight.shape or inputs.shape[0] != weight.shape[1]:
        raise ValueError(
            "curves needs weight [rows, columns], order [rows, columns] and inputs [columns, samples], not "
            f"{list(weight.shape)}, {list(order.shape)} and {list(inputs.shape)}"
        )
    if 0 in weight.shape or 0 in inputs.shape:
        raise ValueError(f"curves needs something in each dimension: {list(weight.shape)}, {list(inputs.shape)}")
    if (weight.dtype, order.dtype, inputs.dtype) != (torch.float32, torch.int64, torch.float32):
        raise ValueError(
            "curves needs a float32 weight, an int64 order and float32 inputs, not "
            f"{weight.dtype}, {order.dtype} and {inputs.dtype}"
        )
    if not weight.device == order.device == inputs.device:
        raise ValueError(
            f"curves needs everything on one device, not {weight.device}, {order.device} and {inputs.device}"
        )
    lowest, highest = (int(bound) for bound in torch.aminmax(order))
    if lowest < 0 or highest >= weight.shape[1]:
        raise ValueError(
            f"order names columns {lowest}..{highest}, but the weight has columns 0..{weight.shape[1] - 1}"
        )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_library("native", "libtrim_curves.so")
    if library is not None:
        tensor, size = ctypes.c_void_p, ctypes.c_int64
        library.trim_curves.argtypes = [tensor] * 4 + [size] * 3 + [tensor] * 2 + [ctypes.c_int]
        library.trim_curves.restype = None
    return library


def _native_curves(
    library: ctypes.CDLL, weight: Tensor, order: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    # Zero samples add nothing, and spare the library the remainder. Named, so that copies live until it returns.
    padding = (0, -inputs.shape[1] % _NATIVE_CHUNK)
    inputs, outputs = (torch.nn.functional.pad(tensor, padding).contiguous() for tensor in (inputs, outputs))
    weight = weight.contiguous()
    order32 = order.to(torch.int32).contiguous()
    numerator = weight.new_empty(rows, columns + 1)
    norm2 = torch.empty_like(numerator)
    library.trim_curves(
        weight.data_ptr(),
        order32.data_ptr(),
        inputs.data_ptr(),
        outputs.data_ptr(),
        rows,
        columns,
        inputs.shape[1],
        numerator.data_ptr(),
        norm2.data_ptr(),
        torch.get_num_threads(),
    )
    return numerator, norm2


def _portable_curves(weight: Tensor, order: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    one_sample = weight.shape[1]  # of one row
    return halving(
        lambda elements: _chunked_curves(weight, order, inputs, outputs, elements),
        max(_CHUNK_ELEMENTS, one_sample),
        one_sample,
        weight.device,
        "values",
    )


def _chunked_curves(
    weight: Tensor, order: Tensor, inputs: Tensor, outputs: Tensor, elements: int
) -> tuple[Tensor, Tensor]:
    # The partial outputs [rows, columns, samples] of all steps are the one large thing: they exist for a block of rows
    # and, if a single row is already too long, a block of samples at a time.
    rows, columns = weight.shape
    samples = inputs.shape[1]
    width = min(samples, math.ceil(elements / columns))
    height = max(1, elements // (columns * width))
    numerator = weight.new_zeros(rows, columns + 1)
    norm2 = torch.zeros_like(numerator)
    for top in range(0, rows, height):
        block = slice(top, top + height)
        important_first = order[block].flip(1)
        scale = weight[block].gather(1, important_first).unsqueeze(2)
        for left in range(0, samples, width):
            part = slice(left, left + width)
            partial = inputs[:, part][important_first].mul_(scale).cumsum_(dim=1)
            dots = (partial @ outputs[block, part].unsqueeze(2)).squeeze(2)
            numerator[block, :columns] += dots.flip(1)
            norm2[block, :columns] += partial.square_().sum(dim=2).flip(1)
    return numerator, norm2
