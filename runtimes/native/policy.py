"""Which form a matrix takes and who multiplies it, from what each way was measured to cost."""

from __future__ import annotations

import torch

from trim_export.runtimes.native.layout import Preference
from trim_export.runtimes.native.library import VALUE_TYPES, isa, required

__all__ = ["hardly_sparse", "preference"]

# Share of kept weights above which a row is faster as a bitmap. AVX-512 expands a bitmap in one instruction: from the
# costs of its parts (0.33 ns a listed weight, 0.04 to 0.06 ns a column), not yet measured as a whole. The others prefer
# slots or lists at any density (`python -m benchmarks.cpu_layers.forms`).
_BITMAP_DENSITY = {"avx512": {torch.float32: 0.15, torch.bfloat16: 0.1, torch.float16: 0.1, torch.int8: 0.1}}

# Sparsity below which a layer is multiplied dense. At 0.5, 4096 x 4096 and AVX2 (benchmarks/results/cpu_layers.json)
# one token is faster than with torch's dense product of the same dtype, 128 tokens are no slower with float32 and three
# times as fast with bfloat16. Less was not measured.
_BREAK_EVEN = {torch.float32: 0.4, torch.bfloat16: 0.5, torch.float16: 0.5, torch.int8: 0.3}


def preference(dtype: torch.dtype) -> Preference:
    """Forms in which values of ``dtype`` are multiplied fastest, with the instruction set in use."""
    return Preference(
        _BITMAP_DENSITY.get(isa(), {}).get(dtype, 1.0), required().trim_native_step_cost(VALUE_TYPES[dtype])
    )


def hardly_sparse(sparsity: float, dtype: torch.dtype) -> bool:
    """Whether a matrix is faster multiplied dense."""
    return sparsity < _BREAK_EVEN[dtype]
