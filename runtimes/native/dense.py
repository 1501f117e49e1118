"""What a model keeps dense, most of all its LM head: one token through our kernels, more of them through torch's.

Torch multiplies one float32 token with a dense matrix on one thread, at a third of the memory's speed; on a small model
the head is then as slow as all pruned layers together.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trim_export.errors import UsageError
from trim_export.runtimes.native.library import VALUE_TYPES, address, is_traced, refuse, required

__all__ = [
    "DenseLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "dense_product",
    "multiply_dense",
]

_CHUNK = 4096
"""Rows of 8-bit weights that are widened at a time."""


class _Struct(ctypes.Structure):
    """`TrimNativeDense`."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("values_size", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scales_size", ctypes.c_int64),
        ("value_type", ctypes.c_int32),
    )


def multiply_dense(inputs: Tensor, weight: Tensor, scales: Tensor | None, threads: int) -> Tensor:
    """``weight @ inputs`` for one token, summed in float32; the same bits for any number of threads.

    Args:
        inputs: float32 ``[columns]``, in one piece.
        weight: float32, bfloat16, float16 or int8 ``[rows, columns]``, in one piece.
        scales: float32 ``[rows]`` for int8, else None.
        threads: at most so many.

    Returns:
        float32 ``[rows]``.

    Raises:
        UsageError: they do not fit together.
    """
    tensors = [inputs, weight, *([] if scales is None else [scales])]
    if weight.dim() != 2 or weight.dtype not in VALUE_TYPES or inputs.dtype is not torch.float32:
        raise UsageError(f"the native kernel cannot multiply {weight.dtype} {list(weight.shape)} by {inputs.dtype}")
    if scales is not None and scales.dtype is not torch.float32:
        raise UsageError(f"the native kernel needs scales as torch.float32, not {scales.dtype}")
    if not all(tensor.is_contiguous() and tensor.is_cpu for tensor in tensors):
        raise UsageError("the native kernel needs tensors on the CPU, without gaps")
    rows, columns = weight.shape
    matrix = _Struct(
        rows,
        columns,
        address(weight),
        weight.numel(),
        address(scales),
        0 if scales is None else scales.numel(),
        VALUE_TYPES[weight.dtype],
    )
    outputs = torch.empty(rows)
    status = required().trim_native_dense(
        ctypes.byref(matrix), address(inputs), inputs.numel(), address(outputs), rows, threads
    )
    if status:
        refuse(status, f"a dense matrix of {rows} x {columns}")
    return outputs


def _is_one_token(inputs: Tensor) -> bool:
    return inputs.numel() == inputs.shape[-1] and inputs.is_cpu and not is_traced(inputs)


def dense_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """``inputs @ weight.T`` in the dtype of both: `multiply_dense` for a single token, else torch's `linear`."""
    trained = weight.requires_grad and torch.is_grad_enabled()
    if trained or not (_is_one_token(inputs) and weight.is_cpu and weight.is_contiguous()):
        return linear(inputs, weight)
    output = multiply_dense(inputs.float().flatten(), weight, None, torch.get_num_threads())
    return output.to(inputs.dtype).view(*inputs.shape[:-1], -1)


class DenseLinear(nn.Linear):
    """An `nn.Linear`, weights shared with the one it stands for."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original.in_features, original.out_features, original.bias is not None, device="meta")
        self.weight = original.weight
        self.bias = original.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs."""
        output = dense_product(inputs, self.weight)
        return output if self.bias is None else output + self.bias


class QuantizedLinear(nn.Module):
    """A dense layer with 8-bit weights ``[rows, columns]`` and a scale for each row."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs, summed in float32."""
        wide = inputs.float()
        scales = self.scales.float()
        if _is_one_token(inputs):
            output = multiply_dense(wide.flatten(), self.weight, scales, torch.get_num_threads())
            output = output.view(*inputs.shape[:-1], -1)
        else:
            parts = zip(self.weight.split(_CHUNK), scales.split(_CHUNK), strict=True)
            output = torch.cat([linear(wide, rows.float()) * scale for rows, scale in parts], dim=-1)
        output = output.to(inputs.dtype)
        return output if self.bias is None else output + self.bias


class QuantizedEmbedding(nn.Module):
    """Rows of 8-bit weights, looked up and multiplied by their scales."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """``[...] -> [..., columns]``."""
        return (self.weight[tokens].float() * self.scales[tokens].float()[..., None]).to(self.dtype)
