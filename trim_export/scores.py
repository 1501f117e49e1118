"""Importance of each weight, from the weight and the statistics of its inputs. Low scores are pruned first."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from trim_export.statistics import InputStatistics

__all__ = ["SCORES", "Score", "magnitude", "wanda"]


class Score(Protocol):
    """``(weight float32 [rows, columns], inputs) -> score float32 [rows, columns]``."""

    def __call__(self, weight: Tensor, inputs: InputStatistics) -> Tensor:
        """Score every weight."""
        ...


def magnitude(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """|w|."""
    return weight.abs()


def wanda(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """|w_ij| * ||x_j||, the norm over all calibration tokens (Wanda, arXiv 2306.11695)."""
    return weight.abs() * inputs.mean_square.sqrt()


SCORES: dict[str, Score] = {"magnitude": magnitude, "wanda": wanda}
