"""Layer by layer on a GPU: our kernels against cuBLAS, torch's CSR (cuSPARSE) and int4, for shapes of real models.

    python -m benchmarks.gpu_layers [--json FILE] [--tune]

Needs a CUDA device; how times are taken says `trim_export.runtimes.triton.timing`. ``--tune`` writes what was measured
to be best over all these shapes into the table that the runtime reads; ``trim-export bench --tune`` does so for the
layers of one artifact.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_plot import plot
from trim_export.converters import SparseMatrix
from trim_export.cuda import driver_facts
from trim_export.errors import EnvironmentLacks
from trim_export.runtimes import Layout
from trim_export.runtimes.torch_sparse import TorchSparseLinear
from trim_export.runtimes.triton import PackedRows, TritonRuntime
from trim_export.runtimes.triton.launch import Packed
from trim_export.runtimes.triton.timing import Product, best_choice, gpu_times, products
from trim_export.runtimes.triton.tuning import table_path, write_choice

__all__ = ["main", "sweep"]

SHAPES = {
    "Llama-2-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-2-13B": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "Qwen2.5-14B": ((1024, 5120), (13824, 5120), (5120, 13824)),
}
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
TOKENS = (1, 2, 4, 8, 16, 512)
INT4 = "torch int4"
"""Has random weights of its own, so an error of it would mean nothing."""
_INT4_GROUP = 128


def sweep(device: torch.device) -> list[dict[str, Any]]:
    """One row for each shape, sparsity, number of tokens and contestant, with times and errors.

    Errors are relative to the product of the same weights in float64.
    """
    rows = []
    for model, shapes in SHAPES.items():
        for shape in shapes:
            for sparsity in SPARSITIES:
                matrix = _random(shape, sparsity)
                packed = PackedRows.pack(matrix, device).tensors()
                for tokens in TOKENS:
                    inputs = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
                    exact = inputs.double() @ matrix.to_dense().to(device).double().T
                    entries = contestants(matrix, packed, inputs)
                    times = gpu_times(entries, device)
                    for name, product in entries.items():
                        error = float((product().double() - exact).norm() / exact.norm()) if name != INT4 else None
                        rows.append(
                            {
                                "model": model,
                                "shape": list(shape),
                                "sparsity": sparsity,
                                "tokens": tokens,
                                "contestant": name,
                                "median_us": statistics.median(times[name]) * 1e3,
                                "min_us": min(times[name]) * 1e3,
                                "ratio_to_cublas": statistics.median(times["cublas"]) / statistics.median(times[name]),
                                "relative_error": error,
                            }
                        )
    return rows


def contestants(matrix: SparseMatrix, packed: Packed, inputs: Tensor) -> dict[str, Product]:
    """Products of ``inputs`` with the same weights, by name; the first is dense."""
    weight = matrix.to_dense().to(inputs.device)
    csr = TorchSparseLinear(matrix, None, Layout(inputs.device))
    found: dict[str, Product] = {
        "cublas": lambda: torch.nn.functional.linear(inputs, weight),
        "torch csr": lambda: csr(inputs),
    } | products(packed, inputs)
    int4 = _int4(weight, inputs)
    return found | ({INT4: int4} if int4 else {})


def main() -> None:
    """Measure, print a line for each row, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine and rows to this file, and a plot beside it")
    parser.add_argument("--tune", action="store_true", help="write the best choice for this GPU to the runtime's table")
    options = parser.parse_args()
    reason = TritonRuntime().unavailable()
    if reason:
        raise SystemExit(str(EnvironmentLacks(f"this benchmark needs the runtime triton: {reason}")))
    device = torch.device("cuda", torch.cuda.current_device())
    rows = sweep(device)
    for row in rows:
        print(
            "{model:12s} {shape!s:14s} {sparsity:.0%} {tokens:4d} tokens  {contestant:14s} {median_us:9.1f} us  "
            "{ratio_to_cublas:5.2f}x cuBLAS  error {relative_error}".format(**row)
        )
    if options.json:
        about = machine(device)
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        print(plot(rows, about, options.json.with_suffix(".svg")))
    if options.tune:
        choice = best_choice((row["tokens"], row["contestant"], row["median_us"]) for row in rows)
        write_choice(table_path(), torch.cuda.get_device_name(device), choice)
        print(f"{choice} written to {table_path()}")


def machine(device: torch.device) -> dict[str, Any]:
    """What the times were measured on: card, driver, clocks and versions."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device),
        **driver_facts(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _int4(weight: Tensor, inputs: Tensor) -> Product | None:
    """torch's weight-only int4 product of random weights of this shape; None where torch has none."""
    try:
        codes = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 2), device=weight.device, dtype=torch.uint8)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        groups = weight.shape[1] // _INT4_GROUP
        scales = torch.ones(groups, weight.shape[0], 2, device=weight.device, dtype=torch.bfloat16)
        torch._weight_int4pack_mm(inputs, packed, _INT4_GROUP, scales)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return lambda: torch._weight_int4pack_mm(inputs, packed, _INT4_GROUP, scales)


def _random(shape: tuple[int, int], sparsity: float) -> SparseMatrix:
    """Random places, rows up to 15 points around the sparsity, as TRIM leaves them."""
    generator = torch.Generator().manual_seed(0)
    rows = (sparsity + 0.3 * (torch.rand(shape[0], 1, generator=generator) - 0.5)).clamp(0, 1)
    mask = torch.rand(shape, generator=generator) >= rows
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator).to(torch.bfloat16))


if __name__ == "__main__":
    main()
