"""Multiplication by rows of groups as a torch operator: traced and exported like any other, opaque to the compiler."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from trim_export.converters import G8, InterleavedCsr
from trim_export.runtimes.triton.launch import Packed, multiply

__all__ = ["grouped_linear"]


@torch.library.custom_op("trim_export::grouped_linear", mutates_args=(), device_types="cuda")
def grouped_linear(
    inputs: Tensor, order: Tensor, ptr: Tensor, index: Tensor, gaps: Tensor | None, values: Tensor
) -> Tensor:
    """``inputs W^T`` for inputs ``[tokens, columns]`` and the W of `launch.Packed`; has no gradient.

    On a GPU by `launch.multiply`; elsewhere, for tracing and tests, by a dense product of what the encoding decodes to.
    """
    return multiply(Packed(order, ptr, index, gaps, values, inputs.shape[1]), inputs)


@grouped_linear.register_fake
def _(inputs: Tensor, order: Tensor, ptr: Tensor, index: Tensor, gaps: Tensor | None, values: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], order.shape[0])


@grouped_linear.register_kernel("cpu")
def _(inputs: Tensor, order: Tensor, ptr: Tensor, index: Tensor, gaps: Tensor | None, values: Tensor) -> Tensor:
    encoding = InterleavedCsr() if gaps is None else G8()
    structure = (ptr, index, values) if gaps is None else (ptr, index, gaps, values)
    parts = dict(zip(encoding.tensors, structure, strict=True))
    weight = encoding.decode(parts, (order.shape[0], inputs.shape[1])).to_dense()
    return linear(inputs.float(), weight.float()).to(inputs.dtype)
