"""How long pruning takes with each recipe, on the first blocks of the real model, interleaved in one process.

python -m benchmarks.prune_time [--blocks 8] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from trim_export.bench import Workload, machine
from trim_export.calibration import calibration_windows
from trim_export.forward import choose_compute
from trim_export.models import DenseModel, load_model, quiet_transformers
from trim_export.prune import prune
from trim_export.recipe import Recipe, make_recipe
from trim_export.report import table

SPARSITY = 0.8
CONTESTANTS: dict[str, Recipe] = {
    "uniform rows, mask only": make_recipe("best", SPARSITY, rows="uniform", update="none"),
    "TRIM rows, mask only": make_recipe("best", SPARSITY, rows="trim", update="none"),
    "TRIM as published": make_recipe("paper", SPARSITY),
    "fast (refit)": make_recipe("fast", SPARSITY),
    "best (ADMM)": make_recipe("best", SPARSITY),
}


def main() -> None:
    """Prune a shortened SmolLM2-135M with every recipe in turn and print the table."""
    quiet_transformers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dense = shortened(options.blocks)
    # Text drawn at the protocol's size; what it says does not matter for the time.
    tokens = calibration_windows("self", dense.model, dense.tokenizer, 128, 128, seed=0)
    spent: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for name, recipe in CONTESTANTS.items():
            spent[name].append(seconds(dense, recipe, tokens))
    base = statistics.median(spent["uniform rows, mask only"])
    rows: list[dict[str, Any]] = [
        {"recipe": name, "median_s": statistics.median(times), "min_s": min(times),
         "ratio_to_uniform": statistics.median(times) / base}
        for name, times in spent.items()
    ]  # fmt: skip
    Console().print(
        table(
            f"pruning {options.blocks} blocks of SmolLM2-135M, 128 x 128 tokens, {options.rounds} interleaved rounds",
            ("recipe", "median s", "min s", "x uniform"),
            [
                (row["recipe"], f"{row['median_s']:.1f}", f"{row['min_s']:.1f}", f"{row['ratio_to_uniform']:.2f}")
                for row in rows
            ],
        )
    )
    if options.json:
        about = machine(Workload(repeats=options.rounds))
        options.json.write_text(json.dumps({"machine": about, "blocks": options.blocks, "rows": rows}, indent=2) + "\n")


def shortened(blocks: int) -> DenseModel:
    """SmolLM2-135M with its first blocks only."""
    dense = load_model("smollm2-135m")
    model: Any = dense.model
    model.model.layers = nn.ModuleList(list(model.model.layers)[:blocks])
    model.config.num_hidden_layers = blocks
    return dense


def seconds(dense: DenseModel, recipe: Recipe, tokens: Any) -> float:
    """Time one run on a fresh copy of the model."""
    fresh = DenseModel(copy.deepcopy(dense.model), dense.tokenizer, dense.source, dense.sha256)
    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter()
        prune(fresh, recipe, tokens, Path(directory) / "a", choose_compute("cpu", fresh.model.dtype))
        return time.perf_counter() - begin


if __name__ == "__main__":
    main()
