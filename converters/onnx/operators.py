"""The operators of the domain ``trim_export``: what their constants hold, and what they mean in standard operators.

A runtime with our operator library executes the compressed constants. Any other takes the model-local function of the
same name, which decodes them (when the model is loaded, if it folds constants) and multiplies densely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from onnx import FunctionProto, TensorProto
from onnx.parser import parse_function
from torch import Tensor
from torch.nn.functional import pad

from trim_export.converters.bitmap_4x64 import Bitmap4x64
from trim_export.converters.int8 import quantize_rows
from trim_export.converters.matrix import SparseMatrix
from trim_export.errors import choose

__all__ = ["DENSE", "DOMAIN", "SPARSE", "VALUES", "Operator", "pick_encoding", "with_values"]

DOMAIN = "trim_export"

VALUES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
"""How kept weights can be stored."""

_TAIL = 64  # values that a kernel may read behind the last one
_RUN = 64  # zeros in a row of which csr stores one, so that the matrix is at most so many times larger than its file


@dataclass(frozen=True)
class Operator:
    """One operator: ``Y = A W^T`` for A ``[..., columns]`` and constants that hold W ``[rows, columns]``.

    Attributes:
        name: of the operator and its function.
        constants: names of its inputs after A; the last two are always ``values`` and ``scales`` (float32 ``[rows]``).
        body: the function's statements, from the constants to ``weight``, float32 ``[rows, columns]`` before scaling.
        encode: the constants but ``scales``, of a matrix.
    """

    name: str
    constants: tuple[str, ...]
    body: str
    encode: Callable[[SparseMatrix], dict[str, Tensor]]

    def function(self, opset: int, element: int = TensorProto.FLOAT) -> FunctionProto:
        """The operator in standard operators of this version, for A and Y of a type (ONNX's number)."""
        function: FunctionProto = parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
            f"{self.name} <rows, columns> (A, {', '.join(self.constants)}) => (Y) {{\n{_VALUES}{self.body}"
            f"{_PRODUCT.format(element=element)}}}"
        )
        return function


# ONNX's text form; 1, 6, 7 and 9 are its numbers for float32, int32, int64 and bool.
_VALUES = """
    last = Constant <value = int64[1] {-1}> ()
    stored = Cast <to = 1> (values)
"""

_SIDES = """
    height = Constant <value_int: int = @rows> ()
    width = Constant <value_int: int = @columns> ()
    first = Constant <value = int64[1] {0}> ()
    second = Constant <value = int64[1] {1}> ()
    height_1d = Unsqueeze (height, first)
    width_1d = Unsqueeze (width, first)
    sides = Concat <axis = 0> (height_1d, width_1d)
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    axis = Constant <value = int32 {0}> ()
"""

_PRODUCT = """
    scales_2d = Unsqueeze (scales, last)
    scaled = Mul (weight, scales_2d)
    turned = Transpose <perm = [1, 0]> (scaled)
    right = Cast <to = {element}> (turned)
    Y = MatMul (A, right)
"""

# A running count of the bits says which value each of them stands for. The places of the layout are then sorted back.
_BITMAP = """
    shifts = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
    lowest = Constant <value = uint8[1] {1}> ()
    octets = Unsqueeze (mask, last)
    shifted = BitShift <direction = "RIGHT"> (octets, shifts)
    bits = BitwiseAnd (shifted, lowest)
    whole = Cast <to = 9> (bits)
    kept = Reshape (whole, last)
    ones = Cast <to = 6> (kept)
    count = CumSum (ones, axis)
    next = Constant <value = int32 {1}> ()
    index = Sub (count, next)
    found = Gather (stored, index)
    nothing = Constant <value = float {0}> ()
    spread = Where (kept, found, nothing)
    groups_words = Shape <start = 0, end = 2> (mask)
    word = Constant <value = int64[2] {4, 64}> ()
    word_shape = Concat <axis = 0> (groups_words, word)
    padded_shape = Mul (groups_words, word)
    by_word = Reshape (spread, word_shape)
    by_row = Transpose <perm = [0, 2, 1, 3]> (by_word)
    padded = Reshape (by_row, padded_shape)
    origin = Constant <value = int64[2] {0, 0}> ()
    placed = Slice (padded, origin, sides)
    row = Cast <to = 7> (order)
    places = Range (zero, height, one)
    back = ScatterElements <axis = 0> (row, row, places)
    weight = Gather <axis = 0> (placed, back)
"""

# A running sum of the distances between weights says where in the matrix, row after row, each of them stands.
_CSR = """
    before = Cast <to = 7> (gaps)
    distance = Add (before, second)
    passed = CumSum (distance, axis)
    position = Sub (passed, second)
    size = Mul (height_1d, width_1d)
    empty = ConstantOfShape <value = float[1] {0}> (size)
    flat = ScatterElements <axis = 0> (empty, position, stored)
    weight = Reshape (flat, sides)
"""

_DENSE = """
    weight = Identity (stored)
"""


def _encode_bitmap(matrix: SparseMatrix) -> dict[str, Tensor]:
    encoded = Bitmap4x64().encode(matrix)
    groups, words, _ = encoded["weight_mask"].shape
    return {
        "order": encoded["weight_order"],
        "mask": encoded["weight_mask"].view(torch.uint8).reshape(groups, words, 32),
        "values": pad(encoded["weight_values"], (0, _TAIL)),
    }


def _encode_csr(matrix: SparseMatrix) -> dict[str, Tensor]:
    """Weights row after row, each with the zeros before it; where these are ``_RUN`` or more, some are stored."""
    ends = torch.tensor([-1]), torch.tensor([matrix.mask.numel()])
    zeros = torch.cat([ends[0], matrix.mask.reshape(-1).nonzero()[:, 0], ends[1]]).diff() - 1
    stored = zeros // _RUN
    place = torch.arange(len(matrix.values)) + stored[:-1].cumsum(0)
    gaps = torch.full((len(matrix.values) + int(stored.sum()),), _RUN - 1, dtype=torch.uint8)
    gaps[place] = (zeros[:-1] % _RUN).to(torch.uint8)
    values = matrix.values.new_zeros(len(gaps))
    values[place] = matrix.values
    return {"gaps": gaps, "values": values}


SPARSE = {
    "bitmap": Operator("SparseMatMulBitmap", ("order", "mask", "values", "scales"), _SIDES + _BITMAP, _encode_bitmap),
    "csr": Operator("SparseMatMulCsr", ("gaps", "values", "scales"), _SIDES + _CSR, _encode_csr),
}
"""Sparse operators by encoding: csr takes a byte for each kept weight, the bitmap a bit for any weight."""

DENSE = Operator("DenseMatMul", ("values", "scales"), _DENSE, lambda matrix: {"values": matrix.to_dense()})
"""For a matrix that stays dense, in the orientation and dtype in which an embedding can share it."""

_WIDEST = {"bitmap": 2**31 - 1, "csr": 2**16}


def pick_encoding(name: str, columns: int) -> Operator:
    """The operator for a matrix so wide; `UsageError` for an unknown encoding. 16-bit columns have an end."""
    operator = choose("encoding", name, SPARSE)
    return operator if columns <= _WIDEST[name] else SPARSE["bitmap"]


def with_values(matrix: SparseMatrix, values: str) -> tuple[SparseMatrix, Tensor]:
    """``matrix`` with its values in a dtype of `VALUES`, and the scale of each row by which they are multiplied."""
    dtype = choose("dtype of values", values, VALUES)
    if dtype == torch.int8:
        return quantize_rows(matrix)
    return SparseMatrix(matrix.mask, matrix.values.to(dtype)), torch.ones(matrix.shape[0])
