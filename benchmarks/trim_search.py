"""TRIM's row search by look-up against the published loop, on the same matrices of the real model.

The loop (`tests/oracles/trim_literal.py`) masks the weight and multiplies it with the inputs at every step, as the
paper's code does. Both start from weights sorted by importance, which pruning needs in any case; the curves are part
of our time. Rounds are interleaved.

    python -m benchmarks.trim_search [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.oracles.trim_literal import literal_search
from trim_export.bench import Workload, machine
from trim_export.calibration import calibration_windows
from trim_export.curves import curves, native_available
from trim_export.forward import block_calls, choose_compute, embed, run_block
from trim_export.models import decoder_blocks, load_model, projections, quiet_transformers
from trim_export.report import table
from trim_export.scores import wanda
from trim_export.statistics import collect_inputs
from trim_export.trim import PAPER, trim_search

BLOCK = 2
SPARSITIES = (0.7, 0.8)


def main() -> None:
    """Measure every projection of one block at two sparsities and print the table."""
    quiet_transformers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(*case, options.rounds) for case in cases()]
    total = {
        "matrix": "whole block",
        "sparsity": "",
        "loop_ms": sum(row["loop_ms"] for row in rows),
        "curves_ms": sum(row["curves_ms"] for row in rows),
        "identical": all(row["identical"] for row in rows),
        "rows_off_by_one": sum(row["rows_off_by_one"] for row in rows),
    }
    Console().print(
        table(
            f"TRIM search, SmolLM2-135M block {BLOCK}, {options.rounds} interleaved rounds, medians",
            ("matrix", "sparsity", "loop ms", "curves ms", "ratio", "same rate", "rows off"),
            [
                (
                    row["matrix"],
                    row["sparsity"],
                    f"{row['loop_ms']:.0f}",
                    f"{row['curves_ms']:.0f}",
                    f"{row['loop_ms'] / row['curves_ms']:.1f}x",
                    "yes" if row["identical"] else "NO",
                    row["rows_off_by_one"],
                )
                for row in [*rows, total]
            ],
        )
    )
    if options.json:
        about = machine(Workload(repeats=options.rounds)) | {"native_curves": native_available()}
        options.json.write_text(json.dumps({"machine": about, "rows": [*rows, total]}, indent=2) + "\n")


def cases() -> list[tuple[str, float, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(matrix, sparsity, weight, order, inputs) for each projection, on the model's own text."""
    dense = load_model("smollm2-135m")
    blocks = decoder_blocks(dense.model)
    modules = list(blocks.values())
    tokens = calibration_windows("self", dense.model, dense.tokenizer, 128, 64, seed=0)
    compute = choose_compute("cpu", dense.model.dtype)
    calls = block_calls(dense.model, modules, tokens[:1])
    hidden = embed(dense.model, modules, tokens)
    for index in range(BLOCK):
        hidden = run_block(modules[index], calls[index], hidden, compute)
    block, linears = modules[BLOCK], projections(modules[BLOCK])
    inputs = collect_inputs(block, linears, lambda: run_block(block, calls[BLOCK], hidden, compute), f"block {BLOCK}")
    return [
        (
            name,
            sparsity,
            linear.weight,
            wanda(linear.weight, inputs[name]).argsort(dim=1, stable=True),
            inputs[name].last_tokens,
        )
        for name, linear in linears.items()
        for sparsity in SPARSITIES
    ]


def measure(
    name: str, sparsity: float, weight: torch.Tensor, order: torch.Tensor, inputs: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """Time both on one case, in turn."""

    def look_up() -> Any:
        return trim_search(curves(weight, order, inputs), sparsity, PAPER)

    def loop() -> Any:
        return literal_search(weight, order, inputs, sparsity)

    spent: dict[str, list[float]] = {"loop": [], "curves": []}
    results: dict[str, Any] = {}
    contestants: list[tuple[str, Callable[[], Any]]] = [("loop", loop), ("curves", look_up)]
    for _ in range(rounds):
        for key, run in contestants:
            begin = time.perf_counter()
            results[key] = run()
            spent[key].append((time.perf_counter() - begin) * 1000)
    difference = (results["curves"].pruned - results["loop"].pruned).abs()
    return {
        "matrix": name,
        "sparsity": sparsity,
        "loop_ms": statistics.median(spent["loop"]),
        "curves_ms": statistics.median(spent["curves"]),
        "identical": results["curves"].learning_rate == results["loop"].learning_rate and int(difference.max()) <= 1,
        "rows_off_by_one": int((difference == 1).sum()),
    }


if __name__ == "__main__":
    with torch.no_grad():
        main()
