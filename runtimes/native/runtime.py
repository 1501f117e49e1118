"""The native engine as a runtime."""

from __future__ import annotations

from torch import Tensor, nn

from trim_export.converters import SparseMatrix
from trim_export.runtimes.linear import Layout
from trim_export.runtimes.native.dense import DenseLinear
from trim_export.runtimes.native.fused import fuse
from trim_export.runtimes.native.library import library
from trim_export.runtimes.native.linear import MaskedLinear, NativeLinear, WaitingLinear
from trim_export.runtimes.native.policy import hardly_sparse

__all__ = ["NativeRuntime"]


class NativeRuntime:
    """Our own CPU kernels; a matrix that is hardly sparse stays dense."""

    name = "native"
    devices = ("cpu",)

    def unavailable(self) -> str | None:
        """Needs the compiled library."""
        if library() is None:
            return "its library is not installed; install a C++ compiler (GCC or Clang) and then trim-export again"
        return None

    def linear(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> nn.Module:
        """A `NativeLinear`, a `MaskedLinear` as stored if hardly sparse, or what waits for its siblings to `finish`."""
        rows, columns = matrix.shape
        if hardly_sparse(1 - matrix.nnz / (rows * columns), matrix.values.dtype):
            return MaskedLinear(matrix, bias, layout)
        return (WaitingLinear if layout.siblings else NativeLinear)(matrix, bias, layout)

    def finish(self, module: nn.Module) -> None:
        """Siblings in one product, and our kernel for the single tokens of layers that stayed dense."""
        fuse(module)
        for name, part in list(module.named_modules()):
            if type(part) is nn.Linear:
                module.set_submodule(name, DenseLinear(part))
