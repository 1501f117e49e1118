"""Our own CPU kernels: a small C++ library (``trim_native.h``), and what makes it a runtime."""

from trim_export.runtimes.native.linear import MaskedLinear, NativeLinear, NativeRuntime, sparse_linear

__all__ = ["MaskedLinear", "NativeLinear", "NativeRuntime", "sparse_linear"]
