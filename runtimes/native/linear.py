"""The native engine as a torch operator and as layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trim_export.converters import Bitmap, SparseMatrix
from trim_export.errors import EnvironmentLacks
from trim_export.runtimes.linear import Layout, SparseLinear
from trim_export.runtimes.native.dense import dense_product
from trim_export.runtimes.native.integers import lay_out_int8
from trim_export.runtimes.native.layout import lay_out
from trim_export.runtimes.native.library import is_traced
from trim_export.runtimes.native.matrix import NativeMatrix
from trim_export.runtimes.native.policy import preference

__all__ = ["MaskedLinear", "NativeLinear", "NativeWeights", "WaitingLinear", "sparse_linear"]


@torch.library.custom_op("trim_export::sparse_linear", mutates_args=(), device_types="cpu")
def sparse_linear(
    inputs: Tensor,
    order: Tensor,
    counts: Tensor,
    mask: Tensor,
    group_start: Tensor,
    values: Tensor,
    slot_start: Tensor,
    slot_columns: Tensor,
    slot_values: Tensor,
    list_start: Tensor,
    list_columns: Tensor,
    list_values: Tensor,
    scales: Tensor | None = None,
    input_scales: Tensor | None = None,
    input_limit: int = 0,
) -> Tensor:
    """`NativeMatrix.multiply` on as many threads as torch uses; has no gradient. What graphs are made of."""
    columns = inputs.shape[-1]
    matrix = NativeMatrix(
        columns,
        order,
        counts,
        mask,
        group_start,
        values,
        slot_start,
        slot_columns,
        slot_values,
        list_start,
        list_columns,
        list_values,
        scales,
        input_scales,
        input_limit,
    )
    return matrix.multiply(inputs, torch.get_num_threads())


@sparse_linear.register_fake
def _(inputs: Tensor, order: Tensor, *_: Tensor | int | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], order.shape[0])


class NativeWeights(nn.Module):
    """A `NativeMatrix` as buffers, so that it moves, casts and copies with its model."""

    order: Tensor
    values: Tensor
    scales: Tensor | None
    input_scales: Tensor | None

    def __init__(self, ready: NativeMatrix) -> None:
        super().__init__()
        self.columns, self.input_limit = ready.columns, ready.input_limit
        self.parts = tuple(ready.tensors())
        for name, tensor in ready.tensors().items():
            # Not persistent: what is saved is the artifact's encoding, which the loader makes from `matrix`.
            self.register_buffer(name, tensor, persistent=False)
        self._ready: NativeMatrix | None = ready

    @classmethod
    def of(cls, matrix: SparseMatrix, values: torch.dtype | None) -> NativeWeights:
        """In the forms that are fastest here, with values in this dtype or, for None, in their own."""
        dtype = values or matrix.values.dtype
        if dtype is torch.int8:
            return cls(lay_out_int8(matrix, preference(dtype)))
        return cls(lay_out(SparseMatrix(matrix.mask, matrix.values.to(dtype)), None, preference(dtype)))

    @property
    def ready(self) -> NativeMatrix:
        """The buffers as the kernels take them, checked once."""
        if self._ready is None:
            self._ready = NativeMatrix(self.columns, **self._tensors(), input_limit=self.input_limit)
        return self._ready

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., columns] -> [..., rows]`` in the dtype of the inputs; summed in float32."""
        wide = inputs if inputs.dtype is torch.float32 else inputs.float()
        if is_traced(inputs):
            output: Tensor = sparse_linear(wide, *self._tensors().values(), self.input_limit)
        else:
            output = self.ready.multiply(wide, torch.get_num_threads())
        return output if output.dtype is inputs.dtype else output.to(inputs.dtype)

    def _tensors(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.parts}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeWeights:
        scales, input_scales = self.scales, self.input_scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.order.device.type not in ("cpu", "meta"):
            raise EnvironmentLacks(f"native layers execute on the CPU, not on {self.order.device}; load to it instead")
        # A cast is meant for weights and activations; scales are exact float32, whatever the model's dtype.
        self.scales, self.input_scales = scales, input_scales
        self._ready = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Addresses are not to be copied; they are looked up again.
        return {**self.__dict__, "_ready": None}


class NativeLinear(SparseLinear):
    """A layer that the native kernels execute; values stay in their dtype unless the layout says another."""

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> None:
        super().__init__(matrix.shape, bias, layout)
        self.weights = NativeWeights.of(matrix, layout.values)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs."""
        output: Tensor = self.weights(inputs)
        return output if self.bias is None else output + self.bias

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit; of int8 values their products with all scales, in float32."""
        return self.weights.ready.matrix()


class WaitingLinear(SparseLinear):
    """A layer whose weights are not laid out yet, because its siblings come with it; it does not execute.

    Args:
        matrix, bias, layout: as in `NativeLinear`.
    """

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> None:
        super().__init__(matrix.shape, bias, layout)
        self.layout = layout
        self._matrix = matrix

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit."""
        return self._matrix


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
        output = dense_product(inputs.to(self.weight.dtype), self.weight).to(inputs.dtype)
        return output if self.bias is None else output + self.bias

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit, on the CPU."""
        bits, weight = self.bits.cpu().numpy(), self.weight.cpu()
        mask = torch.from_numpy(np.unpackbits(bits, axis=1, count=self.in_features, bitorder="little").view(np.bool_))
        return SparseMatrix.from_dense(weight, mask)
