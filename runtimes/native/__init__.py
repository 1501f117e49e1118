"""Our own CPU kernels: a small C++ library (``trim_native.h``), and what makes it a runtime."""

from trim_export.runtimes.native.dense import DenseLinear, QuantizedEmbedding, QuantizedLinear
from trim_export.runtimes.native.fused import FusedLinear, fuse
from trim_export.runtimes.native.head import quantize_head
from trim_export.runtimes.native.layout import Preference, lay_out
from trim_export.runtimes.native.linear import MaskedLinear, NativeLinear, sparse_linear
from trim_export.runtimes.native.matrix import NativeMatrix
from trim_export.runtimes.native.runtime import NativeRuntime

__all__ = [
    "DenseLinear",
    "FusedLinear",
    "MaskedLinear",
    "NativeLinear",
    "NativeMatrix",
    "NativeRuntime",
    "Preference",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "fuse",
    "lay_out",
    "quantize_head",
    "sparse_linear",
]
