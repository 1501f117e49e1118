"""ONNX files whose weights lie beside them: read one tensor at a time, written one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from torch import Tensor

from trim_export.errors import ArtifactError, first_line
from trim_export.storage import safe_file

__all__ = ["MODEL", "TYPES", "DataFile", "check_external", "read_model", "read_tensor", "reading"]

MODEL = "model.onnx"

TYPES = {
    torch.float32: (TensorProto.FLOAT, np.float32),
    torch.bfloat16: (TensorProto.BFLOAT16, np.int16),
    torch.float16: (TensorProto.FLOAT16, np.float16),
    torch.int8: (TensorProto.INT8, np.int8),
    torch.uint8: (TensorProto.UINT8, np.uint8),
    torch.uint16: (TensorProto.UINT16, np.uint16),
    torch.int32: (TensorProto.INT32, np.int32),
    torch.int64: (TensorProto.INT64, np.int64),
    torch.float64: (TensorProto.DOUBLE, np.float64),
    torch.bool: (TensorProto.BOOL, np.bool_),
}
"""ONNX's number for a dtype, and numpy's dtype or, where it has none, its integers of the same width."""

_KNOWN: dict[int, tuple[torch.dtype, Any]] = {number: (dtype, numpy) for dtype, (number, numpy) in TYPES.items()}

# Shapes and axes stay in the graph, where shape inference looks for them; weights begin where kernels may load vectors.
_INLINE_BYTES = 1024
_ALIGNMENT = 64


def read_model(path: Path) -> ModelProto:
    """The graph of an ONNX file without its weights; `ArtifactError` when it is none."""
    with reading(path):
        return onnx.load(path, load_external_data=False)


def read_tensor(folder: Path, tensor: TensorProto) -> Tensor:
    """An initializer of a model in ``folder``; of one beside the graph only what is used is read into memory.

    Raises:
        ArtifactError: a dtype that no weight has, or a file that is missing, too short or outside of the folder.
    """
    if tensor.data_type not in _KNOWN:
        raise ArtifactError(f"{tensor.name}: ONNX type {tensor.data_type} is none of a weight")
    dtype, numpy = _KNOWN[tensor.data_type]
    shape = tuple(tensor.dims)
    if uses_external_data(tensor):
        file, offset, size = _locate(folder, tensor)
        if size != math.prod(shape) * np.dtype(numpy).itemsize:
            raise ArtifactError(f"{file}: {tensor.name} has {size} bytes, which its shape {list(shape)} does not")
        array: NDArray[Any] = np.memmap(file, numpy, "c", offset, shape) if size else np.zeros(shape, numpy)
    elif tensor.data_type == TensorProto.BFLOAT16:
        array = np.frombuffer(bytearray(tensor.raw_data), np.int16).reshape(shape)
    else:
        array = np.array(onnx.numpy_helper.to_array(tensor))
    found = torch.from_numpy(array)
    return found.view(dtype) if dtype == torch.bfloat16 else found


def check_external(model: ModelProto, folder: Path) -> None:
    """Refuse (`ArtifactError`) initializers outside of ``folder`` or beyond the end of their file."""
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            _locate(folder, tensor)


def _locate(folder: Path, tensor: TensorProto) -> tuple[Path, int, int]:
    """File, offset and bytes of an initializer beside its graph."""
    with reading(folder):
        info = ExternalDataInfo(tensor)
    file = safe_file(folder, info.location)
    offset = info.offset or 0
    size = file.stat().st_size - offset if info.length is None else info.length
    if offset < 0 or size < 0 or offset + size > file.stat().st_size:
        raise ArtifactError(f"{file}: {tensor.name} lies beyond its end")
    return file, offset, size


class DataFile:
    """The file of weights beside a graph that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> DataFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> TensorProto:
        """Append a tensor; returns the initializer that refers to it, or that holds it if it is small."""
        number, numpy = TYPES[tensor.dtype]
        plain = tensor.detach().contiguous()
        bits = plain.view(torch.int16) if tensor.dtype == torch.bfloat16 else plain
        array: NDArray[Any] = bits.numpy().astype(numpy, copy=False)
        made = TensorProto(name=name, data_type=number, dims=tensor.shape)
        if array.nbytes < _INLINE_BYTES:
            made.raw_data = array.tobytes()
            return made
        begin = self._file.tell() + -self._file.tell() % _ALIGNMENT
        self._file.seek(begin)
        array.reshape(-1).tofile(self._file)
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", begin), ("length", array.nbytes)):
            made.external_data.add(key=key, value=str(value))
        return made


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what onnx raises over a file that it cannot read into one line of ours."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # protobuf answers damage with many exceptions
        raise ArtifactError(f"{path}: not readable as ONNX ({first_line(error)})") from error
