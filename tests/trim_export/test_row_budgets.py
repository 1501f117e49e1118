"""Row counts of every budget, and masks against a loop that prunes one weight at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trim_export.curves import Curves
from trim_export.lagrangian import squared_errors
from trim_export.refit_curves import interpolate, refit_losses
from trim_export.row_budgets import (
    ROW_BUDGETS,
    LayerView,
    anticipating,
    keep_best,
    keep_mask,
    lagrangian,
    matrix,
    trim,
    uniform,
)
from trim_export.trim import EXACT, PAPER, Policy, row_cap, trim_search
from trim_export.updates import UPDATES, LayerProblem, Support

POLICIES = pytest.mark.parametrize("policy", [PAPER, EXACT], ids=["paper", "exact"])


def scores(rows: int, columns: int, seed: int, levels: int | None = None) -> Tensor:
    """Random scores; with few ``levels``, many ties."""
    draw = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, columns, generator=draw).abs() * torch.rand(rows, 1, generator=draw)
    return score if levels is None else (score * levels).round()


@dataclass(frozen=True)
class ScoresOnly(LayerView):
    """A layer of which a budget may use nothing but the scores."""

    @property
    def order(self) -> Tensor:  # type: ignore[override]
        raise AssertionError("this budget needs no order")

    @property
    def curves(self) -> Curves:  # type: ignore[override]
        raise AssertionError("this budget needs no curves")


def scores_only(score: Tensor) -> LayerView:
    return ScoresOnly(score, score, score)


def layer_of(score: Tensor) -> LayerView:
    """A layer with these scores as weights, random correlated inputs, and the problem of its own outputs on them."""
    columns = score.shape[1]
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(columns, columns, generator=draw) @ torch.randn(columns, 3 * columns, generator=draw)
    gram = inputs @ inputs.T
    return LayerView(score, score, inputs[:, :16].contiguous(), LayerProblem(score, gram, score @ gram))


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
    plan = uniform(scores_only(scores(13, 37, seed=2)), target, EXACT)
    assert int(plan.pruned.sum()) == round(target * 13 * 37)
    assert plan.pruned.max() - plan.pruned.min() <= 1
    assert plan.learning_rate is None


@pytest.mark.parametrize(("target", "count"), [(0.0, 0), (0.5, 288), (0.7, 403), (0.8, 460)])
def test_uniform_truncates_each_row_under_the_paper_policy(target: float, count: int) -> None:
    assert uniform(scores_only(scores(3, 576, seed=2)), target, PAPER).pruned.tolist() == [count] * 3


@POLICIES
@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.3333, 0.5, 0.8, 0.99])
def test_matrix_keeps_what_one_threshold_over_all_scores_keeps(
    target: float, levels: int | None, policy: Policy
) -> None:
    score = scores(14, 25, seed=4, levels=levels)
    plan = matrix(scores_only(score), target, policy)
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
    plan = matrix(scores_only(score), 0.5, EXACT)
    assert plan.pruned[[2, 5]].tolist() == [10, 10]
    assert int(plan.pruned.sum()) == 30


@POLICIES
def test_trim_is_the_search(policy: Policy) -> None:
    score = scores(24, 64, seed=5)
    plan = trim(layer_of(score), 0.8, policy)
    search = trim_search(layer_of(score).curves, 0.8, policy)
    assert torch.equal(plan.pruned, search.pruned)
    assert plan.learning_rate == search.learning_rate


@pytest.mark.parametrize("target", [0.0, 0.5, 0.7, 0.95])
def test_trim_prunes_the_exact_total(target: float) -> None:
    score = scores(15, 44, seed=5)
    assert int(trim(layer_of(score), target, EXACT).pruned.sum()) == round(target * 15 * 44)


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_trim_under_the_paper_policy_prunes_up_to_one_weight_a_row_too_few(target: float) -> None:
    score = scores(15, 44, seed=5)
    missing = target * 15 * 44 - int(trim(layer_of(score), target, PAPER).pruned.sum())
    assert 0 <= missing < 15


@POLICIES
@pytest.mark.parametrize("name", ROW_BUDGETS)
def test_every_budget_gives_one_possible_count_a_row(name: str, policy: Policy) -> None:
    score = scores(9, 16, seed=8, levels=5)
    pruned = ROW_BUDGETS[name].allocate(layer_of(score), 0.6, policy).pruned
    assert pruned.dtype == torch.int64
    assert pruned.shape == (9,)
    assert 0 <= pruned.min() <= pruned.max() <= 16


def test_what_budgets_promise_and_ask_for() -> None:
    assert [name for name, budget in ROW_BUDGETS.items() if budget.capped] == ["trim", "lagrangian", "anticipating"]
    assert [name for name, budget in ROW_BUDGETS.items() if budget.needs_problem] == ["anticipating"]


# ---- budgets that minimise a sum of errors ---------------------------------------------------------------------------

layers = st.builds(
    lambda rows, columns, seed, levels: layer_of(scores(rows, columns, seed, levels)),
    st.integers(1, 10),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([None, 3]),
)
targets = st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.8, 0.95])
minimising = pytest.mark.parametrize("name", ["lagrangian", "anticipating"])


@minimising
@given(layers, targets)
@example(layer_of(scores(3, 30, 0, None)), 0.95)  # 85.5 weights, where it matters which factors are multiplied first
@settings(max_examples=60)
def test_the_total_is_exact_and_no_row_above_the_cap(name: str, layer: LayerView, target: float) -> None:
    rows, columns = layer.score.shape
    plan = ROW_BUDGETS[name].allocate(layer, target, EXACT)
    assert int(plan.pruned.sum()) == round(target * rows * columns)
    assert plan.pruned.min() >= 0
    assert plan.pruned.max() <= max(int(0.95 * columns), int(np.ceil(target * columns)))
    assert plan.learning_rate is None


def output_error(layer: LayerView, pruned: Tensor) -> float:
    """Squared error of the outputs of a masked layer, in float64."""
    kept = layer.weight.double() * keep_mask(layer.order, pruned)
    return float(((kept - layer.weight.double()) @ layer.inputs.double()).square().sum())


@given(layers, targets)
@settings(max_examples=60)
def test_lagrangian_errs_no_more_than_uniform(layer: LayerView, target: float) -> None:
    even = output_error(layer, uniform(layer, target, EXACT).pruned)
    dense = float((layer.weight.double() @ layer.inputs.double()).square().sum())
    assert output_error(layer, lagrangian(layer, target, EXACT).pruned) <= even + 1e-5 * dense


def test_lagrangian_errs_less_than_uniform_and_trim_where_rows_differ() -> None:
    layer = layer_of(scores(24, 64, seed=5))
    errors = {
        name: output_error(layer, ROW_BUDGETS[name].allocate(layer, 0.7, EXACT).pruned)
        for name in ("uniform", "trim", "lagrangian")
    }
    assert errors["lagrangian"] < 0.9 * min(errors["uniform"], errors["trim"])


@given(layers)
@settings(max_examples=20)
def test_squared_errors_are_those_of_the_masked_outputs(layer: LayerView) -> None:
    rows, columns = layer.score.shape
    errors = squared_errors(layer.curves)
    dense = layer.weight.double() @ layer.inputs.double()
    for count in range(columns + 1):
        kept = layer.weight.double() * keep_mask(layer.order, torch.full((rows,), count))
        expected = (kept @ layer.inputs.double() - dense).square().sum(dim=1)
        assert (errors[:, count] - expected).abs().max() <= 1e-5 * float(dense.square().sum()) + 1e-30


def foretold(layer: LayerView, target: float) -> tuple[int, Tensor]:
    """The loss after a refit as `anticipating` sees it, from its lowest count on."""
    assert layer.problem is not None
    rows, columns = layer.score.shape
    low = max(0, int(np.floor((target - 0.2) * columns)))
    high = min(row_cap(columns, target), int(np.ceil((target + 0.2) * columns)))
    levels = torch.linspace(low, high, 5).round().long().unique().tolist()
    masks = [keep_mask(layer.order, torch.full((rows,), level)) for level in levels]
    return low, interpolate(levels, refit_losses(layer.problem, masks))


@given(layers, targets)
@settings(max_examples=60)
def test_anticipating_foretells_no_more_loss_than_for_uniform(layer: LayerView, target: float) -> None:
    low, losses = foretold(layer, target)
    total = {
        name: float(losses.gather(1, ROW_BUDGETS[name].allocate(layer, target, EXACT).pruned[:, None] - low).sum())
        for name in ("uniform", "anticipating")
    }
    assert total["anticipating"] <= total["uniform"] + 1e-9 * float(losses.abs().sum())


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_anticipating_leaves_less_error_after_a_refit_than_uniform_and_lagrangian(target: float) -> None:
    layer = layer_of(scores(24, 64, seed=5))
    assert layer.problem is not None
    left = {}
    for name in ("uniform", "lagrangian", "anticipating"):
        mask = keep_mask(layer.order, ROW_BUDGETS[name].allocate(layer, target, EXACT).pruned)
        left[name] = layer.problem.loss(UPDATES["refit"](layer.problem, Support(mask, by_row=True)).weight)
    assert left["anticipating"] < 0.97 * min(left["uniform"], left["lagrangian"])


def test_anticipating_needs_a_problem() -> None:
    score = scores(4, 8, seed=0)
    with pytest.raises(ValueError, match="needs the problem of a weight update"):
        anticipating(LayerView(score, score, score.T.contiguous()), 0.5, EXACT)


@given(scores=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=7, max_size=7), min_size=1, max_size=5))
def test_keeping_the_best_is_keeping_the_end_of_a_stable_order(scores: list[list[float]]) -> None:
    score = torch.tensor(scores)
    for pruned in range(8):
        counts = torch.full((len(score),), pruned)
        order = score.argsort(dim=1, stable=True)
        assert torch.equal(keep_best(score, counts), keep_mask(order, counts))
