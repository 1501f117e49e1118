"""Which form a matrix takes and who multiplies it, from what each way was measured to cost."""

from __future__ import annotations

import torch

from trim_export.runtimes.native.library import isa

__all__ = ["hardly_sparse", "list_density"]

# Up to which share of kept weights a row is faster as a list of columns than as a bitmap.
# AVX2: `python -m benchmarks.cpu_layers.density` on Zen 4; a list of float32 is faster at every density, but takes more
# memory than a bitmap. AVX-512 expands a bitmap in one instruction: from the costs of its parts (0.33 ns a listed
# weight, 0.04 to 0.06 ns a column), not yet measured as a whole. Portable: a bitmap is never faster.
_LIST_DENSITY = {
    "avx2": {torch.float32: 0.75, torch.bfloat16: 0.35, torch.float16: 0.35, torch.int8: 0.3},
    "avx512": {torch.float32: 0.15, torch.bfloat16: 0.1, torch.float16: 0.1, torch.int8: 0.1},
    "portable": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16, torch.int8), 1.0),
}

# Sparsity below which a layer is multiplied dense. At 0.5, 4096 x 4096 and AVX2 (benchmarks/results/cpu_layers.json)
# one token is 1.5 times as fast as dense float32, and 128 tokens are no slower; of 16-bit values one token is up to a
# third slower than dense bfloat16, and 128 tokens three times as fast.
_BREAK_EVEN = {torch.float32: 0.4, torch.bfloat16: 0.5, torch.float16: 0.5, torch.int8: 0.3}


def list_density(dtype: torch.dtype) -> float:
    """Share of kept weights up to which a row of values of ``dtype`` is faster as a list of columns."""
    return _LIST_DENSITY[isa()][dtype]


def hardly_sparse(sparsity: float, dtype: torch.dtype) -> bool:
    """Whether a matrix is faster multiplied dense."""
    return sparsity < _BREAK_EVEN[dtype]
