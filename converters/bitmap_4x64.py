"""One bit per weight and the kept values, in the order in which the native CPU kernels read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from trim_export.converters._checks import FLOATS, check_shape, take
from trim_export.converters.encoding import nbytes
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import ArtifactError

__all__ = ["Bitmap4x64"]

_GROUP = 4  # rows whose words alternate
_WORD = 64  # columns of a mask word


@dataclass(frozen=True)
class Bitmap4x64:
    """A bit mask and the kept values of four rows at a time, 64 columns at a time.

    Rows are sorted by how many weights they keep, most first, and taken in groups of four; the last group is filled up
    with empty rows and the last word with empty columns. A kernel then reads mask and values strictly forward, and the
    rows that it handles together have about the same number of values:

        weight_order   int32 [rows]               the row of W at each place
        weight_mask    int64 [groups, words, 4]   column j of a word is bit j, counted from the lowest
        weight_values  [nnz]                      group by group, word by word, row by row, column by column

    The structure costs 1 bit per weight, whatever the sparsity, and 4 bytes per row.
    """

    name: ClassVar[str] = "bitmap-4x64"
    tensors: ClassVar[tuple[str, ...]] = ("weight_order", "weight_mask", "weight_values")

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The three tensors of ``matrix``; explicit zeros among its values are kept.

        Of `trim_export.converters.int8.quantize_rows` too, for execution; `decode` takes no such values, as nothing
        stored says their scales.
        """
        order = matrix.row_counts.argsort(descending=True, stable=True)
        kept = _interleave(matrix.mask[order])
        words = np.packbits(kept.numpy(), axis=-1, bitorder="little").view("<i8")[..., 0]
        return {
            "weight_order": order.to(torch.int32),
            "weight_mask": torch.from_numpy(words),
            "weight_values": _interleave(matrix.to_dense()[order])[kept],
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix; `ArtifactError` also when rows are not each named once, or bits and values differ in number."""
        check_shape(shape, nbytes(tensors))
        rows, columns = shape
        groups, words = -(-rows // _GROUP), -(-columns // _WORD)
        order = take(tensors, "weight_order", (torch.int32,), (rows,)).long()
        mask = take(tensors, "weight_mask", (torch.int64,), (groups, words, _GROUP))
        values = take(tensors, "weight_values", FLOATS, (None,))
        if not torch.equal(order.sort().values, torch.arange(rows)):
            raise ArtifactError(f"tensor weight_order does not name each of the {rows} rows once")
        octets = mask.contiguous().numpy().astype("<i8", copy=False)[..., None].view(np.uint8)
        kept = torch.from_numpy(np.unpackbits(octets, axis=-1, bitorder="little").view(np.bool_))
        placed = _separate(kept)
        if placed[rows:].any() or placed[:, columns:].any():
            raise ArtifactError(f"tensor weight_mask has bits set beyond the {rows} x {columns} weights")
        count = int(kept.sum())
        if count != values.numel():
            raise ArtifactError(f"tensor weight_mask keeps {count} weights, but weight_values has {values.numel()}")
        spread = values.new_zeros(kept.shape)
        spread[kept] = values
        back = order.argsort()
        return SparseMatrix.from_dense(*(whole[:rows, :columns][back] for whole in (_separate(spread), placed)))


def _interleave(rows: Tensor) -> Tensor:
    """``[rows, columns]`` filled up and cut into words: ``[groups, words, 4, 64]``."""
    height, width = rows.shape
    whole = pad(rows, (0, -width % _WORD, 0, -height % _GROUP))
    return whole.reshape(-1, _GROUP, whole.shape[1] // _WORD, _WORD).transpose(1, 2).contiguous()


def _separate(words: Tensor) -> Tensor:
    """The inverse of `_interleave`, what was filled up included."""
    groups, width = words.shape[:2]
    return words.transpose(1, 2).reshape(groups * _GROUP, width * _WORD)
