"""What the encodings for GPUs share: a row is a run of groups of eight slots, each a 16-bit column and a value.

A slot that holds no weight has the value zero, to the bit, and the column of a slot beside it, so that a kernel may
multiply it like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trim_export.converters._checks import FLOATS, take
from trim_export.converters._rows import rows_to_mask
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import ArtifactError, UsageError

__all__ = ["GROUP", "GROUP_PTR", "MOST_SLOTS", "WIDEST", "check_limits", "collect", "take_groups", "unsigned"]

GROUP = 8
"""Slots of a group: eight 16-bit values are one load of 128 bits."""
GROUP_PTR = "weight_group_ptr"
WIDEST = 2**16
"""Most columns that 16 bits can name."""
MOST_SLOTS = 2**31 - 1
"""Most slots that 32-bit offsets can count."""


def check_limits(columns: int, slots: int) -> None:
    """Refuse (`UsageError`) a matrix whose columns do not fit 16 bits, or whose slots do not fit 32-bit offsets."""
    if columns > WIDEST:
        raise UsageError(f"{columns} columns do not fit the 16-bit indices of GPU encodings; use CSR (torch-sparse)")
    if slots > MOST_SLOTS:
        raise UsageError(f"{slots} slots do not fit the 32-bit offsets of GPU encodings; use CSR (torch-sparse)")


def take_groups(tensors: Mapping[str, Tensor], rows: int) -> tuple[NDArray[Any], Tensor]:
    """The checked group pointers int32 ``[rows + 1]`` and the values ``[groups * 8]``; `ArtifactError` otherwise."""
    values = take(tensors, "weight_values", FLOATS, (None,))
    ptr = take(tensors, GROUP_PTR, (torch.int32,), (rows + 1,)).numpy()
    groups, rest = divmod(values.numel(), GROUP)
    if rest:
        raise ArtifactError(f"tensor weight_values has {values.numel()} slots, which are not groups of {GROUP}")
    if ptr[0] != 0 or (ptr[1:] < ptr[:-1]).any() or ptr[-1] != groups:
        raise ArtifactError(f"tensor {GROUP_PTR} does not rise from 0 to the {groups} groups of weight_values")
    return ptr, values


def collect(
    ptr: NDArray[Any], columns: NDArray[Any], values: Tensor, filler: NDArray[Any], shape: tuple[int, int], name: str
) -> SparseMatrix:
    """The matrix of all slots but the ``filler`` ones; ``name`` is the tensor to blame for a wrong column.

    Args:
        ptr: row pointers ``[rows + 1]`` in groups.
        columns: ``[slots]``, in the order of each row.
        values: ``[slots]``, in the same order.
        filler: bool ``[slots]``.
        shape: of the matrix.
        name: tensor that the columns come from.
    """
    if columns.size and columns.max() >= shape[1]:
        raise ArtifactError(f"tensor {name} has a column outside 0..{shape[1] - 1}")
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)
    if bits[torch.from_numpy(filler)].any():
        raise ArtifactError("tensor weight_values is not zero in a slot that holds no weight")
    kept = np.concatenate(([0], np.cumsum(~filler)))
    mask = rows_to_mask(kept[ptr.astype(np.int64) * GROUP], columns[~filler], shape, (GROUP_PTR, name))
    return SparseMatrix(mask, values[torch.from_numpy(~filler)])


def unsigned(index: Tensor) -> NDArray[Any]:
    """16-bit indices, stored as int16 because few libraries know uint16, as int64."""
    return index.numpy().view(np.uint16).astype(np.int64)
