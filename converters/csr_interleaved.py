"""CSR with 16-bit columns in the order in which a GPU's threads read it, for matrices that are nearly empty."""

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
from trim_export.converters._rows import COLUMNS, ROW_PTR, encode_rows
from trim_export.converters.encoding import nbytes
from trim_export.converters.matrix import SparseMatrix

__all__ = ["InterleavedCsr", "cost"]

_LANES = 32  # threads that read side by side


@dataclass(frozen=True)
class InterleavedCsr:
    """Rows of columns and values, filled up to whole groups of eight, which are dealt out to 32 threads.

        weight_group_ptr  int32 [rows + 1]     groups before each row
        weight_columns    int16 [groups * 8]   read as unsigned
        weight_values     [groups * 8]

    A row is cut into chunks of up to 32 groups, one for each thread. Slot u of the l-th of a chunk's n groups holds the
    chunk's weight ``u * n + l``, so that threads that gather together gather neighbouring columns, while each still
    loads its eight values at once. Slots after a row's last weight repeat its column with the value zero.

    16-bit values cost 32 bytes for eight weights: less than `G8` only where that has to bridge many gaps, from about
    92 % sparsity on.
    """

    name: ClassVar[str] = "csr-interleaved"
    tensors: ClassVar[tuple[str, ...]] = (GROUP_PTR, COLUMNS, "weight_values")

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The three tensors of ``matrix``; explicit zeros among its values are kept.

        Raises:
            UsageError: more than 65536 columns, or 2**31 slots.
        """
        structure = encode_rows(matrix.mask)
        row_ptr = structure[ROW_PTR].numpy().astype(np.int64)
        ptr = _group_ptr(np.diff(row_ptr))
        slots = int(ptr[-1]) * GROUP
        check_limits(matrix.shape[1], slots)
        # Where each slot of the padded rows takes its column from: beyond a row's end its last weight stays.
        row = np.repeat(np.arange(len(row_ptr) - 1), np.diff(ptr) * GROUP)
        wanted = np.arange(slots) - ptr[row] * GROUP + row_ptr[row]
        source = np.minimum(wanted, row_ptr[row + 1] - 1)
        values = matrix.values[torch.from_numpy(source)].masked_fill_(torch.from_numpy(source < wanted), 0.0)
        deal = torch.from_numpy(_deal(ptr))
        columns = structure[COLUMNS].numpy().astype(np.uint16).view(np.int16)
        return {
            GROUP_PTR: torch.from_numpy(ptr.astype(np.int32)),
            COLUMNS: torch.from_numpy(columns[source])[deal],
            "weight_values": values[deal],
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix; `ArtifactError` also when columns leave the matrix, fall back, or empty slots hide values."""
        check_shape(shape, nbytes(tensors))
        ptr, values = take_groups(tensors, shape[0])
        columns = unsigned(take(tensors, COLUMNS, (torch.int16,), (values.numel(),)))
        back = np.argsort(_deal(ptr.astype(np.int64)))
        columns = columns[back]
        filler = np.diff(columns, prepend=-1) == 0
        filler[ptr[:-1][ptr[:-1] < ptr[-1]].astype(np.int64) * GROUP] = False  # a row may begin where another ended
        return collect(ptr, columns, values[torch.from_numpy(back)], filler, shape, COLUMNS)


def cost(matrix: SparseMatrix) -> int:
    """Bytes that `InterleavedCsr` would take for ``matrix``, without making it."""
    ptr = _group_ptr(matrix.row_counts.numpy())
    return int(ptr[-1]) * GROUP * (2 + matrix.values.element_size()) + 4 * len(ptr)


def _group_ptr(counts: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate(([0], np.cumsum(-(-counts // GROUP))))


def _deal(ptr: NDArray[Any]) -> NDArray[Any]:
    """int64 ``[slots]``: which slot of the rows in order each slot of the dealt-out rows holds."""
    groups = np.diff(ptr)
    row = np.repeat(np.arange(groups.size), groups)
    within = np.arange(row.size) - ptr[row]
    chunk, lane = np.divmod(within, _LANES)
    lanes = np.minimum(_LANES, groups[row] - chunk * _LANES)
    begin = (ptr[row] + chunk * _LANES) * GROUP
    dealt: NDArray[Any] = (begin + lane)[:, None] + np.arange(GROUP) * lanes[:, None]
    return dealt.reshape(-1)
