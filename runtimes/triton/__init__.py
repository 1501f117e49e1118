"""Our own GPU kernels, in Triton: batch-1 and small-batch products of weights as they lie, and prefill by expansion."""

from trim_export.runtimes.triton.linear import PackedRows, TritonLinear, TritonRuntime, join_siblings
from trim_export.runtimes.triton.operators import grouped_linear

__all__ = ["PackedRows", "TritonLinear", "TritonRuntime", "grouped_linear", "join_siblings"]
