"""Groups of eight weights with 4-bit distances: the form that GPU kernels read at 50 to 90 % sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trim_export.converters._checks import check_shape, take
from trim_export.converters._groups import GROUP, GROUP_PTR, check_limits, collect, take_groups, unsigned
from trim_export.converters.encoding import nbytes
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import ArtifactError

__all__ = ["G8"]

_FURTHEST = 15  # distance that four bits can say


@dataclass(frozen=True)
class G8:
    """Groups of up to eight weights of one row, each group with a base column and eight 4-bit distances.

        weight_group_ptr  int32 [rows + 1]   groups before each row
        weight_base       int16 [groups]     column of the group's first weight, read as unsigned
        weight_gaps       int32 [groups]     bits 4u to 4u + 3: distance of slot u from slot u - 1; of slot 0: 0
        weight_values     [groups * 8]

    A group is self-contained: no prefix sum over a row, so threads may take any groups of it. 16-bit values cost 22
    bytes for eight weights. A wider gap than 15 is bridged by a slot at distance 15 without a weight; slots after the
    last weight of a group have distance 0. A kept zero 15 columns further would look like a bridge and begins a group
    instead, so every kept zero comes back. A group reaches as far as it can, which gives the fewest groups.

    4-bit distances with bridges are those of MACKO-SpMV (arXiv 2511.13061), where they run through a whole row.
    """

    name: ClassVar[str] = "g8"
    tensors: ClassVar[tuple[str, ...]] = (GROUP_PTR, "weight_base", "weight_gaps", "weight_values")

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The four tensors of ``matrix``; explicit zeros among its values are kept.

        Raises:
            UsageError: more than 65536 columns, or 2**31 slots.
        """
        rows, columns = matrix.shape
        check_limits(columns, matrix.nnz)
        flat = np.flatnonzero(matrix.mask.numpy())
        row_ptr = np.searchsorted(flat, np.arange(rows + 1) * columns)
        column = (flat % columns).astype(np.int32)
        gaps = np.diff(column, prepend=column[:1])
        bridges = np.maximum(gaps - 1, 0) // _FURTHEST
        last = gaps - _FURTHEST * bridges
        length = bridges + 1  # slots that a weight takes in the group of the one before it
        length[(last == _FURTHEST) & (matrix.values == 0).numpy()] = GROUP
        length[row_ptr[:-1][row_ptr[:-1] < row_ptr[1:]]] = GROUP
        place = np.cumsum(np.minimum(length, GROUP))
        first = _group_starts(place, row_ptr)
        check_limits(columns, int(first.sum()) * GROUP)
        group = np.cumsum(first) - 1
        slot = GROUP * group + place - place[first][group]
        inner = ~first
        nibbles = np.zeros((int(first.sum()), GROUP), np.uint8)
        nibbles.flat[slot[inner]] = last[inner]
        for step in range(1, GROUP - 1):
            nibbles.flat[slot[inner & (bridges >= step)] - step] = _FURTHEST
        values = matrix.values.new_zeros(nibbles.size)
        values[torch.from_numpy(slot)] = matrix.values
        starts = np.concatenate(([0], np.cumsum(first)))
        return {
            GROUP_PTR: torch.from_numpy(starts[row_ptr].astype(np.int32)),
            "weight_base": torch.from_numpy(column[first].astype(np.uint16).view(np.int16)),
            "weight_gaps": torch.from_numpy((nibbles[:, ::2] | nibbles[:, 1::2] << 4).view("<i4").reshape(-1)),
            "weight_values": values,
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix; `ArtifactError` also when groups leave the matrix, fall back, or hide values in empty slots."""
        check_shape(shape, nbytes(tensors))
        ptr, values = take_groups(tensors, shape[0])
        groups = values.numel() // GROUP
        base = unsigned(take(tensors, "weight_base", (torch.int16,), (groups,)))
        octets = take(tensors, "weight_gaps", (torch.int32,), (groups,)).contiguous().numpy().astype("<i4").view("u1")
        nibbles = np.stack((octets & 15, octets >> 4), axis=-1).reshape(groups, GROUP)
        if nibbles[:, 0].any():
            raise ArtifactError("tensor weight_gaps has a group that does not begin at its base column")
        columns = base[:, None] + np.cumsum(nibbles, axis=1, dtype=np.int64)
        empty = (values == 0).numpy().reshape(groups, GROUP)
        filler = (nibbles == 0) | (nibbles == _FURTHEST) & empty
        filler[:, 0] = False
        return collect(ptr, columns.reshape(-1), values, filler.reshape(-1), shape, "weight_base")


def _group_starts(place: NDArray[Any], row_ptr: NDArray[Any]) -> NDArray[Any]:
    """bool ``[nnz]``: where a group begins, when each reaches as far as it can.

    ``place`` ``[nnz]`` rises by the slots that each weight takes: those less than eight after a group's first fit into
    it. All rows step from group to group together.
    """
    reach = np.ones(place.size, np.int64)
    for ahead in range(1, GROUP):
        reach[:-ahead] += place[ahead:] - place[:-ahead] < GROUP
    first = np.zeros(place.size, np.bool_)
    at, end = row_ptr[:-1], row_ptr[1:]
    while True:
        inside = at < end
        at, end = at[inside], end[inside]
        if not at.size:
            return first
        first[at] = True
        at = at + reach[at]
