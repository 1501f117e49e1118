"""The sparsity of each decoder block, with the target as their mean.

A budget first measures every block of the dense model (one number a block, so nothing large is kept), then allocates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trim_export.errors import UsageError

__all__ = ["LAYER_BUDGETS", "AlphaPruning", "LayerBudget", "Owl", "Uniform", "hill_alpha", "recentre"]


class LayerBudget(Protocol):
    """A frozen dataclass of parameters with the two steps as methods."""

    @property
    def name(self) -> str:
        """The word a user types for it."""
        ...

    @property
    def needs_inputs(self) -> bool:
        """Whether measuring takes a pass of the calibration windows through the dense model."""
        ...

    def measure(self, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> float:
        """Measure one dense block from its float32 matrices and, if ``needs_inputs``, their Wanda scores."""
        ...

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Sparsity of each block from all measures; ``sizes`` are the blocks' numbers of weights."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every block gets the target."""

    name: str = "uniform"
    needs_inputs: bool = False

    def measure(self, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> float:
        """Nothing to measure."""
        return 0.0

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """The target for all."""
        return [target] * len(measures)


@dataclass(frozen=True)
class Owl:
    """Blocks with more outlying scores keep more (OWL, arXiv 2310.05175).

    Attributes:
        strength: half the spread of densities, lambda in the paper.
        threshold: a score is an outlier above this many times the block's mean, M in the paper.

    Raises:
        UsageError: parameters outside their range.
    """

    strength: float = 0.08
    threshold: float = 5.0
    name: str = "owl"
    needs_inputs: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.strength < 1 and self.threshold > 0):
            raise UsageError(
                f"OWL needs a strength in [0, 1) and a threshold above 0, not {self.strength}, {self.threshold}"
            )

    def measure(self, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> float:
        """Share of outliers among all Wanda scores of the block."""
        total = sum(score.numel() for score in scores.values())
        mean = sum(float(score.double().sum()) for score in scores.values()) / total
        return sum(int((score > self.threshold * mean).sum()) for score in scores.values()) / total

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Densities spread linearly over ``2 * strength`` between the least and the most outlying block."""
        return [target - spread for spread in _spread(measures, 2 * self.strength)]


@dataclass(frozen=True)
class AlphaPruning:
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

    def measure(self, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> float:
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


def recentre(sparsities: Sequence[float], sizes: Sequence[int], target: float, cap: float) -> list[float]:
    """Move block sparsities into [0, cap] by one common shift, so that their size-weighted mean is ``target``."""
    low, high = -1.0, 1.0
    for _ in range(60):
        shift = (low + high) / 2
        kept = [min(max(s + shift, 0.0), cap) for s in sparsities]
        mean = sum(k * size for k, size in zip(kept, sizes, strict=True)) / sum(sizes)
        low, high = (shift, high) if mean < target else (low, shift)
    return [min(max(s + high, 0.0), cap) for s in sparsities]


def _spread(measures: Sequence[float], width: float) -> list[float]:
    """Map measures linearly onto an interval of the given width, centred on their mean."""
    low, high = min(measures), max(measures)
    scaled = [(m - low) / (high - low or 1.0) * width for m in measures]
    mean = sum(scaled) / len(scaled)
    return [s - mean for s in scaled]


LAYER_BUDGETS: dict[str, type[Uniform] | type[Owl] | type[AlphaPruning]] = {
    "uniform": Uniform,
    "owl": Owl,
    "alpha": AlphaPruning,
}
