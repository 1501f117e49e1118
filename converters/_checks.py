"""Checks that every decoder makes before it believes a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trim_export.errors import ArtifactError

__all__ = ["FLOATS", "check_shape", "require_finite", "take"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# A decoder allocates in proportion to rows x columns, which a few hostile bytes can claim to be anything. Up to
# 2**28 weights are harmless; beyond, the stored bytes must make the claim credible (real matrices have < 100).
_SMALL_MATRIX = 2**28
_WEIGHTS_PER_BYTE = 4096


def check_shape(shape: tuple[int, int], stored_bytes: int) -> None:
    """Refuse (`ArtifactError`) a shape that is not positive or is out of proportion to ``stored_bytes``."""
    if len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
        raise ArtifactError(f"the shape {tuple(shape)} is not two positive integers")
    rows, columns = shape
    if rows * columns > max(_SMALL_MATRIX, _WEIGHTS_PER_BYTE * stored_bytes):
        raise ArtifactError(f"{stored_bytes} stored bytes cannot be a matrix of {rows} x {columns} weights")


def take(
    tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> Tensor:
    """The tensor ``name`` if it has one of ``dtypes`` and ``shape`` (None: any size), else `ArtifactError`."""
    if name not in tensors:
        raise ArtifactError(f"tensor {name} is missing")
    tensor = tensors[name]
    if tensor.dtype not in dtypes:
        expected = " or ".join(_words(dtype) for dtype in dtypes)
        raise ArtifactError(f"tensor {name} holds {_words(tensor.dtype)}; expected {expected}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, size) for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ArtifactError(f"tensor {name} has shape {list(tensor.shape)}; expected [{expected}]")
    return tensor


def require_finite(values: Tensor) -> None:
    """Refuse (`ArtifactError`) stored values ``[nnz]`` that hold NaN or infinity, which no pruning gives."""
    # The sum is finite only if all are; it is one fast pass, and overflows for none that a model has.
    if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
        raise ArtifactError("tensor weight_values holds NaN or infinity")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
