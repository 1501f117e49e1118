"""What row budgets are worth on text that was not calibrated on, before and after weight updates, on real matrices.

The calibration file is cut in halves; each serves once to prune and once to measure. The error is |(V - W) X|^2 /
|W X|^2 on the measuring half, X being what the dense model feeds the layer, over all tokens. It says nothing of other
layers or of perplexity.

    python -m benchmarks.row_budgets --calibration FILE [--block 12] [--matrix NAME ...] [--sparsity S ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from trim_export.bench import Workload, machine
from trim_export.calibration import consecutive_windows, read_text, token_stream
from trim_export.forward import block_calls, choose_compute, embed, run_block
from trim_export.lagrangian import allocate
from trim_export.models import DenseModel, decoder_blocks, load_model, projections, quiet_transformers
from trim_export.report import table
from trim_export.row_budgets import ROW_BUDGETS, LayerView, RowBudget, RowPlan, keep_mask
from trim_export.scores import wanda
from trim_export.statistics import input_statistics
from trim_export.trim import EXACT, Policy, quality_of, row_cap
from trim_export.updates import UPDATES, LayerProblem, Support

WINDOWS, LENGTH = 128, 128
UPDATES_MEASURED = ("none", "refit", "admm")
RESULTS = Path(__file__).parent / "results" / "row_budgets.json"


def lagrangian_of_cosines(layer: LayerView, target: float, policy: Policy) -> RowPlan:
    """`trim_export.row_budgets.lagrangian` with one minus the row's cosine for its error."""
    rows, columns = layer.score.shape
    quality = quality_of(layer.curves)
    levels = range(row_cap(columns, target) + 1)
    errors = torch.stack([1 - quality(torch.full((rows,), level))[0] for level in levels], dim=1)
    return RowPlan(allocate(errors, round(target * rows * columns)))


BUDGETS: dict[str, RowBudget] = ROW_BUDGETS | {"lagrangian, 1 - cosine": RowBudget(lagrangian_of_cosines)}


def main() -> None:
    """Measure every budget with every update and print the means of both halves."""
    quiet_transformers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--matrix", nargs="+", default=["self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.7, 0.8])
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    dense = load_model("smollm2-135m")
    weights, inputs = observe(dense, options.calibration, options.block, options.matrix)
    rows = [
        {"matrix": name, "sparsity": sparsity, "half": half, "rows": rows, **errors}
        for name in options.matrix
        for half in (0, 1)
        for sparsity in options.sparsity
        for rows, errors in measure(weights[name], inputs[name][half], inputs[name][1 - half], sparsity).items()
    ]
    Console(width=120).print(
        table(
            f"held-out relative error, SmolLM2-135M block {options.block}, {WINDOWS} x {LENGTH} tokens of "
            f"{options.calibration.name}, mean of both halves",
            ("matrix", "sparsity", "rows", "row sparsities", *UPDATES_MEASURED),
            [
                (name, sparsity, budget, *summary(rows, name, sparsity, budget))
                for name in options.matrix
                for sparsity in options.sparsity
                for budget in BUDGETS
            ],
        )
    )
    about = machine(Workload(repeats=1))
    result = {"machine": about, "block": options.block, "calibration": options.calibration.name, "rows": rows}
    options.json.write_text(json.dumps(result, indent=2) + "\n")


def observe(
    dense: DenseModel, text: Path, block: int, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Weights of the layers, and their inputs ``[windows, tokens, columns]`` on both halves of the text."""
    stream = token_stream(read_text(str(text), 2 * WINDOWS * LENGTH), dense.tokenizer)
    halves = stream.split((len(stream) + 1) // 2)
    tokens = torch.cat([consecutive_windows(half, LENGTH, WINDOWS) for half in halves])
    compute = choose_compute("cpu", dense.model.dtype)
    modules = list(decoder_blocks(dense.model).values())[: block + 1]
    calls = block_calls(dense.model, modules, tokens[:1])
    hidden = embed(dense.model, modules, tokens)
    for module, call in zip(modules[:-1], calls[:-1], strict=True):
        hidden = run_block(module, call, hidden, compute)
    linears = {name: projections(modules[-1])[name] for name in names}
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].float()))
        for name, linear in linears.items()
    ]
    run_block(modules[-1], calls[-1], hidden, compute)
    for handle in handles:
        handle.remove()
    weights = {name: linear.weight.float() for name, linear in linears.items()}
    return weights, {name: list(torch.cat(batches).split(WINDOWS)) for name, batches in seen.items()}


def measure(weight: Tensor, calibration: Tensor, held_out: Tensor, sparsity: float) -> dict[str, dict[str, Any]]:
    """Of each budget the range of row sparsities, and the error with each update on both texts."""
    fitted, unseen = (own_outputs(weight, inputs) for inputs in (calibration, held_out))
    observed = input_statistics(calibration, "layer")
    layer = LayerView(weight, wanda(weight, observed), observed.last_tokens, fitted)
    found: dict[str, dict[str, Any]] = {}
    for name, budget in BUDGETS.items():
        plan = budget.allocate(layer, sparsity, EXACT)
        support = Support(keep_mask(layer.order, plan.pruned), by_row=name != "matrix")
        shares = plan.pruned.double() / weight.shape[1]
        found[name] = {"min": float(shares.min()), "max": float(shares.max()), "calibration": {}, "held_out": {}}
        for update in UPDATES_MEASURED:
            pruned = UPDATES[update](fitted, support).weight
            found[name]["calibration"][update] = fitted.loss(pruned)
            found[name]["held_out"][update] = unseen.loss(pruned)
    return found


def own_outputs(weight: Tensor, inputs: Tensor) -> LayerProblem:
    """The problem of a layer that shall give what its dense self gives on these inputs."""
    flat = inputs.flatten(0, 1)
    gram = flat.T @ flat
    return LayerProblem(weight, gram, weight @ gram)


def summary(rows: list[dict[str, Any]], matrix: str, sparsity: float, budget: str) -> list[str]:
    """The cells of one line of the table."""
    same = [row for row in rows if (row["matrix"], row["sparsity"], row["rows"]) == (matrix, sparsity, budget)]
    spread = f"{min(row['min'] for row in same):.2f} - {max(row['max'] for row in same):.2f}"
    return [spread, *(f"{statistics.mean(row['held_out'][update] for row in same):.4f}" for update in UPDATES_MEASURED)]


if __name__ == "__main__":
    with torch.no_grad():
        main()
