"""The same sparsity everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from trim_export.layer_budgets.budget import LayerBudget
from trim_export.statistics import InputStatistics

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform(LayerBudget):
    """Every block gets the target."""

    name: str = "uniform"
    needs_inputs: bool = False

    def measure(self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]) -> float:
        """Nothing to measure."""
        return 0.0

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """The target for all."""
        return [target] * len(measures)
