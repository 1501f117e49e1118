"""Which form of a matrix is fastest: what `trim_native_step_cost` and `trim_export.runtimes.native.policy` hold.

python -m benchmarks.cpu_layers.forms
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time

import torch
from rich.console import Console

from benchmarks.cpu_layers.shapes import Shape, random_matrix
from trim_export.converters import SparseMatrix
from trim_export.converters.int8 import quantize_rows
from trim_export.report import table
from trim_export.runtimes.native import NativeMatrix, Preference, lay_out

FORMS = {
    "bitmap": Preference(-1.0, math.inf),
    "lists": Preference(1.0, math.inf),
    **{f"slots, step {cost}": Preference(1.0, float(cost)) for cost in (6, 9, 12, 16, 24)},
}
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
ROUNDS, COPIES = 12, 3


def main() -> None:
    """Time one token through 2048 x 4096 in each form; medians."""
    shape = Shape("", 2048, 4096)
    for sparsity in (0.5, 0.7, 0.85):
        matrix = random_matrix(shape, sparsity)
        rows = []
        for threads in dict.fromkeys((1, torch.get_num_threads())):
            for dtype in DTYPES:
                rows.append((str(threads), str(dtype).removeprefix("torch."), *_medians(matrix, dtype, threads)))
        heads = ("threads", "values", *FORMS)
        Console().print(table(f"ms a token, sparsity {sparsity}", heads, rows))


def _medians(matrix: SparseMatrix, dtype: torch.dtype, threads: int) -> list[str]:
    values, scales = (
        quantize_rows(matrix) if dtype == torch.int8 else (SparseMatrix(matrix.mask, matrix.values.to(dtype)), None)
    )
    made: dict[str, list[NativeMatrix]] = {}
    for name, form in FORMS.items():
        first = lay_out(values, scales, form)
        made[name] = [first, *(copy.deepcopy(first) for _ in range(COPIES - 1))]
    spent: dict[str, list[float]] = {name: [] for name in FORMS}
    inputs, shuffled = torch.randn(1, matrix.shape[1]), random.Random(0)
    for round_ in range(ROUNDS):
        for name in shuffled.sample(list(FORMS), len(FORMS)):
            begin = time.perf_counter()
            made[name][round_ % COPIES].multiply(inputs, threads)
            spent[name].append((time.perf_counter() - begin) * 1e3)
    return [f"{statistics.median(spent[name]):.2f}" for name in FORMS]


if __name__ == "__main__":
    main()
