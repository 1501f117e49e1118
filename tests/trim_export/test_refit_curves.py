"""Losses after a short refit against least squares in float64, and the curves between them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trim_export.refit_curves import interpolate, refit_losses
from trim_export.updates import LayerProblem, Refit


def problem_and_masks(seed: int) -> tuple[LayerProblem, list[Tensor]]:
    """A layer with well-conditioned inputs whose target is not what it gives itself, and ever smaller masks."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 200, generator=draw) + 0.5 * torch.randn(1, 200, generator=draw)
    weight, gram = torch.randn(6, 12, generator=draw), inputs @ inputs.T
    target = (weight + 0.1 * torch.randn(6, 12, generator=draw)) @ gram
    rank = torch.rand(6, 12, generator=draw).argsort(dim=1).argsort(dim=1)
    return LayerProblem(weight, gram, target), [rank >= pruned for pruned in (2, 5, 9)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_are_nearly_those_of_least_squares(seed: int) -> None:
    problem, masks = problem_and_masks(seed)
    losses = refit_losses(problem, masks)
    assert losses.dtype == torch.float64
    ridge = Refit().damp * problem.gram.diagonal().double().numpy()
    gram = problem.gram.double().numpy() + np.diag(ridge)
    target = problem.target.double().numpy() + ridge * problem.weight.double().numpy()
    for level, mask in enumerate(masks):
        for row, kept in enumerate(mask.numpy()):
            # The least v G v - 2 v b over the kept weights is -b G^-1 b; the dense optimum gives the scale.
            best = -target[row, kept] @ np.linalg.solve(gram[np.ix_(kept, kept)], target[row, kept])
            dense = -target[row] @ np.linalg.solve(gram, target[row])
            assert float(losses[row, level]) == pytest.approx(best, abs=0.02 * abs(best - dense))


def test_pruning_more_costs_more() -> None:
    problem, masks = problem_and_masks(3)
    assert (refit_losses(problem, masks).diff(dim=1) > 0).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True).map(sorted), st.integers(0, 99))
@settings(max_examples=40)
def test_curves_go_through_the_levels_and_stay_between_them(levels: list[int], seed: int) -> None:
    losses = torch.randn(3, len(levels), generator=torch.Generator().manual_seed(seed)).double()
    filled = interpolate(levels, losses)
    assert filled.shape == (3, levels[-1] - levels[0] + 1)
    torch.testing.assert_close(filled[:, [level - levels[0] for level in levels]], losses)
    for left, (low, high) in enumerate(itertools.pairwise(levels)):
        between = filled[:, low - levels[0] : high - levels[0] + 1]
        ends = losses[:, left : left + 2]
        assert (between >= ends.min(dim=1).values[:, None] - 1e-9).all()
        assert (between <= ends.max(dim=1).values[:, None] + 1e-9).all()


def test_a_convex_curve_is_met_closely() -> None:
    levels = [0, 10, 20, 30, 40]
    losses = torch.tensor([[level**2 for level in levels]])
    assert (interpolate(levels, losses) - torch.arange(41) ** 2).abs().max() < 10  # straight lines miss it by 25
