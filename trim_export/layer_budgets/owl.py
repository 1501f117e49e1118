"""Outlier-weighed layerwise sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from trim_export.errors import UsageError
from trim_export.layer_budgets.budget import LayerBudget
from trim_export.layer_budgets.centring import centred
from trim_export.scores import wanda
from trim_export.statistics import InputStatistics

__all__ = ["Owl"]


@dataclass(frozen=True)
class Owl(LayerBudget):
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

    def measure(self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]) -> float:
        """Share of outliers among all Wanda scores of the block."""
        scores = [wanda(weight, inputs[path]) for path, weight in weights.items()]
        total = sum(score.numel() for score in scores)
        mean = sum(float(score.double().sum()) for score in scores) / total
        return sum(int((score > self.threshold * mean).sum()) for score in scores) / total

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Densities spread linearly over ``2 * strength`` between the least and the most outlying block."""
        return [target - spread for spread in centred(measures, 2 * self.strength)]
