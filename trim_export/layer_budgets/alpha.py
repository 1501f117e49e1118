"""AlphaPruning: budgets from the spectra of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.errors import UsageError
from trim_export.layer_budgets.budget import LayerBudget
from trim_export.statistics import InputStatistics

__all__ = ["AlphaPruning", "hill_alpha"]


@dataclass(frozen=True)
class AlphaPruning(LayerBudget):
    """Blocks with heavier-tailed spectra keep more (AlphaPruning, arXiv 2410.10912); needs no data.

    Attributes:
        epsilon: half the relative spread of the sparsities.

    Raises:
        UsageError: parameters outside their range.
    """

    epsilon: float = 0.1
    name: str = "alpha"
    needs_inputs: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise UsageError(f"AlphaPruning needs an epsilon in [0, 1), not {self.epsilon}")

    def measure(self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]) -> float:
        """Mean tail exponent of the block's matrices."""
        return sum(hill_alpha(weight) for weight in weights.values()) / len(weights)

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Sparsities proportional to a linear map of alpha onto [1 - epsilon, 1 + epsilon], scaled to the target."""
        low, high = min(measures), max(measures)
        ratios = [(m - low) / (high - low or 1.0) * 2 * self.epsilon + 1 - self.epsilon for m in measures]
        scale = target * sum(sizes) / sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True))
        return [ratio * scale for ratio in ratios]


def hill_alpha(weight: Tensor, bins: int = 100) -> float:
    """Power-law exponent of the tail of a matrix's squared singular values (AlphaPruning, section 3.1).

    The tail's start is sought around the peak of the log-histogram (the authors' ``xmin_peak``) and taken where the
    fitted law is closest in Kolmogorov-Smirnov distance. As in their code the lower end of that range is a logarithm
    compared with eigenvalues, which in practice leaves it open.
    """
    eigenvalues = torch.linalg.svdvals(weight.float()).square().flip(0).cpu()
    eigenvalues = eigenvalues[eigenvalues > 0]
    if len(eigenvalues) < 2:
        return 0.0
    logs = eigenvalues.log()
    exponents = eigenvalues.log10()
    counts = torch.histc(exponents, bins, min=float(exponents.min()), max=float(exponents.max()))
    peak = 10 ** torch.linspace(float(exponents.min()), float(exponents.max()), bins + 1)[counts.argmax()]
    lowest, highest = torch.log10(0.95 * peak), 1.5 * peak
    best_distance, best_alpha = float("inf"), 0.0
    for start in range(len(eigenvalues) - 1):
        if eigenvalues[start] < lowest:
            continue
        if eigenvalues[start] > highest:
            break
        tail = len(eigenvalues) - start
        spread = logs[start:].sum() - tail * logs[start]
        if spread <= 0:  # all that is left are equal: no tail
            break
        alpha = 1 + tail / spread
        # Where the estimator is below 1 the authors leave the distance at 1: never the best of several.
        distance = 1.0
        if alpha > 1:
            law = 1 - (eigenvalues[start:] / eigenvalues[start]) ** (1 - alpha)
            distance = float((law - torch.arange(tail) / tail).abs().max())
        if distance < best_distance:
            best_distance, best_alpha = distance, float(alpha)
    return best_alpha
