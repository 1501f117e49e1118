"""Importance of each weight, from the weight, its inputs and, for some, its gradients. Low scores are pruned first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trim_export.statistics import InputStatistics

__all__ = ["SCORES", "Formula", "Score", "gblm", "magnitude", "ria", "wanda"]

RIA_EXPONENT = 0.5
GBLM_SCALE = 100.0


class Formula(Protocol):
    """``(weight float32 [rows, columns], inputs, gradient float32 [rows, columns]) -> score float32 [rows, columns]``.

    The gradient is `trim_export.gradients.gradient_norms` of this weight, None for scores that do not ask for it.
    """

    def __call__(self, weight: Tensor, inputs: InputStatistics, gradient: Tensor | None = None) -> Tensor:
        """Score every weight."""
        ...


@dataclass(frozen=True)
class Score:
    """A formula and what it asks for.

    Attributes:
        formula: scores the weights.
        needs_gradients: whether the dense model's gradients have to be measured before pruning begins.
    """

    formula: Formula
    needs_gradients: bool = False


def magnitude(weight: Tensor, inputs: InputStatistics, gradient: Tensor | None = None) -> Tensor:
    """|w|."""
    return weight.abs()


def wanda(weight: Tensor, inputs: InputStatistics, gradient: Tensor | None = None) -> Tensor:
    """|w_ij| * ||x_j||, the norm over all calibration tokens (Wanda, arXiv 2306.11695)."""
    return weight.abs() * inputs.mean_square.sqrt()


def ria(weight: Tensor, inputs: InputStatistics, gradient: Tensor | None = None) -> Tensor:
    """(|w_ij| / sum_k |w_kj| + |w_ij| / sum_k |w_ik|) * ||x_j||^0.5 (RIA; Zhang et al., ICLR 2024, "Plug-and-Play").

    The first sum is over the column, all weights that read input j; the second over the row, all weights of output i.
    The authors compare these scores over a whole matrix unless told otherwise, which is ``matrix`` among the row
    budgets; the others compare them within each row.
    """
    absolute = weight.abs()
    least = torch.finfo(weight.dtype).tiny  # a row or column of zeros has scores of zero
    by_input = absolute / absolute.sum(dim=0, keepdim=True).clamp(min=least)
    by_output = absolute / absolute.sum(dim=1, keepdim=True).clamp(min=least)
    return (by_input + by_output) * inputs.mean_square.sqrt() ** RIA_EXPONENT


def gblm(weight: Tensor, inputs: InputStatistics, gradient: Tensor | None = None) -> Tensor:
    """|w_ij| * (||x_j|| + sqrt(sum_n (100 g_nij)^2)) (GBLM-Pruner, arXiv 2311.04902).

    g_n is the gradient of the dense model's mean loss on calibration window n. Of the two terms the first is on Wanda's
    scale, squares divided by the number of windows, and the second is a sum over them, as in the authors' code: the
    balance between them depends on how many windows there are and how long they are (theirs: 128 of 2048 tokens).
    """
    if gradient is None:
        raise ValueError("the score gblm needs the norms of the weight's gradients")
    return weight.abs() * (inputs.mean_square.sqrt() + GBLM_SCALE * gradient)


SCORES: dict[str, Score] = {
    "magnitude": Score(magnitude),
    "wanda": Score(wanda),
    "ria": Score(ria),
    "gblm": Score(gblm, needs_gradients=True),
}
