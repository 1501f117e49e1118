"""Row counts of every budget, and masks against a loop that prunes one weight at a time."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trim_export.curves import Curves, curves
from trim_export.row_budgets import ROW_BUDGETS, keep_mask, matrix, trim, uniform
from trim_export.trim import EXACT, PAPER, Policy, trim_search

POLICIES = pytest.mark.parametrize("policy", [PAPER, EXACT], ids=["paper", "exact"])


def scores(rows: int, columns: int, seed: int, levels: int | None = None) -> Tensor:
    """Random scores; with few ``levels``, many ties."""
    draw = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, columns, generator=draw).abs() * torch.rand(rows, 1, generator=draw)
    return score if levels is None else (score * levels).round()


def not_called() -> NoReturn:
    raise AssertionError("this budget needs no curves")


def curves_of(score: Tensor) -> Curves:
    inputs = torch.randn(score.shape[1], 16, generator=torch.Generator().manual_seed(1))
    return curves(score, score.argsort(dim=1, stable=True), inputs)


def mask_by_hand(score: Tensor, pruned: Tensor) -> Tensor:
    """Take the smallest remaining score of each row, the leftmost of equals, as often as told."""
    keep = np.ones(tuple(score.shape), bool)
    for row, values in enumerate(score.tolist()):
        for _ in range(int(pruned[row])):
            left = [column for column in range(len(values)) if keep[row, column]]
            keep[row, min(left, key=lambda column: values[column])] = False
    return torch.from_numpy(keep)


@pytest.mark.parametrize("levels", [None, 3, 1])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 17), (9, 1), (8, 20), (23, 11)])
def test_keep_mask_drops_the_lowest_scores_and_of_equals_the_leftmost(
    rows: int, columns: int, levels: int | None
) -> None:
    score = scores(rows, columns, seed=rows, levels=levels)
    pruned = torch.randint(0, columns + 1, (rows,), generator=torch.Generator().manual_seed(columns))
    mask = keep_mask(score.argsort(dim=1, stable=True), pruned)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, mask_by_hand(score, pruned))


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 10**6))
def test_keep_mask_leaves_as_many_as_not_pruned(rows: int, columns: int, seed: int) -> None:
    score = scores(rows, columns, seed, levels=2)
    pruned = torch.randint(0, columns + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    mask = keep_mask(score.argsort(dim=1, stable=True), pruned)
    assert torch.equal(mask.sum(dim=1), columns - pruned)


@pytest.mark.parametrize("pruned", [0, 6])
def test_keep_mask_can_keep_all_and_nothing(pruned: int) -> None:
    mask = keep_mask(scores(4, 6, seed=0).argsort(dim=1), torch.full((4,), pruned))
    assert mask.all() if pruned == 0 else not mask.any()


@pytest.mark.parametrize("target", [0.0, 0.33, 0.5, 0.7, 0.9, 0.99])
def test_uniform_prunes_the_exact_total_and_every_row_alike(target: float) -> None:
    plan = uniform(scores(13, 37, seed=2), not_called, target, EXACT)
    assert int(plan.pruned.sum()) == round(target * 13 * 37)
    assert plan.pruned.max() - plan.pruned.min() <= 1
    assert plan.learning_rate is None


@pytest.mark.parametrize(("target", "count"), [(0.0, 0), (0.5, 288), (0.7, 403), (0.8, 460)])
def test_uniform_truncates_each_row_under_the_paper_policy(target: float, count: int) -> None:
    assert uniform(scores(3, 576, seed=2), not_called, target, PAPER).pruned.tolist() == [count] * 3


@POLICIES
@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.3333, 0.5, 0.8, 0.99])
def test_matrix_keeps_what_one_threshold_over_all_scores_keeps(
    target: float, levels: int | None, policy: Policy
) -> None:
    score = scores(14, 25, seed=4, levels=levels)
    plan = matrix(score, not_called, target, policy)
    lowest = np.argsort(score.numpy().ravel(), kind="stable")[: round(target * score.numel())]
    keep = np.ones(score.numel(), bool)
    keep[lowest] = False
    assert plan.pruned.shape == (14,)
    assert int(plan.pruned.sum()) == round(target * score.numel())
    mask = keep_mask(score.argsort(dim=1, stable=True), plan.pruned)
    assert torch.equal(mask, torch.from_numpy(keep).view(14, 25))
    assert score[mask].min() >= score[~mask].max() if target > 0 else mask.all()


def test_matrix_may_leave_rows_empty() -> None:
    score = scores(6, 10, seed=1) + 1
    score[2] *= 1e-6
    score[5] = 0.0
    plan = matrix(score, not_called, 0.5, EXACT)
    assert plan.pruned[[2, 5]].tolist() == [10, 10]
    assert int(plan.pruned.sum()) == 30


@POLICIES
def test_trim_is_the_search(policy: Policy) -> None:
    score = scores(24, 64, seed=5)
    plan = trim(score, lambda: curves_of(score), 0.8, policy)
    search = trim_search(curves_of(score), 0.8, policy)
    assert torch.equal(plan.pruned, search.pruned)
    assert plan.learning_rate == search.learning_rate


@pytest.mark.parametrize("target", [0.0, 0.5, 0.7, 0.95])
def test_trim_prunes_the_exact_total(target: float) -> None:
    score = scores(15, 44, seed=5)
    assert int(trim(score, lambda: curves_of(score), target, EXACT).pruned.sum()) == round(target * 15 * 44)


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_trim_under_the_paper_policy_prunes_up_to_one_weight_a_row_too_few(target: float) -> None:
    score = scores(15, 44, seed=5)
    missing = target * 15 * 44 - int(trim(score, lambda: curves_of(score), target, PAPER).pruned.sum())
    assert 0 <= missing < 15


@POLICIES
@pytest.mark.parametrize("name", ROW_BUDGETS)
def test_every_budget_gives_one_possible_count_a_row(name: str, policy: Policy) -> None:
    score = scores(9, 16, seed=8, levels=5)
    pruned = ROW_BUDGETS[name](score, lambda: curves_of(score), 0.6, policy).pruned
    assert pruned.dtype == torch.int64
    assert pruned.shape == (9,)
    assert 0 <= pruned.min() <= pruned.max() <= 16
