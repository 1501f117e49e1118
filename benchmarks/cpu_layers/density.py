"""Up to which density a row is faster as a list of columns: what `trim_export.runtimes.native.policy` holds.

python -m benchmarks.cpu_layers.density
"""

from __future__ import annotations

import copy
import random
import statistics
import time

import torch
from rich.console import Console

from benchmarks.cpu_layers.shapes import Shape, random_matrix
from trim_export.converters import SparseMatrix
from trim_export.converters.int8 import quantize_rows
from trim_export.report import table
from trim_export.runtimes.native import NativeMatrix, lay_out

DENSITIES = (0.0, 0.25, 0.35, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
ROUNDS, COPIES = 12, 3


def main() -> None:
    """Time one token through 2048 x 4096 with rows up to each density as lists; medians."""
    shape = Shape("", 2048, 4096)
    for sparsity in (0.5, 0.7, 0.85):
        matrix = random_matrix(shape, sparsity)
        rows = []
        for threads in dict.fromkeys((1, torch.get_num_threads())):
            for dtype in DTYPES:
                rows.append((str(threads), str(dtype).removeprefix("torch."), *_medians(matrix, dtype, threads)))
        heads = ("threads", "values", *(f"lists to {density}" for density in DENSITIES))
        Console().print(table(f"ms a token, sparsity {sparsity}", heads, rows))


def _medians(matrix: SparseMatrix, dtype: torch.dtype, threads: int) -> list[str]:
    values, scales = (
        quantize_rows(matrix) if dtype == torch.int8 else (SparseMatrix(matrix.mask, matrix.values.to(dtype)), None)
    )
    made: dict[float, list[NativeMatrix]] = {}
    for density in DENSITIES:
        first = lay_out(values, scales, density)
        made[density] = [first, *(copy.deepcopy(first) for _ in range(COPIES - 1))]
    spent: dict[float, list[float]] = {density: [] for density in DENSITIES}
    inputs, shuffled = torch.randn(1, matrix.shape[1]), random.Random(0)
    for round_ in range(ROUNDS):
        for density in shuffled.sample(DENSITIES, len(DENSITIES)):
            begin = time.perf_counter()
            made[density][round_ % COPIES].multiply(inputs, threads)
            spent[density].append((time.perf_counter() - begin) * 1e3)
    return [f"{statistics.median(spent[density]):.2f}" for density in DENSITIES]


if __name__ == "__main__":
    main()
