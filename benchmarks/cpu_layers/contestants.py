"""Who multiplies: each makes from one matrix a function of a batch of tokens."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from trim_export.converters import SparseMatrix
from trim_export.runtimes.linear import Layout
from trim_export.runtimes.native import NativeLinear, NativeRuntime

__all__ = ["CONTESTANTS", "Contestant", "Layer", "share_threads"]

CPU = Layout(torch.device("cpu"))
BLOCK = 32  # weights that share a scale in onnxruntime's 4- and 8-bit matrices


@dataclass(frozen=True)
class Layer:
    """One copy of a layer's weights, ready to multiply.

    Attributes:
        multiply: float32 ``[tokens, columns]`` to whatever the contestant gives.
        nbytes: of the weights.
    """

    multiply: Callable[[Tensor], Any]
    nbytes: int


@dataclass(frozen=True)
class Contestant:
    """A way to multiply, on so many threads or (None) as `share_threads` says; without ``needs`` it is left out."""

    name: str
    make: Callable[[SparseMatrix, int | None], Layer]
    needs: str | None = None

    def is_here(self) -> bool:
        """Whether what it needs is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _dense(dtype: torch.dtype) -> Callable[[SparseMatrix, int | None], Layer]:
    def make(matrix: SparseMatrix, _: int | None) -> Layer:
        weight = matrix.to_dense().to(dtype)
        return Layer(lambda x: linear(x.to(dtype), weight), _size(weight))

    return make


def _torch_csr(matrix: SparseMatrix, _: int | None) -> Layer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = matrix.to_dense().to_sparse_csr()
        rows, columns, values = found.crow_indices().int(), found.col_indices().int(), found.values()
        weight = torch.sparse_csr_tensor(rows, columns, values, found.shape, check_invariants=False)

    def multiply(x: Tensor) -> Tensor:
        return weight @ x[0] if len(x) == 1 else weight @ x.T

    return Layer(multiply, _size(rows, columns, values))


def _scipy(matrix: SparseMatrix, _: int | None) -> Layer:
    from scipy.sparse import csr_matrix

    weight = csr_matrix(matrix.to_dense().numpy())
    nbytes = weight.data.nbytes + weight.indices.nbytes + weight.indptr.nbytes
    return Layer(lambda x: weight @ x.numpy().T, nbytes)


def _native(dtype: torch.dtype) -> Callable[[SparseMatrix, int | None], Layer]:
    def make(matrix: SparseMatrix, _: int | None) -> Layer:
        layer = NativeLinear(matrix, None, replace(CPU, values=dtype))
        return Layer(layer, _size(*layer.buffers()))

    return make


def _auto(matrix: SparseMatrix, _: int | None) -> Layer:
    layer = NativeRuntime().linear(matrix, None, CPU)
    return Layer(layer, _size(*layer.buffers()))


def _onnxruntime(bits: int | None) -> Callable[[SparseMatrix, int | None], Layer]:
    """A model of one product: MatMul, or MatMulNBits with 32 weights a scale and 8-bit activations inside."""

    def make(matrix: SparseMatrix, threads: int | None) -> Layer:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        rows, columns = matrix.shape
        dense = matrix.to_dense().numpy()
        if bits is None:
            weights = [numpy_helper.from_array(np.ascontiguousarray(dense.T), "w")]
            node = helper.make_node("MatMul", ["x", "w"], ["y"])
        else:
            packed, scales = _blockwise(dense, bits)
            weights = [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")]
            node = helper.make_node(
                "MatMulNBits",
                ["x", "w", "s"],
                ["y"],
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=bits,
                block_size=BLOCK,
                accuracy_level=4,
            )
        ends = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", size])]
            for name, size in (("x", columns), ("y", rows))
        ]
        graph = helper.make_graph([node], "layer", *ends, weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        if threads is None:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        nbytes = sum(len(weight.raw_data) for weight in weights)
        return Layer(lambda x: session.run(None, {"x": x.numpy()}), nbytes)

    return make


def share_threads(threads: int) -> None:
    """Let all sessions of this process, one for each copy of the weights, use the same threads, as one model would.

    From then on onnxruntime makes no others here.
    """
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _blockwise(dense: Any, bits: int) -> tuple[Any, Any]:
    """Weights of ``bits`` as MatMulNBits wants them: symmetric, a float32 scale for each 32 columns of a row."""
    rows, columns = dense.shape
    blocks = dense.reshape(rows, columns // BLOCK, BLOCK)
    half = 2 ** (bits - 1)
    scales = np.abs(blocks).max(axis=2).astype(np.float32) / (half - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.nan_to_num(np.rint(blocks / scales[..., None])) + half
    codes = steps.astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return np.ascontiguousarray(codes), scales.reshape(-1)


CONTESTANTS = (
    Contestant("torch dense float32", _dense(torch.float32)),
    Contestant("torch dense bfloat16", _dense(torch.bfloat16)),
    Contestant("torch CSR float32", _torch_csr),
    Contestant("scipy CSR float32", _scipy),
    Contestant("onnxruntime dense float32", _onnxruntime(None), "onnxruntime"),
    Contestant("onnxruntime 8 bits", _onnxruntime(8), "onnxruntime"),
    Contestant("onnxruntime 4 bits", _onnxruntime(4), "onnxruntime"),
    Contestant("native auto", _auto),
    Contestant("native float32", _native(torch.float32)),
    Contestant("native bfloat16", _native(torch.bfloat16)),
    Contestant("native int8", _native(torch.int8)),
)
"""In the order of the tables."""
