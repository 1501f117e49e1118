"""Execution: from stored bytes to ``y = W x``. Importing this package registers our loader with transformers."""

from trim_export.runtimes.linear import Layout, Runtime, SparseLinear, tensor_bytes
from trim_export.runtimes.transformers import LM_HEADS, RUNTIMES, VALUES, available_runtimes, load, pick_runtime

__all__ = [
    "LM_HEADS",
    "RUNTIMES",
    "VALUES",
    "Layout",
    "Runtime",
    "SparseLinear",
    "available_runtimes",
    "load",
    "pick_runtime",
    "tensor_bytes",
]
