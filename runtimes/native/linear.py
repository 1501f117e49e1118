"""The native engine as a torch operator, a layer and a runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trim_export.converters import Bitmap, Bitmap4x64, SparseMatrix
from trim_export.errors import EnvironmentLacks
from trim_export.runtimes.linear import Layout, SparseLinear
from trim_export.runtimes.native.library import TAIL, library, multiply

__all__ = ["MaskedLinear", "NativeLinear", "NativeRuntime", "sparse_linear"]

BREAK_EVEN = 0.3
"""Sparsity below which a layer is multiplied dense."""


@torch.library.custom_op("trim_export::sparse_linear", mutates_args=(), device_types="cpu")
def sparse_linear(
    inputs: Tensor, order: Tensor, mask: Tensor, group_start: Tensor, values: Tensor, scales: Tensor | None
) -> Tensor:
    """`trim_export.runtimes.native.library.multiply` on as many threads as torch uses; has no gradient."""
    return multiply(inputs, order, mask, group_start, values, scales, torch.get_num_threads())


@sparse_linear.register_fake
def _(
    inputs: Tensor, order: Tensor, mask: Tensor, group_start: Tensor, values: Tensor, scales: Tensor | None
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], order.shape[0])


class NativeRuntime:
    """Our own CPU kernels on the layout `bitmap-4x64`; a matrix that is hardly sparse stays dense."""

    name = "native"
    devices = ("cpu",)

    def unavailable(self) -> str | None:
        """Needs the compiled library."""
        if library() is None:
            return "its library is not installed; install a C++ compiler (GCC or Clang) and then trim-export again"
        return None

    def linear(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> nn.Module:
        """A `NativeLinear`, or below `BREAK_EVEN` a `MaskedLinear`."""
        rows, columns = matrix.shape
        if matrix.nnz > (1 - BREAK_EVEN) * rows * columns:
            return MaskedLinear(matrix, bias, layout)
        return NativeLinear(matrix, bias, layout)


class NativeLinear(SparseLinear):
    """A layer that the native kernels execute, with sums in float32.

    Values stay in their stored dtype; inputs of another dtype are multiplied as float32.

    Args:
        matrix: the weights; or int8 values, to be multiplied by ``scales`` (`converters.bitmap_4x64.quantize_rows`).
        bias: ``[rows]`` or None.
        layout: of the CPU.
        scales: float32 ``[rows]`` or None.
    """

    order: Tensor
    mask: Tensor
    group_start: Tensor
    values: Tensor
    scales: Tensor | None

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout, scales: Tensor | None = None) -> None:
        super().__init__(matrix.shape, bias, layout)
        parts = Bitmap4x64().encode(matrix)
        order, mask, values = parts["weight_order"], parts["weight_mask"], parts["weight_values"]
        counts = pad(matrix.row_counts[order.long()], (0, -len(order) % 4)).reshape(-1, 4).sum(dim=1)
        # Not persistent: what is saved is the artifact's encoding, which the loader makes from `matrix`.
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("group_start", pad(counts.cumsum(0), (1, 0)), persistent=False)
        self.register_buffer("values", pad(values, (0, TAIL)), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs."""
        flat = inputs.reshape(-1, self.in_features).float()
        output: Tensor = sparse_linear(flat, self.order, self.mask, self.group_start, self.values, self.scales)
        output = output.to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit; of int8 values their products with the scales, in float32."""
        count = int(self.group_start[-1])
        values = self.values[:count] if self.scales is None else self.values[:count].float()
        parts = {"weight_order": self.order, "weight_mask": self.mask, "weight_values": values}
        matrix = Bitmap4x64().decode(parts, (self.out_features, self.in_features))
        if self.scales is None:
            return matrix
        return SparseMatrix(matrix.mask, matrix.values * self.scales.repeat_interleave(matrix.row_counts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeLinear:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.values.device.type not in ("cpu", "meta"):
            raise EnvironmentLacks(f"native layers execute on the CPU, not on {self.values.device}; load to it instead")
        # A cast is meant for weights and activations; scales are exact float32, whatever the model's dtype.
        self.scales = scales
        return self


class MaskedLinear(SparseLinear):
    """A layer with so few zeros that it is multiplied dense; it remembers which of them were pruned."""

    weight: Tensor
    bits: Tensor

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> None:
        super().__init__(matrix.shape, bias, layout)
        # Not persistent: see `NativeLinear`.
        self.register_buffer("weight", matrix.to_dense(), persistent=False)
        self.register_buffer("bits", Bitmap().encode(matrix)["weight_mask"], persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs."""
        output = nn.functional.linear(inputs.to(self.weight.dtype), self.weight).to(inputs.dtype)
        return output if self.bias is None else output + self.bias

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit, on the CPU."""
        bits, weight = self.bits.cpu().numpy(), self.weight.cpu()
        mask = torch.from_numpy(np.unpackbits(bits, axis=1, count=self.in_features, bitorder="little").view(np.bool_))
        return SparseMatrix.from_dense(weight, mask)
