"""Layer-wise sparsity allocation by the error that pruning half of the weights would make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trim_export.errors import UsageError
from trim_export.layer_budgets.budget import LayerBudget
from trim_export.layer_budgets.centring import centred
from trim_export.row_budgets import keep_mask
from trim_export.scores import wanda
from trim_export.statistics import InputStatistics
from trim_export.updates import LayerProblem, Refit, Support

__all__ = ["Lsa", "LsaProjection", "least_error"]


@dataclass(frozen=True)
class Lsa(LayerBudget):
    """Blocks that lose least when pruned to one half keep more (LSA, Yang et al., ICLR 2026).

    The paper reads a large error as many weights of equal, low importance. It searches the half to prune greedily and
    leaves the others as they are; here the half is Wanda's and the rest is refitted (`least_error`), so the errors are
    not the paper's numbers. For weights that are not updated. Under ADMM it made things worse: at beta .1 and 80 %
    sparsity SmolLM2-135M had perplexity 84 against 77 with uniform blocks (one calibration draw).

    Attributes:
        beta: half the spread of sparsities between blocks of one size; the authors' code takes .1 at 65 % sparsity, and
            their paper finds results stable up to .17.

    Raises:
        UsageError: beta outside its range.
    """

    beta: float = 0.1
    name: str = "lsa"
    needs_inputs: bool = True
    needs_grams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UsageError(f"LSA needs a beta in [0, 1), not {self.beta}")

    def measure(self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]) -> float:
        """Squared error of the part's outputs, summed over its matrices."""
        return sum(least_error(weight, inputs[path]) for path, weight in weights.items())

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Counts of pruned weights spread linearly over ``2 * beta`` of the mean size, most where the error is largest.

        In the paper's terms s = (p N + (mean(d) - d) mean(N)) / N with d = 2 beta times the importance 1 - E / sum E
        mapped onto [0, 1]; that mapping undoes all of the importance but the sign of E.
        """
        mean = sum(sizes) / len(sizes)
        return [
            target + spread * mean / size for spread, size in zip(centred(measures, 2 * self.beta), sizes, strict=True)
        ]


@dataclass(frozen=True)
class LsaProjection(Lsa):
    """LSA with a sparsity for each matrix of each block; small matrices move further than ``beta``."""

    name: str = "lsa-projection"
    by_projection: ClassVar[bool] = True


def least_error(weight: Tensor, inputs: InputStatistics) -> float:
    """|(W - V) X|^2 where V keeps the better half of each row by Wanda's scores, refitted by conjugate gradients.

    Args:
        weight: float32 ``[rows, columns]``.
        inputs: with their Gram matrix.
    """
    assert inputs.gram is not None
    rows, columns = weight.shape
    order = wanda(weight, inputs).argsort(dim=1, stable=True)
    mask = keep_mask(order, torch.full((rows,), columns // 2, device=weight.device))
    problem = LayerProblem(weight, inputs.gram, weight @ inputs.gram)
    lost = weight - Refit()(problem, Support(mask, by_row=True)).weight
    return max(0.0, float(((lost @ inputs.gram) * lost).sum(dtype=torch.float64)))
