"""Layer budgets against their formulas written out in numpy, and the shift that makes them exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from trim_export.errors import UsageError
from trim_export.layer_budgets import (
    LAYER_BUDGETS,
    AlphaPruning,
    Auto,
    Dlp,
    LayerBudget,
    Lsa,
    LsaProjection,
    Owl,
    Uniform,
    hill_alpha,
    least_error,
    recentre,
    split_sequences,
)
from trim_export.statistics import InputStatistics

MEASURES = [0.011, 0.034, 0.002, 0.02, 0.0071]
SIZES = [400, 100, 250, 250, 800]


def weighted_mean(values: list[float], sizes: list[int]) -> float:
    return float(np.average(values, weights=sizes))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: Tensor, windows: int = 4) -> InputStatistics:
    """Statistics of inputs ``[tokens, columns]`` straight from their definition."""
    square = inputs.square().sum(dim=0) / windows
    return InputStatistics(square, inputs[-windows:].T.contiguous(), inputs.T @ inputs)


def ones(weights: dict[str, Tensor]) -> dict[str, InputStatistics]:
    """Inputs under which Wanda scores are the weights' magnitudes."""
    return {
        path: InputStatistics(torch.ones(weight.shape[1]), torch.ones(weight.shape[1], 1))
        for path, weight in weights.items()
    }


# ---- uniform ---------------------------------------------------------------------------------------------------------


def test_uniform_gives_every_block_the_target() -> None:
    assert Uniform().allocate([Uniform().measure({}, {})] * 3, [1, 2, 3], 0.7) == [0.7, 0.7, 0.7]


@pytest.mark.parametrize("name", LAYER_BUDGETS)
def test_registry_names_are_the_budgets_own(name: str) -> None:
    assert LAYER_BUDGETS[name]().name == name


# ---- OWL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [2.0, 5.0, 7.0])
def test_owl_measures_the_share_of_outliers_over_the_whole_block(threshold: float) -> None:
    scores = {"q": draw(30, 20, seed=0).exp(), "down": 3 * draw(50, 30, seed=1).exp(), "o": torch.zeros(5, 5)}
    together = np.concatenate([score.numpy().astype(np.float64).ravel() for score in scores.values()])
    expected = (together > threshold * together.mean()).mean()
    assert expected > 0
    assert Owl(threshold=threshold).measure(scores, ones(scores)) == expected


def test_owl_takes_a_score_at_the_threshold_for_ordinary() -> None:
    scores = {"q": torch.tensor([[5.0, 0, 0, 0, 0]])}
    assert Owl(threshold=5.0).measure(scores, ones(scores)) == 0
    assert Owl(threshold=4.9).measure(scores, ones(scores)) == 0.2


@pytest.mark.parametrize("strength", [0.05, 0.08, 0.12])
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_owl_allocates_by_its_formula(strength: float, target: float) -> None:
    outliers = np.array(MEASURES)
    density = (outliers - outliers.min()) / (outliers.max() - outliers.min()) * strength * 2
    density = density - density.mean() + (1 - target)
    np.testing.assert_allclose(Owl(strength).allocate(MEASURES, SIZES, target), 1 - density, rtol=0, atol=1e-12)


def test_owl_spreads_around_the_target_and_spares_outlying_blocks() -> None:
    sparsities = Owl(0.08).allocate(MEASURES, [1] * 5, 0.7)
    assert np.mean(sparsities) == pytest.approx(0.7)
    assert max(sparsities) - min(sparsities) == pytest.approx(0.16)
    assert np.argsort(sparsities).tolist() == np.argsort(MEASURES)[::-1].tolist()


# ---- AlphaPruning ----------------------------------------------------------------------------------------------------


def hill_by_hand(weight: NDArray[np.float64], bins: int = 100) -> float:
    """Fit every candidate tail of the spectrum and take the exponent of the one that fits best."""
    spectrum = sorted(value for value in np.linalg.svd(weight, compute_uv=False) ** 2 if value > 0)
    edges = np.linspace(math.log10(spectrum[0]), math.log10(spectrum[-1]), bins + 1)
    width = (edges[-1] - edges[0]) / bins
    counts = [0] * bins
    for value in spectrum:
        counts[min(int((math.log10(value) - edges[0]) / width), bins - 1)] += 1
    peak = 10 ** edges[counts.index(max(counts))]
    best_distance, best = math.inf, 0.0
    for start, smallest in enumerate(spectrum[:-1]):
        # The authors compare the lower end of the range, a logarithm, with the eigenvalue itself.
        if not math.log10(0.95 * peak) <= smallest <= 1.5 * peak:
            continue
        tail = spectrum[start:]
        alpha = 1 + len(tail) / sum(math.log(value / smallest) for value in tail)
        distance = max(
            abs(1 - (value / smallest) ** (1 - alpha) - place / len(tail)) for place, value in enumerate(tail)
        )
        if distance < best_distance:
            best_distance, best = distance, alpha
    return best


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(draw(40, 60, seed=0), id="wide"),
        pytest.param(draw(60, 40, seed=1), id="tall"),
        pytest.param(0.02 * draw(48, 48, seed=2), id="small-values"),
        pytest.param(draw(50, 64, seed=3) * draw(50, 1, seed=4).exp(), id="heavy-tailed"),
        pytest.param(draw(30, 50, seed=5) @ draw(50, 80, seed=6) @ draw(80, 33, seed=7), id="product"),
    ],
)
def test_hill_alpha_is_the_best_fitting_tail(weight: Tensor) -> None:
    assert hill_alpha(weight) == pytest.approx(hill_by_hand(weight.double().numpy()), rel=1e-3)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [2, 3, 5, 30])
def test_hill_alpha_of_few_eigenvalues_is_the_best_fitting_tail_too(size: int, seed: int) -> None:
    weight = torch.diag((2 * draw(size, seed=seed)).exp())
    assert hill_alpha(weight) == pytest.approx(hill_by_hand(weight.double().numpy()), rel=1e-3)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_hill_alpha_recovers_the_exponent_of_a_pareto_spectrum(alpha: float) -> None:
    quantiles = (torch.arange(400) + 0.5) / 400
    eigenvalues = (1 - quantiles) ** (-1 / (alpha - 1))
    assert hill_alpha(torch.diag(eigenvalues.sqrt())) == pytest.approx(alpha, rel=0.1)


def test_hill_alpha_is_lower_for_a_heavier_tail() -> None:
    light, heavy = draw(64, 64, seed=0), draw(64, 64, seed=0) * (2 * draw(64, 1, seed=1)).exp()
    assert hill_alpha(heavy) < hill_alpha(light)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.zeros(4, 6), id="zeros"),
        pytest.param(torch.ones(1, 6), id="one-row"),
        pytest.param(torch.ones(6, 1), id="one-column"),
        pytest.param(draw(6, 1, seed=0) @ draw(1, 5, seed=1), id="rank-one"),
        pytest.param(torch.eye(8), id="equal-eigenvalues"),
        pytest.param(3 * torch.eye(8), id="equal-eigenvalues-scaled"),
        pytest.param(torch.diag(torch.tensor([1.0, 1, 1, 1, 5])), id="some-equal-eigenvalues"),
        pytest.param(draw(8, 8, seed=3).bfloat16(), id="bfloat16"),
    ],
)
def test_hill_alpha_is_a_number_for_any_matrix(weight: Tensor) -> None:
    assert math.isfinite(hill_alpha(weight))


def test_alpha_pruning_measures_the_mean_of_a_blocks_matrices() -> None:
    weights = {"q": draw(20, 30, seed=0), "o": draw(30, 30, seed=1), "down": draw(40, 20, seed=2)}
    expected = np.mean([hill_alpha(weight) for weight in weights.values()])
    assert AlphaPruning().measure(weights, {}) == pytest.approx(expected)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3])
def test_alpha_pruning_allocates_by_its_formula(epsilon: float) -> None:
    alphas, sizes = np.array([2.0, 3.5, 5.0, 2.2]), np.array([10, 40, 30, 20])
    ratios = (alphas - alphas.min()) / (alphas.max() - alphas.min()) * ((1 + epsilon) - (1 - epsilon)) + (1 - epsilon)
    expected = ratios * (0.7 * sizes.sum() / (ratios * sizes).sum())
    allocated = AlphaPruning(epsilon).allocate(alphas.tolist(), sizes.tolist(), 0.7)
    np.testing.assert_allclose(allocated, expected, rtol=1e-12)
    assert weighted_mean(allocated, sizes.tolist()) == pytest.approx(0.7)


# ---- DLP -------------------------------------------------------------------------------------------------------------


def test_dlp_measures_the_mean_wanda_score_of_the_whole_block() -> None:
    weights = {"q": draw(12, 20, seed=0), "o": draw(30, 7, seed=1)}
    inputs = {"q": draw(24, 20, seed=2), "o": 5 * draw(24, 7, seed=3)}
    scores = [
        np.abs(weights[path].double().numpy()) * np.sqrt((inputs[path].double().numpy() ** 2).sum(axis=0) / 4)
        for path in weights
    ]
    expected = np.concatenate([score.ravel() for score in scores]).mean()
    measured = Dlp().measure(weights, {path: statistics_of(inputs[path]) for path in weights})
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.15])
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_dlp_allocates_by_its_formula(alpha: float, target: float) -> None:
    means = np.array(MEASURES)
    importance = 1 - means / means.sum()
    d = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * alpha
    allocated = Dlp(alpha).allocate(MEASURES, SIZES, target)
    np.testing.assert_allclose(allocated, target + d.mean() - d, rtol=0, atol=1e-12)


# ---- LSA -------------------------------------------------------------------------------------------------------------


def least_error_by_hand(weight: NDArray[np.float64], inputs: NDArray[np.float64]) -> tuple[float, float]:
    """Row by row: keep the half that Wanda keeps, solve for it exactly; the error, and what it is without solving."""
    error = plain = 0.0
    for row in weight:
        kept = np.sort(np.argsort(np.abs(row) * np.linalg.norm(inputs, axis=0))[len(row) // 2 :])
        outputs = inputs @ row
        solution = np.linalg.lstsq(inputs[:, kept], outputs)[0]
        error += float(((inputs[:, kept] @ solution - outputs) ** 2).sum())
        plain += float(((inputs[:, kept] @ row[kept] - outputs) ** 2).sum())
    return error, plain


@pytest.mark.parametrize("columns", [16, 21])
def test_least_error_is_that_of_the_refitted_better_half(columns: int) -> None:
    weight = draw(10, columns, seed=0)
    inputs = draw(200, columns, seed=1) @ (torch.eye(columns) + 0.3 * draw(columns, columns, seed=2))
    expected, without_refit = least_error_by_hand(weight.double().numpy(), inputs.double().numpy())
    assert expected < 0.8 * without_refit
    assert least_error(weight, statistics_of(inputs)) == pytest.approx(expected, rel=2e-2)


def test_a_matrix_that_is_half_empty_loses_nothing() -> None:
    weight = draw(6, 12, seed=0)
    weight[:, ::2] = 0
    assert least_error(weight, statistics_of(draw(50, 12, seed=1))) == pytest.approx(0, abs=1e-6)


def test_lsa_adds_up_the_errors_of_a_blocks_matrices() -> None:
    weights = {"q": draw(12, 20, seed=0), "o": draw(30, 8, seed=1)}
    inputs = {path: statistics_of(draw(100, weight.shape[1], seed=2)) for path, weight in weights.items()}
    alone = [Lsa().measure({path: weights[path]}, inputs) for path in weights]
    assert Lsa().measure(weights, inputs) == pytest.approx(sum(alone))
    assert min(alone) > 0


@pytest.mark.parametrize("sizes", [SIZES, [300] * 5])
@pytest.mark.parametrize("budget", [Lsa(0.1), Lsa(0.05), LsaProjection(0.1)])
def test_lsa_allocates_by_its_formula(budget: Lsa, sizes: list[int]) -> None:
    errors, n, target = np.array(MEASURES), np.array(sizes), 0.7
    importance = 1 - errors / errors.sum()
    d = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * budget.beta
    expected = (target * n + (d.mean() - d) * n.mean()) / n
    allocated = budget.allocate(MEASURES, sizes, target)
    np.testing.assert_allclose(allocated, expected, rtol=0, atol=1e-12)
    assert weighted_mean(allocated, sizes) == pytest.approx(target)


# ---- all budgets -----------------------------------------------------------------------------------------------------

BUDGETS = [Uniform(), Owl(), AlphaPruning(), Dlp(), Lsa(), LsaProjection()]
ALLOCATORS = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.name)


@pytest.mark.parametrize("parameters", [{"alpha": -0.1}, {"alpha": 1.0}])
def test_dlp_refuses_an_alpha_that_is_no_share(parameters: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^DLP needs an alpha in \[0, 1\), not "):
        Dlp(**parameters)


@pytest.mark.parametrize("kind", [Lsa, LsaProjection])
def test_lsa_refuses_a_beta_that_is_no_share(kind: type[Lsa]) -> None:
    with pytest.raises(UsageError, match=r"^LSA needs a beta in \[0, 1\), not 1.5"):
        kind(1.5)


def test_auto_tries_every_other_budget_and_uniform_first() -> None:
    names = [budget.name for budget in Auto().candidates]
    assert names[0] == "uniform"
    assert sorted([*names, "auto"]) == sorted(LAYER_BUDGETS)


@pytest.mark.parametrize(
    ("sequences", "split"), [(8, (4, 4)), (20, (5, 4)), (40, (10, 5)), (128, (32, 16)), (999, (32, 124))]
)
def test_sequences_are_split_into_trial_and_held_out(sequences: int, split: tuple[int, int]) -> None:
    assert split_sequences(sequences) == split


@pytest.mark.parametrize("sequences", [0, 1, 7])
def test_too_few_sequences_to_choose_by_are_refused(sequences: int) -> None:
    with pytest.raises(
        UsageError, match=rf"needs 8 calibration sequences or more, .* not {sequences}; raise --samples"
    ):
        split_sequences(sequences)


@ALLOCATORS
def test_blocks_that_measure_alike_get_the_target(budget: LayerBudget) -> None:
    assert budget.allocate([0.02] * 3, [5, 6, 7], 0.7) == pytest.approx([0.7] * 3)


@ALLOCATORS
def test_a_single_block_gets_the_target(budget: LayerBudget) -> None:
    assert budget.allocate([0.02], [5], 0.7) == pytest.approx([0.7])


@ALLOCATORS
def test_the_mean_over_blocks_of_one_size_is_the_target(budget: LayerBudget) -> None:
    assert np.mean(budget.allocate(MEASURES, [1000] * 5, 0.6)) == pytest.approx(0.6)


# ---- recentre --------------------------------------------------------------------------------------------------------


@st.composite
def block_budgets(draw: st.DrawFn) -> tuple[list[float], list[int], float, float]:
    """Sparsities around a target as budgets make them, some outside [0, cap]."""
    cap = draw(st.sampled_from([0.95, 0.97, 0.8]))
    target = draw(st.floats(0, cap))
    # Within a block's size of the target, or far outside the box, as small matrices of a projection-wise budget get.
    offsets = draw(st.sampled_from([st.floats(-0.3, 0.3), st.floats(-20, 20)]))
    blocks = draw(st.lists(st.tuples(offsets, st.integers(1, 10**7)), min_size=1, max_size=12), label="blocks")
    return [target + offset for offset, _ in blocks], [size for _, size in blocks], target, cap


@given(block_budgets())
def test_recentred_sparsities_have_the_target_as_weighted_mean(
    budgets: tuple[list[float], list[int], float, float],
) -> None:
    sparsities, sizes, target, cap = budgets
    assert weighted_mean(recentre(sparsities, sizes, target, cap), sizes) == pytest.approx(target, rel=0, abs=1e-6)


@given(block_budgets())
def test_recentred_sparsities_stay_in_the_box_in_their_order(
    budgets: tuple[list[float], list[int], float, float],
) -> None:
    sparsities, sizes, target, cap = budgets
    result = recentre(sparsities, sizes, target, cap)
    assert all(0 <= sparsity <= cap for sparsity in result)
    by_sparsity = [moved for _, moved in sorted(zip(sparsities, result, strict=True))]
    assert by_sparsity == sorted(by_sparsity)


@given(block_budgets())
def test_recentring_again_changes_nothing(budgets: tuple[list[float], list[int], float, float]) -> None:
    sparsities, sizes, target, cap = budgets
    once = recentre(sparsities, sizes, target, cap)
    np.testing.assert_allclose(recentre(once, sizes, target, cap), once, rtol=0, atol=1e-9)


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 10**6)), min_size=1, max_size=8),
    st.floats(0, 0.95),
    st.one_of(
        st.builds(Owl, strength=st.floats(0, 0.5)),
        st.builds(AlphaPruning, epsilon=st.floats(0, 0.99)),
        st.builds(Dlp, alpha=st.floats(0, 0.5)),
        st.builds(Lsa, beta=st.floats(0, 0.5)),
        st.builds(LsaProjection, beta=st.floats(0, 0.5)),
    ),
)
def test_any_budget_can_be_recentred(blocks: list[tuple[float, int]], target: float, budget: LayerBudget) -> None:
    measures, sizes = [measure for measure, _ in blocks], [size for _, size in blocks]
    result = recentre(budget.allocate(measures, sizes, target), sizes, target, 0.95)
    assert weighted_mean(result, sizes) == pytest.approx(target, rel=0, abs=1e-6)
    assert all(0 <= sparsity <= 0.95 for sparsity in result)
