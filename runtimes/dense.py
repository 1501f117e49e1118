"""The dense runtime: zeros and all, in an ordinary `nn.Linear`. The reference every other runtime is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trim_export.converters import SparseMatrix
from trim_export.runtimes.linear import Layout

__all__ = ["DenseRuntime", "dense_linear"]


class DenseRuntime:
    """Expands each matrix at load; needs the dense model's memory."""

    name = "dense"
    devices = ("cpu", "cuda")

    def unavailable(self) -> str | None:
        """Always available."""
        return None

    def linear(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> nn.Module:
        """An `nn.Linear` with exact zeros where the weight was pruned."""
        return dense_linear(matrix, bias).to(layout.device)

    def finish(self, module: nn.Module) -> None:
        """Nothing."""


def dense_linear(matrix: SparseMatrix, bias: Tensor | None, dtype: torch.dtype | None = None) -> nn.Linear:
    """The `nn.Linear` that a sparse layer came from, in the stored dtype or ``dtype``."""
    rows, columns = matrix.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(matrix.to_dense().to(dtype or matrix.values.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype or bias.dtype), requires_grad=False)
    return linear
