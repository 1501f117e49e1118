"""Sparse layers on torch's own CSR and BSR kernels (MKL on x86 CPUs, cuSPARSE on CUDA)."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.converters import Bsr, Csr, SparseMatrix
from trim_export.errors import UsageError
from trim_export.runtimes.linear import Layout, SparseLinear

__all__ = ["TorchSparseLinear", "TorchSparseRuntime"]

logger = logging.getLogger(__name__)


class TorchSparseRuntime:
    """CSR, or BSR when the artifact stores blocks."""

    name = "torch-sparse"
    devices = ("cpu", "cuda")

    def unavailable(self) -> str | None:
        """Comes with torch."""
        return None

    def linear(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> nn.Module:
        """A `TorchSparseLinear`.

        Raises:
            UsageError: blocks that torch cannot multiply.
        """
        if layout.block and layout.device.type == "cpu" and layout.block[0] != layout.block[1]:
            rows, columns = layout.block
            raise UsageError(
                f"torch multiplies only square blocks on the CPU, not {rows}x{columns}; use --runtime dense or CSR"
            )
        return TorchSparseLinear(matrix, bias, layout)

    def finish(self, module: nn.Module) -> None:
        """Nothing."""


class TorchSparseLinear(SparseLinear):
    """A layer whose weight is a torch CSR tensor, or a BSR tensor when the layout has blocks.

    Indices are int32. Torch has no CPU kernel for bfloat16 and float16 CSR, so there these values are held in float32:
    twice the bytes, and sums at least as exact. `matrix` gives back the stored dtype.
    """

    values: Tensor
    columns: Tensor
    row_ptr: Tensor

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> None:
        super().__init__(matrix.shape, bias, layout)
        self.stored_dtype = matrix.values.dtype
        parts = self._encoding().encode(matrix)
        # Not persistent: what is saved is the artifact's encoding, which the loader makes from `matrix`.
        self.register_buffer("values", parts["weight_values"].to(layout.device), persistent=False)
        self.register_buffer("columns", parts["weight_columns"].to(layout.device, torch.int32), persistent=False)
        self.register_buffer("row_ptr", parts["weight_row_ptr"].to(layout.device, torch.int32), persistent=False)
        self._weight = self._assemble()

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs."""
        flat = inputs.reshape(-1, self.in_features).to(self._weight.dtype)
        padding = self._weight.shape[1] - self.in_features
        if padding:
            flat = nn.functional.pad(flat, (0, padding))
        # One token goes through the matrix-vector kernel: more than twice as fast as a product of width one.
        output = (self._weight @ flat[0])[None] if len(flat) == 1 and self.block is None else (self._weight @ flat.T).T
        output = output[:, : self.out_features].to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit, on the CPU."""
        encoding = self._encoding()
        width = self.in_features if self.block is None else -(-self.in_features // self.block[1])
        index = torch.int16 if width <= 2**15 else torch.int32
        parts = {
            "weight_values": self.values.cpu().to(self.stored_dtype),
            "weight_columns": self.columns.cpu().to(index),
            "weight_row_ptr": self.row_ptr.cpu(),
        }
        return encoding.decode(parts, (self.out_features, self.in_features))

    def _encoding(self) -> Csr | Bsr:
        return Csr() if self.block is None else Bsr(self.block)

    def _assemble(self) -> Tensor:
        """The torch tensor over our three buffers; they were validated when they were made, so torch need not."""
        if self.values.device.type == "cpu" and self.values.element_size() == 2:
            self.stored_dtype = self.values.dtype
            _say_upcast(self.stored_dtype)
            self.values = self.values.float()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(beta state|invariant checks).*")
            if self.block is None:
                shape = (self.out_features, self.in_features)
                return torch.sparse_csr_tensor(self.row_ptr, self.columns, self.values, shape, check_invariants=False)
            # Whole blocks: a matrix whose sides they do not divide is padded with zeros.
            rows, columns = (
                -(-side // block) * block
                for side, block in zip((self.out_features, self.in_features), self.block, strict=True)
            )
            return torch.sparse_bsr_tensor(
                self.row_ptr, self.columns, self.values, (rows, columns), check_invariants=False
            )

    def __getstate__(self) -> dict[str, Any]:
        # Torch can neither copy nor pickle a CSR tensor; it is made again from the buffers.
        return {name: value for name, value in self.__dict__.items() if name != "_weight"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._weight = self._assemble()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchSparseLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._weight = self._assemble()
        return self


@functools.cache
def _say_upcast(dtype: torch.dtype) -> None:
    """Tell, once for each dtype, that values are held wider than they are stored."""
    logger.warning("torch has no CPU kernel for sparse %s: torch-sparse holds these values in float32", dtype)
