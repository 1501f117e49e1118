"""How many weights each output row of one matrix loses, given the matrix's target sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trim_export.curves import Curves, curves
from trim_export.lagrangian import allocate, squared_errors
from trim_export.refit_curves import interpolate, refit_losses
from trim_export.trim import Policy, row_cap, trim_search
from trim_export.updates import LayerProblem
from trim_export.updates.selection import largest

__all__ = [
    "ROW_BUDGETS",
    "LayerView",
    "RowBudget",
    "RowPlan",
    "anticipating",
    "keep_best",
    "keep_mask",
    "lagrangian",
    "matrix",
    "trim",
    "uniform",
]

REFIT_REACH = 0.2
"""How far from the target, in sparsity, the counts of `anticipating` may lie."""
REFIT_LEVELS = 5
"""Sparsities at which it refits the whole matrix."""


@dataclass(frozen=True)
class LayerView:
    """One matrix as row budgets see it; what is costly is computed when it is first called for.

    Attributes:
        weight: float32 ``[rows, columns]``, dense.
        score: float32 ``[rows, columns]``, its importance.
        inputs: float32 ``[columns, samples]``, calibration inputs on which outputs are compared.
        problem: what the weight update will minimise; None where kept weights stay as they are.
    """

    weight: Tensor
    score: Tensor
    inputs: Tensor
    problem: LayerProblem | None = None

    @cached_property
    def order(self) -> Tensor:
        """int64 ``[rows, columns]``: each row's columns in ascending importance, of equals the leftmost first."""
        return self.score.argsort(dim=1, stable=True)

    @cached_property
    def curves(self) -> Curves:
        """Output quality of every row at every count."""
        return curves(self.weight, self.order, self.inputs)


@dataclass(frozen=True)
class RowPlan:
    """What a row budget decided for one matrix.

    Attributes:
        pruned: int64 ``[rows]`` weights to prune in each row, least important first.
        learning_rate: TRIM's choice; None for budgets that do not search, or when uniform stayed best.
    """

    pruned: Tensor
    learning_rate: float | None = None


@dataclass(frozen=True)
class RowBudget:
    """A way to allocate, and what it asks for.

    Attributes:
        allocate: ``(layer, target, policy) -> RowPlan``.
        capped: whether it promises every row some weights (`trim_export.trim.ROW_CAP`), so that the target has a limit.
        needs_problem: whether it looks ahead to the weight update, and so cannot be used without one.
    """

    allocate: Callable[[LayerView, float, Policy], RowPlan]
    capped: bool = False
    needs_problem: bool = False


def uniform(layer: LayerView, target: float, policy: Policy) -> RowPlan:
    """Every row loses the same share."""
    rows, columns = layer.score.shape
    return RowPlan(policy.counts(torch.full((rows,), target, device=layer.score.device), columns, target))


def matrix(layer: LayerView, target: float, policy: Policy) -> RowPlan:
    """One threshold for the whole matrix: rows lose what falls below it, so some may end up empty.

    The baseline of the magnitude pruning in the papers' code.
    """
    rows, columns = layer.score.shape
    pruned = torch.tensor([round(target * rows * columns)], device=layer.score.device)
    kept = keep_best(layer.score.view(1, rows * columns), pruned)
    return RowPlan(columns - kept.view(rows, columns).sum(dim=1))


def trim(layer: LayerView, target: float, policy: Policy) -> RowPlan:
    """The paper's search (`trim_export.trim`)."""
    search = trim_search(layer.curves, target, policy)
    return RowPlan(search.pruned, search.learning_rate)


def lagrangian(layer: LayerView, target: float, policy: Policy) -> RowPlan:
    """The least squared error of the outputs, from TRIM's curves (`trim_export.lagrangian`); counts are always exact.

    The squared error and not one minus the cosine: the latter weighs rows alike whatever their outputs' power, and on
    held-out text left two of three matrices worse than uniform rows (`benchmarks/row_budgets.py` measures both). For
    weights that stay as they are: after an update these rows were mostly worse than uniform ones; see `anticipating`.
    """
    rows, columns = layer.score.shape
    errors = squared_errors(layer.curves)[:, : row_cap(columns, target) + 1]
    return RowPlan(allocate(errors, round(target * rows * columns)))


def anticipating(layer: LayerView, target: float, policy: Policy) -> RowPlan:
    """The least loss after the weight update, as a short refit foretells it; counts are always exact.

    The matrix is refitted at a few sparsities around the target, every row alike; each row's losses, interpolated, are
    then minimised together as in `lagrangian`. Costs 25 products rows x columns x columns. In the same benchmark this
    was better than uniform rows after every update, as good as `matrix` after a refit, and behind it after ADMM, which
    chooses the mask of the whole matrix itself.
    """
    if layer.problem is None:
        raise ValueError("the row budget anticipating needs the problem of a weight update")
    rows, columns = layer.score.shape
    low = max(0, math.floor((target - REFIT_REACH) * columns))
    high = min(row_cap(columns, target), math.ceil((target + REFIT_REACH) * columns))
    levels = torch.linspace(low, high, REFIT_LEVELS).round().long().unique().tolist()
    masks = [keep_mask(layer.order, layer.order.new_full((rows,), level)) for level in levels]
    losses = interpolate(levels, refit_losses(layer.problem, masks))
    return RowPlan(low + allocate(losses, round(target * rows * columns) - rows * low))


def keep_best(score: Tensor, pruned: Tensor) -> Tensor:
    """bool ``[lines, width]``: False at the ``pruned[i]`` lowest scores of line i, of equals the leftmost first.

    What `keep_mask` gives for an ascending stable order, several times faster than making that order.
    """
    # Sought from the right, because `largest` keeps the first of equals.
    return largest(score.flip(1), score.shape[1] - pruned).flip(1)


def keep_mask(order: Tensor, pruned: Tensor) -> Tensor:
    """bool ``[rows, columns]``: False at the first ``pruned[i]`` places of ``order[i]`` (ascending importance)."""
    kept = torch.arange(order.shape[1], device=order.device) >= pruned[:, None]
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, kept)


ROW_BUDGETS: dict[str, RowBudget] = {
    "uniform": RowBudget(uniform),
    "matrix": RowBudget(matrix),
    "trim": RowBudget(trim, capped=True),
    "lagrangian": RowBudget(lagrangian, capped=True),
    "anticipating": RowBudget(anticipating, capped=True, needs_problem=True),
}
