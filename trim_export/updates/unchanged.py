"""No update: the kept weights stay what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trim_export.updates.problem import LayerProblem, Support, Update

__all__ = ["Unchanged"]


@dataclass(frozen=True)
class Unchanged:
    """Multiply the weight by its mask."""

    name: str = "none"

    def __call__(self, problem: LayerProblem, support: Support) -> Update:
        """The dense weight where the mask is, else zero."""
        return Update(torch.where(support.mask, problem.weight, 0.0), support.mask)
