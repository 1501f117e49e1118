"""How many weights each output row of one matrix loses, given the matrix's target sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trim_export.curves import Curves
from trim_export.trim import Policy, trim_search

__all__ = ["ROW_BUDGETS", "RowBudget", "RowPlan", "keep_mask", "matrix", "trim", "uniform"]


@dataclass(frozen=True)
class RowPlan:
    """What a row budget decided for one matrix.

    Attributes:
        pruned: int64 ``[rows]`` weights to prune in each row, least important first.
        learning_rate: TRIM's choice; None for budgets that do not search, or when uniform stayed best.
    """

    pruned: Tensor
    learning_rate: float | None = None


class RowBudget(Protocol):
    """``(score [rows, columns], curves, target, policy) -> RowPlan``; curves are computed only when called for."""

    def __call__(self, score: Tensor, curves: Callable[[], Curves], target: float, policy: Policy) -> RowPlan:
        """Decide the row counts."""
        ...


def uniform(score: Tensor, curves: Callable[[], Curves], target: float, policy: Policy) -> RowPlan:
    """Every row loses the same share."""
    rows, columns = score.shape
    return RowPlan(policy.counts(torch.full((rows,), target, device=score.device), columns, target))


def matrix(score: Tensor, curves: Callable[[], Curves], target: float, policy: Policy) -> RowPlan:
    """One threshold for the whole matrix: rows lose what falls below it, so some may end up empty.

    The baseline of the magnitude pruning in the papers' code.
    """
    rows, columns = score.shape
    lowest = score.flatten().argsort(stable=True)[: round(target * score.numel())]
    return RowPlan(torch.bincount(lowest // columns, minlength=rows))


def trim(score: Tensor, curves: Callable[[], Curves], target: float, policy: Policy) -> RowPlan:
    """The paper's search (`trim_export.trim`)."""
    search = trim_search(curves(), target, policy)
    return RowPlan(search.pruned, search.learning_rate)


def keep_mask(order: Tensor, pruned: Tensor) -> Tensor:
    """bool ``[rows, columns]``: False at the first ``pruned[i]`` places of ``order[i]`` (ascending importance)."""
    kept = torch.arange(order.shape[1], device=order.device) >= pruned[:, None]
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, kept)


ROW_BUDGETS: dict[str, RowBudget] = {"uniform": uniform, "matrix": matrix, "trim": trim}
