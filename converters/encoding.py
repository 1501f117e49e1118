"""What an encoding of one sparse matrix is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from trim_export.converters.matrix import SparseMatrix

__all__ = ["Encoding", "nbytes"]


class Encoding(Protocol):
    """A way to write one `SparseMatrix` as named tensors and to read it back; all tensors are on the CPU."""

    @property
    def name(self) -> str:
        """The word a user types for it."""
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """Name suffixes of the tensors it stores for one module."""
        ...

    def encode(self, matrix: SparseMatrix) -> dict[str, Tensor]:
        """The tensors of ``matrix``, one for each name in `tensors`; they may share memory with it."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseMatrix:
        """The matrix of ``shape`` (rows, columns) that ``tensors`` hold; tensors of other names are ignored.

        Nothing about the input is trusted. `ArtifactError` names the tensor and the reason: it is missing, or has
        the wrong dtype, the wrong shape or an inconsistent content, or the shape is out of proportion to the bytes.
        """
        ...


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that ``tensors`` take on disk, headers aside."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
