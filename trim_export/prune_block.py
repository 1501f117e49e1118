"""Pruning the matrices of one decoder block, in place.

`mask_block` is the published procedure: every layer is scored on the inputs that the block's dense weights produce,
and kept weights stay what they are. `update_block` visits the layers in the order of their calls instead, so that each
is fitted to the inputs that the already pruned layers before it produce, towards what the dense model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.converters import SparseMatrix
from trim_export.errors import ModelError
from trim_export.forward import BlockCall, Compute, run_block
from trim_export.models import projections
from trim_export.patterns import parse_pattern
from trim_export.recipe import Recipe
from trim_export.row_budgets import ROW_BUDGETS, LayerView, uniform
from trim_export.scores import SCORES
from trim_export.statistics import InputStatistics, observe_block, require_all_seen
from trim_export.streams import PrunedStream, observe_dense
from trim_export.updates import UPDATES, LayerProblem, Support

__all__ = ["PrunedBlock", "mask_block", "output_cosine", "prune_matrix", "require_finite_weight", "update_block"]

HISTOGRAM_BINS = 20

PrunedBlock = tuple[dict[str, SparseMatrix], dict[str, dict[str, Any]]]
"""By the layers' names inside the block: what is kept of each, and its entry in the manifest."""


def mask_block(
    name: str,
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    gradients: Mapping[str, Tensor],
    sparsities: Mapping[str, float],
    recipe: Recipe,
    compute: Compute,
) -> tuple[PrunedBlock, Tensor]:
    """Score and mask every layer of a block on the inputs it has while the whole block is dense.

    Args:
        name: of the block, for messages.
        block: its layers' weights are replaced.
        call: how the block is called.
        hidden: what the pruned model feeds it, ``[windows, tokens, features]``.
        gradients: of its layers (`trim_export.gradients`); empty if the score needs none.
        sparsities: of each matrix in it, by the layer's name inside the block.
        recipe: scores and row budgets.
        compute: where the forward runs.

    Returns:
        The pruned block, and its output.
    """
    linears = _finite_projections(name, block)
    inputs, _ = observe_block(block, linears, call, hidden, compute, name)
    pruned, reports = {}, {}
    for path, linear in linears.items():
        pruned[path], reports[path] = prune_matrix(
            linear.weight.data, inputs[path], sparsities[path], recipe, gradients.get(path)
        )
        linear.weight.data = pruned[path].to_dense()
    return (pruned, reports), run_block(block, call, hidden, compute)


def update_block(
    name: str,
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    dense_hidden: Tensor,
    gradients: Mapping[str, Tensor],
    sparsities: Mapping[str, float],
    recipe: Recipe,
    compute: Compute,
) -> tuple[PrunedBlock, Tensor, Tensor]:
    """Prune a block layer by layer and fit the kept weights to the dense model's outputs.

    The target of each layer is what the dense layer gives for the dense model's inputs; for layers that write into the
    residual stream it also makes up for what the pruned stream has lost so far.

    Args:
        name, block, call, hidden, gradients, sparsities, recipe, compute: as for `mask_block`.
        dense_hidden: what the dense model feeds the block.

    Returns:
        The pruned block, its output, and the dense block's output.
    """
    linears = _finite_projections(name, block)
    dense = observe_dense(block, linears, call, dense_hidden, compute, residual=recipe.targets == "residual")
    pruned: dict[str, SparseMatrix] = {}
    reports: dict[str, dict[str, Any]] = {}
    stream = PrunedStream(block, linears, dense, call, hidden, compute, name)
    for group in dense.flow.groups:
        seen = stream.observe(group)
        for path in group:
            weight = linears[path].weight.data
            exact = weight.float()
            target = exact @ seen.gram if recipe.targets == "own" else seen.targets(exact)
            problem = LayerProblem(exact, seen.gram, target)
            mask, choice = _choose_mask(exact, seen.inputs, gradients.get(path), problem, sparsities[path], recipe)
            update = UPDATES[recipe.update](problem, Support(mask, by_row=recipe.rows != "matrix"))
            pruned[path] = SparseMatrix.from_dense(update.weight.to(weight.dtype), update.mask)
            reports[path] = _report(exact, update.weight, update.mask, seen.inputs) | choice
            linears[path].weight.data = pruned[path].to_dense()
    require_all_seen(linears, pruned, name)
    return (pruned, reports), stream.finish(), dense.output


def prune_matrix(
    weight: Tensor, inputs: InputStatistics, sparsity: float, recipe: Recipe, gradient: Tensor | None = None
) -> tuple[SparseMatrix, dict[str, Any]]:
    """Score, allocate and mask one matrix ``[rows, columns]``.

    Returns:
        The kept weights in the dtype of ``weight``, and the matrix's entry in the manifest.
    """
    exact = weight.float()
    mask, choice = _choose_mask(exact, inputs, gradient, None, sparsity, recipe)
    return SparseMatrix.from_dense(weight, mask), _report(exact, exact * mask, mask, inputs) | choice


def require_finite_weight(linear: nn.Linear, name: str) -> None:
    """Stop (`ModelError`) at a layer whose weight holds NaN or infinity."""
    if not bool(linear.weight.isfinite().all()):
        raise ModelError(f"{name}: NaN or infinity in its weights; they cannot be scored")


def _choose_mask(
    weight: Tensor,
    inputs: InputStatistics,
    gradient: Tensor | None,
    problem: LayerProblem | None,
    sparsity: float,
    recipe: Recipe,
) -> tuple[Tensor, dict[str, Any]]:
    """The mask that score and row budget choose, and what there is to say about the choice."""
    pattern = parse_pattern(recipe.pattern)
    score = pattern.scores(SCORES[recipe.score].formula(weight, inputs, gradient))
    layer = LayerView(weight, score, inputs.last_tokens, problem)
    plan = ROW_BUDGETS[recipe.rows].allocate(layer, sparsity, recipe.policy)
    even = pattern.mask(score, uniform(layer, sparsity, recipe.policy).pruned)
    return pattern.mask(score, plan.pruned), {
        "target_sparsity": sparsity,
        "learning_rate": plan.learning_rate,
        "cosine_uniform": output_cosine(weight, weight * even, inputs.last_tokens),
    }


def _report(weight: Tensor, sparse: Tensor, mask: Tensor, inputs: InputStatistics) -> dict[str, Any]:
    """A pruned matrix as the manifest describes it: counts, how row sparsities are distributed, output quality."""
    rows, columns = mask.shape
    sparsities = 1 - mask.sum(dim=1).cpu().double() / columns
    return {
        "shape": [rows, columns],
        "nnz": int(mask.sum()),
        "row_sparsity": {
            "min": float(sparsities.min()),
            "median": float(sparsities.median()),
            "max": float(sparsities.max()),
            "histogram": torch.histc(sparsities, HISTOGRAM_BINS, min=0, max=1).long().tolist(),
        },
        "cosine": output_cosine(weight, sparse, inputs.last_tokens),
    }


def _finite_projections(name: str, block: nn.Module) -> Mapping[str, nn.Linear]:
    linears = projections(block)
    for path, linear in linears.items():
        require_finite_weight(linear, f"{name}.{path}")
    return linears


def output_cosine(weight: Tensor, sparse: Tensor, inputs: Tensor) -> float:
    """Cosine between the dense and the pruned outputs of a whole layer."""
    dense, pruned = (weight @ inputs).flatten().double(), (sparse @ inputs).flatten().double()
    return float(torch.nn.functional.cosine_similarity(dense, pruned, dim=0))
