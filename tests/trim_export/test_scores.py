"""Scores against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trim_export.scores import SCORES, gblm, magnitude, ria, wanda
from trim_export.statistics import InputStatistics


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(tokens: Tensor, windows: int) -> InputStatistics:
    return InputStatistics(tokens.square().sum(dim=0) / windows, tokens[:windows].T)


def test_magnitude_is_the_absolute_weight_whatever_the_inputs() -> None:
    weight = draw(5, 8, seed=0)
    score = magnitude(weight, statistics(torch.zeros(4, 8), 2))
    np.testing.assert_array_equal(score.numpy(), np.abs(weight.numpy()))


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    weight, tokens, windows = draw(5, 8, seed=0), draw(60, 8, seed=1) * torch.arange(8), 4
    score = wanda(weight, statistics(tokens, windows)).numpy()
    for row in range(5):
        for column in range(8):
            norm = np.linalg.norm(tokens[:, column].double().numpy()) / np.sqrt(windows)
            assert score[row, column] == pytest.approx(abs(float(weight[row, column])) * norm, rel=1e-5)


def test_wanda_scores_weights_of_a_dead_input_zero() -> None:
    tokens = draw(20, 6, seed=1)
    tokens[:, 2] = 0.0
    score = wanda(draw(4, 6, seed=0), statistics(tokens, 2))
    assert not score[:, 2].any()
    assert score[:, [0, 1, 3, 4, 5]].all()


def test_wanda_prefers_a_small_weight_on_a_loud_input() -> None:
    weight = torch.tensor([[1.0, 0.5]])
    inputs = InputStatistics(torch.tensor([1.0, 100.0]), torch.ones(2, 1))
    assert wanda(weight, inputs).argmin() == 0
    assert magnitude(weight, inputs).argmin() == 1


def test_ria_is_the_share_of_the_column_and_of_the_row_times_the_root_of_the_norm() -> None:
    weight, tokens, windows = draw(5, 8, seed=0), draw(60, 8, seed=1) * torch.arange(1, 9), 4
    score = ria(weight, statistics(tokens, windows)).numpy()
    exact = np.abs(weight.double().numpy())
    for row in range(5):
        for column in range(8):
            share = exact[row, column] / exact[:, column].sum() + exact[row, column] / exact[row].sum()
            norm = np.linalg.norm(tokens[:, column].double().numpy()) / np.sqrt(windows)
            assert score[row, column] == pytest.approx(share * np.sqrt(norm), rel=1e-5)


def test_ria_scores_rows_and_columns_of_zeros_zero() -> None:
    weight = draw(4, 6, seed=0)
    weight[1], weight[:, 2] = 0.0, 0.0
    score = ria(weight, statistics(draw(20, 6, seed=1), 2))
    assert score.isfinite().all()
    assert torch.equal(score > 0, weight != 0)


def test_gblm_adds_a_hundred_times_the_gradient_to_the_norm() -> None:
    weight, tokens, windows = draw(5, 8, seed=0), draw(60, 8, seed=1), 4
    gradients = 0.01 * draw(windows * 40, seed=2).view(windows, 5, 8).double().numpy()
    norms = torch.from_numpy(np.sqrt(np.square(gradients).sum(axis=0))).float()
    score = gblm(weight, statistics(tokens, windows), norms).numpy()
    for row in range(5):
        for column in range(8):
            norm = np.linalg.norm(tokens[:, column].double().numpy()) / np.sqrt(windows)
            slope = np.sqrt(sum((100 * window[row, column]) ** 2 for window in gradients))
            assert score[row, column] == pytest.approx(abs(float(weight[row, column])) * (norm + slope), rel=1e-5)


def test_gblm_without_gradients_is_wanda_only_if_they_are_zero() -> None:
    weight, inputs = draw(4, 6, seed=0), statistics(draw(20, 6, seed=1), 2)
    torch.testing.assert_close(gblm(weight, inputs, torch.zeros(4, 6)), wanda(weight, inputs))
    with pytest.raises(ValueError, match="gradients"):
        gblm(weight, inputs)


def test_only_gblm_asks_for_gradients() -> None:
    assert [name for name, score in SCORES.items() if score.needs_gradients] == ["gblm"]


@pytest.mark.parametrize("name", SCORES)
def test_scores_fit_the_weight_and_leave_it_alone(name: str) -> None:
    weight = draw(3, 7, seed=0)
    before = weight.clone()
    score = SCORES[name].formula(weight, statistics(draw(10, 7, seed=2), 2), draw(3, 7, seed=3).abs())
    assert score.shape == weight.shape
    assert score.dtype == torch.float32
    assert (score >= 0).all()
    assert torch.equal(weight, before)
