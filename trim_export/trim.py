"""TRIM: targeted row-wise iterative metric-driven pruning (arXiv 2505.16743, Algorithm 1).

Every output row of a linear layer gets its own sparsity. The search starts from the uniform vector and repeats

    quality  q_i = cos(y_i, yhat_i)                      of each row, on the calibration inputs
    step     s_i <- s_i + lr * 2 (q_i - min q) / (max q - min q), recentred to the layer's target

for ten iterations at each learning rate, keeping the vector with the best whole-layer cosine. A positive rate prunes
well-preserved rows more and evens the rows out; negative rates are tried only when no positive one beats uniform.

The authors multiply a freshly masked weight with the inputs at every step. Here each metric is a look-up instead: with
the rows' weights sorted by importance, `curves` holds <y_i, yhat_i(k)> and |yhat_i(k)|^2 for every number k of pruned
weights, so any candidate vector costs two gathers.

Two policies decide what a sparsity vector means. `PAPER` follows the authors' code to the bit, including where it
breaks its own promise: clipping to [0, 0.95] and then recentring can leave that interval, and truncating N * s_i prunes
about half a weight per row too few. `EXACT` projects onto the box with the right mean and rounds by largest remainder,
so that the counts sum to the target and no row exceeds the cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.curves import Curves

__all__ = ["EXACT", "PAPER", "ROW_CAP", "Policy", "TrimSearch", "exact_counts", "quality_of", "row_cap", "trim_search"]

LEARNING_RATES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
NEGATIVE_RATES = (-0.01, -0.02, -0.04)
ITERATIONS = 10
ROW_CAP = 0.95
"""No row is pruned beyond this share, so that every output keeps some input (paper, section 3.2)."""


@dataclass(frozen=True)
class Policy:
    """How a sparsity vector is kept valid and turned into counts.

    Attributes:
        project: ``(sparsity [rows], target) -> sparsity [rows]`` with mean ``target``.
        counts: ``(sparsity [rows], columns, target) -> int64 [rows]`` pruned weights of each row.
        finish: ``(best sparsity [rows], target) -> sparsity [rows]``, applied once when the search is over.
    """

    project: Callable[[Tensor, float], Tensor]
    counts: Callable[[Tensor, int, float], Tensor]
    finish: Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class TrimSearch:
    """What the search found for one layer.

    Attributes:
        sparsity: float32 ``[rows]``.
        pruned: int64 ``[rows]`` weights to prune in each row.
        cosine: whole-layer cosine of the best vector found.
        uniform_cosine: the same for uniform sparsity.
        learning_rate: the rate that found it; None when uniform stayed best.
    """

    sparsity: Tensor
    pruned: Tensor
    cosine: float
    uniform_cosine: float
    learning_rate: float | None


def trim_search(curves: Curves, target: float, policy: Policy) -> TrimSearch:
    """Find the row sparsities of one layer whose mean is ``target``, from its `Curves`."""
    rows, columns = curves.numerator.shape[0], curves.numerator.shape[1] - 1
    uniform = torch.full((rows,), target, dtype=torch.float32, device=curves.numerator.device)

    of_counts = quality_of(curves)

    def quality(sparsity: Tensor) -> tuple[Tensor, float]:
        return of_counts(policy.counts(sparsity, columns, target))

    def descend(rate: float) -> tuple[float, Tensor]:
        """Best vector of ``ITERATIONS`` steps at one learning rate, each rate starting from uniform."""
        sparsity = best_sparsity = uniform
        row_quality, best = start
        for _ in range(ITERATIONS):
            low, high = row_quality.aminmax()
            step = (row_quality - low) / (high - low + 1e-6) * (2 * rate)
            sparsity = policy.project(sparsity + (step - step.mean()), target)
            row_quality, whole = quality(sparsity)
            if whole > best:
                best, best_sparsity = whole, sparsity
        return best, best_sparsity

    start = quality(uniform)
    uniform_cosine = start[1]
    best, best_sparsity, best_rate = uniform_cosine, uniform, None
    for rates in (LEARNING_RATES, NEGATIVE_RATES):
        previous = -float("inf")
        for rate in rates:
            whole, sparsity = descend(rate)
            if whole > best:
                best, best_sparsity, best_rate = whole, sparsity, rate
            if whole <= previous:
                break  # the first rate that does not beat the one before ends the sweep
            previous = whole
        if best_rate is not None:
            break
    final = policy.finish(best_sparsity, target)
    return TrimSearch(final.float(), policy.counts(final, columns, target), best, uniform_cosine, best_rate)


def quality_of(curves: Curves) -> Callable[[Tensor], tuple[Tensor, float]]:
    """A function from counts to the cosines between dense and pruned outputs, of every row and of the whole layer.

    The function takes int64 ``[rows]``, how many of its least important weights each row loses, and gives float64
    ``[rows]`` and one number. A zero row has cosine 0 because each norm carries the authors' 1e-8.
    """
    rows, steps = curves.numerator.shape
    numerators, norms2 = curves.numerator.flatten(), curves.norm2.flatten()
    starts = torch.arange(rows, device=numerators.device) * steps
    row_norms = curves.target_norm2.sqrt() + 1e-8
    whole_norm = float(curves.target_norm2.sum().sqrt()) + 1e-8

    def quality(pruned: Tensor) -> tuple[Tensor, float]:
        at = starts + pruned
        numerator, norm2 = numerators[at].double(), norms2[at].double()
        whole = float(numerator.sum()) / (whole_norm * (math.sqrt(norm2.sum()) + 1e-8))
        return (numerator / (row_norms * (norm2.sqrt() + 1e-8))).clamp(-1, 1), min(max(whole, -1.0), 1.0)

    return quality


def clip_then_recentre(sparsity: Tensor, target: float) -> Tensor:
    """The authors' projection: clip to [0, 0.95], then shift to the mean, which may leave the interval again."""
    clipped = sparsity.clamp(0, ROW_CAP)
    return clipped - clipped.mean() + target


def truncate(sparsity: Tensor, columns: int, target: float) -> Tensor:
    """The authors' counts: the integer part of ``columns * s_i`` in float32."""
    return (columns * sparsity).long().clamp(0, columns)


def project_to_box(sparsity: Tensor, target: float) -> Tensor:
    """Nearest vector in [0, cap] whose mean is ``target``: ``clip(s + t, 0, cap)`` for the one shift t that fits.

    The sum of that vector is piecewise linear in t: each row starts to move at ``t = -s`` and stops at ``cap - s``.
    """
    values = sparsity.double()
    rows = values.numel()
    knots, which = torch.cat((-values, ROW_CAP - values)).sort()
    moving = torch.where(which < rows, 1.0, -1.0).double().cumsum(0)
    sums = torch.cat((values.new_zeros(1), (moving[:-1] * knots.diff()).cumsum(0)))
    at = (torch.searchsorted(sums, target * rows, right=True) - 1).clamp(0, 2 * rows - 2)
    shift = knots[at] + (target * rows - sums[at]) / moving[at].clamp(min=1)
    return (values + shift).clamp(0, ROW_CAP).to(sparsity.dtype)


def row_cap(columns: int, target: float) -> int:
    """Most weights that any row may lose: `ROW_CAP` of the columns, or what a higher target needs at least."""
    return max(int(ROW_CAP * columns), math.ceil(target * columns))


def exact_counts(sparsity: Tensor, columns: int, target: float) -> Tensor:
    """Integer counts nearest to ``columns * s_i`` that sum to ``round(target * size)``, none above `row_cap`.

    Largest remainder: whole parts first, then one more for the rows with the largest fractions; ties go by row.
    """
    rows = sparsity.numel()
    cap = row_cap(columns, target)
    wanted = sparsity.double() * columns
    counts = wanted.floor().clamp(0, cap)
    missing = round(target * rows * columns) - int(counts.sum())
    while missing > 0:
        remainder = torch.where(counts < cap, wanted - counts, -torch.inf)
        more = remainder.argsort(descending=True, stable=True)[: min(missing, int((counts < cap).sum()))]
        counts[more] += 1
        missing -= len(more)
    while missing < 0:
        excess = torch.where(counts > 0, counts - wanted, -torch.inf)
        fewer = excess.argsort(descending=True, stable=True)[: min(-missing, int((counts > 0).sum()))]
        counts[fewer] -= 1
        missing += len(fewer)
    return counts.long()


# The search runs in float64 once the float64 quality enters; the authors' final vector is float32, projected again.
PAPER = Policy(clip_then_recentre, truncate, lambda best, target: clip_then_recentre(best.float(), target))
EXACT = Policy(project_to_box, exact_counts, lambda best, target: best)
