"""Every launch against float64, on the device named first: run by `test_numerics`, on the CPU with an interpreter.

Prints one JSON object: the relative error of each case, and whether expansion gave every bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from trim_export.converters import G8, InterleavedCsr, SparseMatrix
from trim_export.runtimes.triton.launch import Packed, by_expanding, by_gathering, by_gathering_few

SHAPES = ((9, 37), (5, 1300))
PARTS = (1, 4)
TOKENS = (2, 5, 16)


def row_variable(rows: int, columns: int, dtype: torch.dtype, seed: int) -> SparseMatrix:
    """Rows of 0 to 100 % sparsity, both ends included, and some kept zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(rows, 1, generator=generator)
    density[0], density[-1] = 0, 1
    mask = torch.rand(rows, columns, generator=generator) < density
    values = torch.randn(int(mask.sum()), generator=generator)
    values[::11], values[5::11] = 0.0, -0.0
    return SparseMatrix(mask, values.to(dtype))


def packed(matrix: SparseMatrix, encoding: G8 | InterleavedCsr, device: str) -> Packed:
    parts = encoding.encode(matrix)
    ptr, index, *gaps, values = (parts[name].to(device) for name in encoding.tensors)
    order = matrix.row_counts.argsort(descending=True).to(torch.int32).to(device)
    return Packed(order, ptr, index, gaps[0] if gaps else None, values, matrix.shape[1])


def results(device: str) -> Iterator[tuple[str, float]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for encoding in (G8(), InterleavedCsr()):
            for seed, shape in enumerate(SHAPES):
                matrix = row_variable(*shape, dtype, seed)
                rows = packed(matrix, encoding, device)
                case = f"{encoding.name} {str(dtype)[6:]} {shape[0]}x{shape[1]}"
                generator = torch.Generator().manual_seed(seed)
                for tokens, parts in [(1, parts) for parts in PARTS] + [(tokens, 0) for tokens in TOKENS]:
                    # Inputs that carry the dtype's bits in float32, so that what is measured is the sum.
                    inputs = torch.randn(tokens, shape[1], generator=generator).to(dtype).float()
                    exact = inputs.double() @ matrix.to_dense().double().T
                    there = inputs.to(device)
                    given = by_gathering(rows, there, parts) if parts else by_gathering_few(rows, there)
                    error = (given.cpu().double() - exact).norm() / exact.norm()
                    yield f"{case}, {tokens} tokens, {parts} parts", float(error)
                # A product with the identity gives back the weight that was made.
                given = by_expanding(rows, torch.eye(shape[1], dtype=dtype, device=device)).cpu().t()
                yield f"{case}, expanded", float(not torch.equal(given, matrix.to_dense()))


if __name__ == "__main__":
    print(json.dumps(dict(results(sys.argv[1]))))
