"""The search against the authors' own numbers and against the literal loop; both policies; degenerate matrices."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles.trim_literal import LiteralSearch, literal_search
from safetensors import safe_open
from torch import Tensor

from trim_export.curves import Curves, curves
from trim_export.models import DenseModel
from trim_export.row_budgets import keep_mask
from trim_export.trim import EXACT, PAPER, ROW_CAP, Policy, TrimSearch, exact_counts, quality_of, trim_search

# ---- the authors' numbers --------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "golden" / "trim_reference.safetensors"
LAYERS = ["L0.k", "L0.v", "L0.down", "L4.q", "L4.k", "L4.v", "L17.v", "L17.o", "L29.k"]
CASES = [f"{layer}.{sparsity}" for layer in LAYERS for sparsity in ("0.7", "0.8")]


@dataclass(frozen=True)
class Golden:
    """One search of the authors' code, and what ours finds on the same matrix."""

    weight: Tensor
    score: Tensor
    inputs: Tensor
    target: float
    pruned: Tensor
    keep: Tensor
    expected: dict[str, float | None]
    search: TrimSearch


@pytest.fixture(scope="module")
def golden(smollm2: DenseModel) -> dict[str, Golden]:
    return {case: run_golden(case, smollm2) for case in CASES}


def run_golden(case: str, dense: DenseModel) -> Golden:
    block, name, sparsity = case.split(".", 2)
    weight = golden_weight(dense, int(block[1:]), name)
    shared = "attention" if name in "qkv" else name
    with safe_open(GOLDEN, "pt") as file:
        expected = json.loads(file.metadata()[case])
        inputs = file.get_tensor(f"{block}.{shared}.inputs")
        score = weight.abs() * file.get_tensor(f"{block}.{shared}.mean_square").sqrt()
        pruned = file.get_tensor(f"{case}.num_prune")
        packed = file.get_tensor(f"{case}.keep_packed").numpy()
    keep = torch.from_numpy(np.unpackbits(packed, axis=1, count=weight.shape[1]).astype(bool))
    search = trim_search(curves(weight, ascending(score), inputs), float(sparsity), PAPER)
    return Golden(weight, score, inputs, float(sparsity), pruned, keep, expected, search)


def golden_weight(dense: DenseModel, block: int, name: str) -> Tensor:
    path = "mlp.down_proj" if name == "down" else f"self_attn.{name}_proj"
    weight = dense.model.get_parameter(f"model.layers.{block}.{path}.weight")
    return weight[: {"o": 192, "down": 128}.get(name)]


def ascending(score: Tensor) -> Tensor:
    return score.argsort(dim=1, stable=True)


def test_golden_file_holds_these_cases() -> None:
    with safe_open(GOLDEN, "pt") as file:
        assert set(file.metadata()) == {*CASES, "source"}


@pytest.mark.parametrize("case", CASES)
def test_paper_policy_finds_the_authors_learning_rate(golden: dict[str, Golden], case: str) -> None:
    assert golden[case].search.learning_rate == golden[case].expected["learning_rate"]


@pytest.mark.parametrize("case", CASES)
def test_paper_policy_finds_the_authors_cosines(golden: dict[str, Golden], case: str) -> None:
    search, expected = golden[case].search, golden[case].expected
    assert search.cosine == pytest.approx(expected["best_metric"], rel=0, abs=1e-6)
    assert search.uniform_cosine == pytest.approx(expected["baseline_metric"], rel=0, abs=1e-6)


def test_paper_policy_prunes_as_many_weights_of_each_row_as_the_authors(golden: dict[str, Golden]) -> None:
    # N * s_i next to an integer may fall on either side: rarely, and by no more than one.
    differences = torch.cat([result.search.pruned - result.pruned for result in golden.values()])
    assert len(differences) > 4000
    assert differences.abs().max() <= 1
    assert (differences == 0).double().mean() >= 0.99


@pytest.mark.parametrize("case", CASES)
def test_paper_policy_prunes_the_same_weights_as_the_authors(golden: dict[str, Golden], case: str) -> None:
    result = golden[case]
    agree = result.search.pruned == result.pruned
    keep = keep_mask(ascending(result.score), result.search.pruned)
    assert agree.any()
    assert torch.equal(keep[agree], result.keep[agree])


@pytest.mark.parametrize("case", ["L0.k.0.8", "L0.down.0.7", "L17.o.0.7"])  # uniform stays; a negative rate; a positive
def test_the_literal_loop_finds_the_authors_numbers(golden: dict[str, Golden], case: str) -> None:
    """The oracle below is worth something only if it is itself right."""
    result = golden[case]
    literal = literal_search(result.weight, ascending(result.score), result.inputs, result.target)
    assert literal.learning_rate == result.expected["learning_rate"]
    assert literal.cosine == pytest.approx(result.expected["best_metric"], rel=0, abs=1e-9)
    assert_counts_agree(literal.pruned, result.pruned)


# ---- the literal loop ------------------------------------------------------------------------------------------------


def problem(rows: int, columns: int, samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, score and inputs whose rows differ in how much pruning hurts them."""
    draw = torch.Generator().manual_seed(seed)
    tail = torch.rand(rows, 1, generator=draw) * 2
    weight = torch.randn(rows, columns, generator=draw) * (tail * torch.randn(rows, columns, generator=draw)).exp()
    inputs = torch.randn(columns, samples, generator=draw) * torch.randn(columns, 1, generator=draw).exp()
    inputs += 0.5 * torch.randn(columns, 1, generator=draw) * torch.randn(1, samples, generator=draw)
    return weight, weight.abs() * inputs.square().mean(dim=1).sqrt(), inputs


def search_both(
    weight: Tensor, score: Tensor, inputs: Tensor, target: float, policy: Policy = PAPER
) -> tuple[TrimSearch, LiteralSearch]:
    search = trim_search(curves(weight, ascending(score), inputs), target, policy)
    return search, literal_search(weight, ascending(score), inputs, target)


def assert_counts_agree(actual: Tensor, expected: Tensor) -> None:
    difference = (actual - expected).abs()
    assert difference.max() <= 1
    assert difference.sum() <= max(1, 0.02 * len(difference))


# Seeds where no two candidates are so close that the last bit of a float32 sum decides between them.
@pytest.mark.parametrize(
    ("rows", "columns", "samples", "target", "seed", "rate"),
    [
        (8, 32, 16, 0.9, 1, None),
        (24, 64, 20, 0.7, 2, None),
        (100, 24, 128, 0.7, 1, None),
        (8, 32, 16, 0.7, 0, 0.01),
        (64, 200, 33, 0.8, 7, 0.01),
        (100, 24, 128, 0.9, 11, 0.01),
        (24, 64, 20, 0.5, 1, 0.02),
        (40, 48, 64, 0.9, 1, 0.02),
        (64, 200, 33, 0.7, 2, 0.02),
        (3, 100, 8, 0.7, 10, 0.04),
        (100, 24, 128, 0.8, 2, 0.04),
        (24, 64, 20, 0.6, 1, 0.08),
        (3, 64, 4, 0.5, 4, 0.08),
        (4, 100, 8, 0.8, 40, 0.12),
        (6, 80, 4, 0.7, 49, 0.12),
        (2, 100, 20, 0.7, 48, 0.16),
        (6, 80, 4, 0.8, 25, 0.16),
        (24, 64, 20, 0.9, 1, -0.01),
        (30, 150, 40, 0.9, 1, -0.01),
        (64, 200, 33, 0.9, 6, -0.02),
        (8, 32, 16, 0.9, 11, -0.02),
        (8, 32, 16, 0.8, 5, -0.04),
        (64, 200, 33, 0.9, 4, -0.04),
    ],
)
def test_looking_up_finds_what_the_literal_loop_finds(
    rows: int, columns: int, samples: int, target: float, seed: int, rate: float | None
) -> None:
    search, literal = search_both(*problem(rows, columns, samples, seed), target)
    assert search.learning_rate == literal.learning_rate == rate
    assert search.cosine == pytest.approx(literal.cosine, rel=0, abs=1e-6)
    assert search.uniform_cosine == pytest.approx(literal.uniform_cosine, rel=0, abs=1e-6)
    assert_counts_agree(search.pruned, literal.pruned)


@pytest.mark.parametrize("target", [0.0, 0.05, 0.999])
def test_extreme_targets_follow_the_literal_loop_too(target: float) -> None:
    search, literal = search_both(*problem(20, 40, 16, seed=2), target)
    assert search.learning_rate == literal.learning_rate
    assert_counts_agree(search.pruned, literal.pruned)


@pytest.mark.parametrize("policy", [PAPER, EXACT], ids=["paper", "exact"])
def test_the_same_problem_gives_the_same_answer(policy: Policy) -> None:
    weight, score, inputs = problem(40, 48, 64, seed=1)
    one, other = (trim_search(curves(weight, ascending(score), inputs), 0.9, policy) for _ in range(2))
    assert torch.equal(one.pruned, other.pruned)
    assert torch.equal(one.sparsity, other.sparsity)
    assert (one.cosine, one.learning_rate) == (other.cosine, other.learning_rate)


@pytest.mark.parametrize("policy", [PAPER, EXACT], ids=["paper", "exact"])
@pytest.mark.parametrize("target", [0.7, 0.9])
def test_the_reported_cosine_is_that_of_the_masked_weight(policy: Policy, target: float) -> None:
    weight, score, inputs = problem(30, 150, 40, seed=1)
    search = trim_search(curves(weight, ascending(score), inputs), target, policy)
    masked = weight * keep_mask(ascending(score), search.pruned)
    dense, sparse = (weight.double() @ inputs.double()).flatten(), (masked.double() @ inputs.double()).flatten()
    assert search.learning_rate is not None
    assert search.cosine == pytest.approx(float(dense @ sparse / dense.norm() / sparse.norm()), abs=1e-5)


def test_a_positive_rate_prunes_well_preserved_rows_more() -> None:
    # Row 0 lives on four of its weights, row 1 on all of them.
    weight = torch.ones(2, 40)
    weight[0, 4:] = 0.01
    inputs = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    search = trim_search(curves(weight, ascending(weight), inputs), 0.5, PAPER)
    assert search.learning_rate is not None
    assert search.learning_rate > 0
    assert search.pruned[0] > 20 > search.pruned[1]


# ---- the exact policy ------------------------------------------------------------------------------------------------

targets = st.one_of(st.floats(0, ROW_CAP), st.sampled_from([0.0, 0.5, 0.7, 0.8, ROW_CAP]))


@st.composite
def sparsities(draw: st.DrawFn, low: float = -0.5, high: float = 1.5, max_rows: int = 30) -> Tensor:
    numbers = st.one_of(st.floats(low, high), st.sampled_from([0.0, 0.5]))
    return torch.tensor(draw(st.lists(numbers, min_size=1, max_size=max_rows)))


@given(sparsities(), targets)
def test_projection_stays_in_the_box_and_has_the_target_as_mean(sparsity: Tensor, target: float) -> None:
    projected = EXACT.project(sparsity, target)
    assert projected.dtype == sparsity.dtype
    assert projected.min() >= 0
    assert projected.max() <= np.float32(ROW_CAP)
    assert float(projected.double().mean()) == pytest.approx(target, rel=0, abs=1e-6)


@given(sparsities(), targets)
def test_projection_is_the_nearest_vector_of_the_box_with_that_mean(sparsity: Tensor, target: float) -> None:
    """That vector is one shift and a clip; the shift is found here by bisection."""
    values = sparsity.double().numpy()
    low, high = -values.max(), ROW_CAP - values.min()
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (shift, high) if (values + shift).clip(0, ROW_CAP).mean() < target else (low, shift)
    nearest = torch.from_numpy((values + high).clip(0, ROW_CAP))
    torch.testing.assert_close(EXACT.project(sparsity.double(), target), nearest, rtol=0, atol=1e-6)


@given(sparsities(0, ROW_CAP))
def test_projection_leaves_a_fitting_vector_alone(sparsity: Tensor) -> None:
    projected = EXACT.project(sparsity, float(sparsity.double().mean()))
    torch.testing.assert_close(projected, sparsity, rtol=0, atol=1e-6)


@given(sparsities(), st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.booleans())
def test_exact_counts_sum_to_the_target_within_their_bounds(
    sparsity: Tensor, columns: int, target: float, uniform: bool
) -> None:
    if uniform:
        sparsity = torch.full_like(sparsity, target)
    counts = exact_counts(sparsity, columns, target)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == round(target * sparsity.numel() * columns)
    assert counts.min() >= 0
    assert counts.max() <= max(math.floor(0.95 * columns), math.ceil(target * columns))


@given(sparsities(max_rows=4), st.integers(1, 7), targets)
def test_exact_counts_are_the_nearest_ones(sparsity: Tensor, columns: int, target: float) -> None:
    """Against every vector of counts that sums to the target."""
    wanted = EXACT.project(sparsity, target)
    counts = exact_counts(wanted, columns, target)
    cap = max(math.floor(0.95 * columns), math.ceil(target * columns))
    candidates = np.array(list(itertools.product(range(cap + 1), repeat=len(wanted))))
    candidates = candidates[candidates.sum(axis=1) == round(target * len(wanted) * columns)]
    distances = np.square(candidates - wanted.double().numpy() * columns).sum(axis=1)
    distance = np.square(counts.numpy() - wanted.double().numpy() * columns).sum()
    assert distance <= distances.min() + 1e-5


@pytest.mark.parametrize(("rows", "columns", "target"), [(7, 10, 0.5), (64, 576, 0.7), (3, 576, 0.8), (5, 3, 0.99)])
def test_exact_counts_of_equal_rows_differ_by_at_most_one(rows: int, columns: int, target: float) -> None:
    counts = exact_counts(torch.full((rows,), target), columns, target)
    assert counts.max() - counts.min() <= 1
    assert int(counts.sum()) == round(target * rows * columns)


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6)),
    st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.8, 0.9, ROW_CAP]),
)
@example((6, 38, 1, 1), 0.7)  # a tie that float32 and float64 break differently
@settings(max_examples=60)
def test_the_exact_search_meets_its_target_and_is_never_worse_than_uniform(
    shape: tuple[int, int, int, int], target: float
) -> None:
    weight, score, inputs = problem(*shape)
    rows, columns = weight.shape
    layer = curves(weight, ascending(score), inputs)
    search = trim_search(layer, target, EXACT)
    assert int(search.pruned.sum()) == round(target * rows * columns)
    assert search.pruned.max() <= max(math.floor(0.95 * columns), math.ceil(target * columns))
    even = exact_counts(torch.full((rows,), target), columns, target)
    assert quality_of(layer)(search.pruned)[1] >= quality_of(layer)(even)[1]
    assert search.cosine == quality_of(layer)(search.pruned)[1]
    assert search.uniform_cosine == quality_of(layer)(even)[1]


@pytest.mark.parametrize(("shape", "target"), [((24, 64, 20, 1), 0.6), ((3, 100, 8, 10), 0.7)])
def test_the_exact_search_finds_something_better_than_uniform(shape: tuple[int, int, int, int], target: float) -> None:
    weight, score, inputs = problem(*shape)
    search = trim_search(curves(weight, ascending(score), inputs), target, EXACT)
    assert search.learning_rate is not None
    assert search.cosine > search.uniform_cosine + 1e-4
    assert len(search.pruned.unique()) > 2


# ---- the paper's policy ----------------------------------------------------------------------------------------------


def test_paper_counts_are_truncated_in_float32() -> None:
    assert PAPER.counts(torch.tensor([0.8, 0.7999, 0.0, -0.01, 1.2]), 576, 0.8).tolist() == [460, 460, 0, 0, 576]
    # 0.7 is below 7/10 in float32, but ten times it rounds to 7 there; in float64 it would be 6.
    assert PAPER.counts(torch.tensor([0.7]), 10, 0.7).tolist() == [int(np.float32(10) * np.float32(0.7))] == [7]


def test_paper_projection_may_leave_the_box_as_the_authors_does() -> None:
    projected = PAPER.project(torch.tensor([1.2, 0.9, 0.0, -0.5]), 0.7)
    torch.testing.assert_close(projected, torch.tensor([1.1875, 1.1375, 0.2375, 0.2375]))


# ---- degenerate matrices ---------------------------------------------------------------------------------------------

POLICIES = pytest.mark.parametrize("policy", [PAPER, EXACT], ids=["paper", "exact"])


def assert_valid(search: TrimSearch, shape: tuple[int, int], target: float, policy: Policy) -> None:
    rows, columns = shape
    assert search.sparsity.isfinite().all()
    assert math.isfinite(search.cosine)
    assert math.isfinite(search.uniform_cosine)
    assert search.pruned.shape == search.sparsity.shape == (rows,)
    assert search.pruned.min() >= 0
    assert search.pruned.max() <= columns
    if policy is EXACT:
        assert int(search.pruned.sum()) == round(target * rows * columns)


@POLICIES
@pytest.mark.parametrize("zero_rows", [1, 5, 12])
def test_zero_rows_have_cosine_zero_not_nan(policy: Policy, zero_rows: int) -> None:
    weight, score, inputs = problem(12, 30, 10, seed=3)
    weight[:zero_rows] = score[:zero_rows] = 0.0
    search = trim_search(curves(weight, ascending(score), inputs), 0.7, policy)
    assert_valid(search, (12, 30), 0.7, policy)
    if zero_rows == 12:
        assert (search.cosine, search.learning_rate) == (0.0, None)


@POLICIES
def test_zero_inputs_keep_uniform(policy: Policy) -> None:
    weight, score, inputs = problem(12, 30, 10, seed=3)
    search = trim_search(curves(weight, ascending(score), torch.zeros_like(inputs)), 0.7, policy)
    assert_valid(search, (12, 30), 0.7, policy)
    assert (search.cosine, search.uniform_cosine, search.learning_rate) == (0.0, 0.0, None)
    assert search.pruned.tolist() == [21] * 12 if policy is EXACT else (search.pruned >= 20).all()


@POLICIES
@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize(("rows", "columns", "samples"), [(1, 40, 8), (40, 1, 8), (1, 1, 1), (6, 20, 1), (2, 2, 3)])
def test_one_row_one_column_or_one_sample_works(
    policy: Policy, target: float, rows: int, columns: int, samples: int
) -> None:
    weight, score, inputs = problem(rows, columns, samples, seed=5)
    search = trim_search(curves(weight, ascending(score), inputs), target, policy)
    assert_valid(search, (rows, columns), target, policy)


def test_the_only_row_gets_the_target() -> None:
    weight, score, inputs = problem(1, 40, 8, seed=5)
    search = trim_search(curves(weight, ascending(score), inputs), 0.7, EXACT)
    assert search.pruned.tolist() == [28]
    assert search.learning_rate is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@POLICIES
def test_search_on_a_gpu(policy: Policy) -> None:
    weight, score, inputs = problem(24, 64, 20, seed=1)
    layer = curves(weight, ascending(score), inputs)
    on_gpu = Curves(layer.numerator.cuda(), layer.norm2.cuda(), layer.target_norm2.cuda())
    here, there = trim_search(layer, 0.6, policy), trim_search(on_gpu, 0.6, policy)
    assert there.learning_rate == here.learning_rate
    assert_counts_agree(there.pruned.cpu(), here.pruned)
