"""From a layer budget to the sparsity of every matrix: measure the dense model, then allocate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trim_export.forward import BlockCall, Compute
from trim_export.layer_budgets import LayerBudget, Uniform, recentre
from trim_export.models import projections
from trim_export.progress import Track
from trim_export.prune_block import require_finite_weight
from trim_export.recipe import Recipe
from trim_export.statistics import InputStatistics, observe_block
from trim_export.trim import ROW_CAP

__all__ = ["layer_sparsities"]

LEAST_TOKENS = 4096
"""How much text scores are measured on at least, if there is as much."""


def layer_sparsities(
    budget: LayerBudget,
    recipe: Recipe,
    blocks: Mapping[str, nn.Module],
    calls: Sequence[BlockCall],
    hidden: Tensor,
    compute: Compute,
    track: Track[Any],
) -> list[dict[str, float]]:
    """Sparsity of each matrix of each block, by the layers' names inside the block; runs the dense model only if asked.

    Their mean over all weights is the recipe's sparsity and none is above the cap on rows. Only the paper's counts take
    sparsities as published, where these are possible at all; that mean may be off where blocks differ in size.

    Raises:
        ModelError: weights or inputs that are not finite, naming block and layer.
    """
    if isinstance(budget, Uniform):
        return [dict.fromkeys(projections(block), recipe.sparsity) for block in blocks.values()]
    if not budget.needs_grams and recipe.counts != "paper":
        # Shares and means of scores settle soon; measuring all of the text would take half as long as pruning.
        hidden = hidden[: max(len(hidden) // 4, -(-LEAST_TOKENS // hidden.shape[1]))]
    parts: list[tuple[int, list[str]]] = []  # which block, and which of its matrices
    measures, sizes = [], []
    measured = track(list(blocks.items()), f"measuring for {budget.name}")
    for index, ((name, block), call) in enumerate(zip(measured, calls, strict=True)):
        block.to(compute.device)
        linears = projections(block)
        for path, linear in linears.items():
            require_finite_weight(linear, f"{name}.{path}")
        inputs: dict[str, InputStatistics] = {}
        if budget.needs_inputs:
            inputs, hidden = observe_block(block, linears, call, hidden, compute, name, budget.needs_grams)
        of_block = [[path] for path in linears] if budget.by_projection else [list(linears)]
        for part in filter(None, of_block):  # a block without matrices has no part
            weights = {path: linears[path].weight.float() for path in part}
            parts.append((index, part))
            measures.append(budget.measure(weights, inputs))
            sizes.append(sum(weight.numel() for weight in weights.values()))
        block.to("cpu")
    allocated = budget.allocate(measures, sizes, recipe.sparsity)
    as_published = recipe.counts == "paper" and all(0 <= sparsity < 1 for sparsity in allocated)
    if not as_published:
        allocated = recentre(allocated, sizes, recipe.sparsity, max(ROW_CAP, recipe.sparsity))
    sparsities: list[dict[str, float]] = [{} for _ in blocks]
    for (index, part), sparsity in zip(parts, allocated, strict=True):
        sparsities[index] |= dict.fromkeys(part, sparsity)
    return sparsities
