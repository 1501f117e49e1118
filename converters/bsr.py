"""Block sparse rows: dense blocks wherever a block keeps anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from trim_export.converters._checks import FLOATS, check_shape, take
from trim_export.converters._rows import COLUMNS, ROW_PTR, column_dtype, decode_rows, encode_rows, pointer_dtype
from trim_export.converters.encoding import nbytes
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import ArtifactError, UsageError

__all__ = ["Bsr", "cost"]


@dataclass(frozen=True)
class Bsr:
    """Compressed rows of dense blocks.

    ``weight_values`` is ``[blocks, r, c]``; ``weight_columns`` ``[blocks]`` and ``weight_row_ptr``
    ``[ceil(rows / r) + 1]`` are those of `Csr`, counted in blocks. The matrix is padded with zeros to whole blocks.

    A block is stored in full as soon as it keeps one weight. On an unstructured mask nearly every block does: at
    80 % sparsity a 4x4 block is empty with probability 0.8**16 = 3 %, so the result is as large as the dense matrix
    plus its indices. It pays for masks that are structured in blocks, or nearly empty.

    A kept weight that is exactly zero cannot be told from a pruned one inside a block, so it is pruned on the way
    back. `UsageError` when a side of ``block`` is not positive.
    """

    block: tuple[int, int] = (4, 4)
    name: ClassVar[str] = "bsr"
    tensors: ClassVar[tuple[str, ...]] = ("weight_values", COLUMNS, ROW_PTR)

    def __post_init__(self) -> None:
        """Refuse an impossible block."""
        if min(self.block) < 1:
            raise UsageError(f"a block of {self.block[0]} x {self.block[1]} is impossible; choose positive sides")

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The three tensors of ``matrix`` in blocks of ``block``."""
        kept = _kept_blocks(matrix.mask, self.block)
        return {"weight_values": _split(matrix.to_dense(), self.block)[kept]} | encode_rows(kept)

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix, its block taken from the values; `ArtifactError` also when the padding is not zero."""
        stored = nbytes(tensors)
        check_shape(shape, stored)
        values = take(tensors, "weight_values", FLOATS, (None, None, None))
        blocks, *block = values.shape
        if min(block) < 1:
            raise ArtifactError(f"tensor weight_values has blocks of {block[0]} x {block[1]} weights")
        height, width = (-(-side // step) for side, step in zip(shape, block, strict=True))
        padded = (height * block[0], width * block[1])
        check_shape(padded, stored)
        kept = decode_rows(tensors, (height, width))
        entries = tensors[COLUMNS].numel()
        if blocks != entries:
            raise ArtifactError(f"tensor weight_values has {blocks} blocks, but {COLUMNS} has {entries}")
        weight = values.new_zeros(height, width, *block)
        weight[kept] = values
        weight = weight.transpose(1, 2).reshape(padded)
        rows, columns = shape
        if weight[rows:].any() or weight[:, columns:].any():
            raise ArtifactError(f"tensor weight_values is not zero beyond the {rows} x {columns} weights")
        return SparseMatrix.from_dense(weight[:rows, :columns])


def cost(matrix: SparseMatrix, block: tuple[int, int]) -> int:
    """Bytes that ``Bsr(block)`` would take for ``matrix``, without making its values."""
    kept = _kept_blocks(matrix.mask, block)
    blocks, (height, width) = int(kept.sum()), kept.shape
    per_block = block[0] * block[1] * matrix.values.element_size() + column_dtype(width).itemsize
    return blocks * per_block + (height + 1) * pointer_dtype(blocks).itemsize


def _split(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """``[rows, columns]`` padded with zeros, as ``[block rows, block columns, r, c]``."""
    (rows, columns), (r, c) = matrix.shape, block
    padded = pad(matrix, (0, -columns % c, 0, -rows % r))
    return padded.reshape(-(-rows // r), r, -(-columns // c), c).transpose(1, 2)


def _kept_blocks(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Bool ``[block rows, block columns]``: the blocks that keep at least one weight."""
    return _split(mask, block).amax(dim=(2, 3))
