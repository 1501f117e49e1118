"""Allocation by marginal costs against every possible vector of counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from torch import Tensor

from trim_export.lagrangian import allocate


@st.composite
def cases(draw: st.DrawFn, convex: bool, max_rows: int = 4, max_steps: int = 5) -> tuple[Tensor, int]:
    """Error curves of a few rows, with many ties among their increments, and a total that they can take."""
    rows, steps = draw(st.integers(1, max_rows)), draw(st.integers(0, max_steps))
    increments = draw(
        st.lists(st.lists(st.integers(-2, 6), min_size=steps, max_size=steps), min_size=rows, max_size=rows)
    )
    curves = [np.cumsum([0, *(sorted(row) if convex else row)]) for row in increments]
    return torch.tensor(np.stack(curves), dtype=torch.float64), draw(st.integers(0, rows * steps))


def total_error(errors: Tensor, counts: Tensor) -> float:
    return sum(float(row[count]) for row, count in zip(errors, counts.tolist(), strict=True))


def least_error(errors: Tensor, total: int) -> float:
    """Of all vectors of counts with that total."""
    rows, levels = errors.shape
    candidates = np.array(list(itertools.product(range(levels), repeat=rows)))
    candidates = candidates[candidates.sum(axis=1) == total]
    return min(total_error(errors, torch.from_numpy(counts)) for counts in candidates)


def hull(curve: np.ndarray) -> np.ndarray:
    """Lower convex hull at every count, by scipy's qhull."""
    levels = np.arange(len(curve), dtype=float)
    if len(curve) < 3:
        return curve
    roof = [[0.0, curve.max() + 1], [levels[-1], curve.max() + 1]]  # so that no curve is flat
    points = np.vstack([np.column_stack([levels, curve]), roof])
    corners = sorted(corner for corner in ConvexHull(points).vertices if corner < len(curve))
    return np.interp(levels, levels[corners], curve[corners])


@given(cases(convex=True))
def test_convex_curves_get_the_least_error_of_all_counts(case: tuple[Tensor, int]) -> None:
    errors, total = case
    counts = allocate(errors, total)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == total
    assert 0 <= counts.min() <= counts.max() < errors.shape[1]
    assert total_error(errors, counts) == least_error(errors, total)


@given(cases(convex=False))
def test_any_curves_get_the_least_error_of_their_hulls_but_for_one_row(case: tuple[Tensor, int]) -> None:
    errors, total = case
    counts = allocate(errors, total)
    assert int(counts.sum()) == total
    hulls = torch.from_numpy(np.stack([hull(row) for row in errors.numpy()]))
    widest = float((errors - hulls).max())
    assert total_error(errors, counts) <= least_error(hulls, total) + widest + 1e-9


@given(cases(convex=False, max_rows=8, max_steps=8))
@settings(max_examples=60)
def test_equal_counts_are_never_better(case: tuple[Tensor, int]) -> None:
    errors, total = case
    rows = len(errors)
    even = torch.tensor([total // rows + (row < total % rows) for row in range(rows)])
    assert total_error(errors, allocate(errors, total)) <= total_error(errors, even)


def test_equal_counts_are_kept_where_the_hull_misleads() -> None:
    """Between the corners of its hull the second row costs far more than the hull says."""
    errors = torch.tensor([[0.0, 3.0, 9.0], [0.0, 9.0, 2.0]])
    assert allocate(errors, 1).tolist() == [1, 0]
    assert allocate(errors, 2).tolist() == [0, 2]


@pytest.mark.parametrize("total", [0, 6])
def test_all_and_nothing(total: int) -> None:
    assert allocate(torch.tensor([[0.0, 1.0, 5.0, 6.0], [3.0, 2.0, 1.0, 0.0]]), total).tolist() == [total / 2] * 2
