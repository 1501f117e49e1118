"""Least squares on a fixed mask: the last step of ALPS (arXiv 2406.07831, section 3.3), for any mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.updates.problem import LayerProblem, Support, Update
from trim_export.updates.scaled import ScaledProblem, scale

__all__ = ["Refit", "masked_cg"]

CONVERGED = 1e-14
"""Share of a row's first squared residual below which float32 has nothing more to gain."""


@dataclass(frozen=True)
class Refit:
    """Keep the mask and let its weights make up for the pruned ones.

    Time ``iterations + 1`` products rows x columns x columns; memory seven matrices of the weight's size and one of
    the Gram's.

    Attributes:
        iterations: of conjugate gradients.
        damp: ridge towards the dense weight, relative to the mean diagonal of the scaled Gram matrix.
    """

    iterations: int = 10
    damp: float = 1e-3
    name: str = "refit"

    def __call__(self, problem: LayerProblem, support: Support) -> Update:
        """Minimise over the weights of ``support.mask``, starting from the dense ones."""
        scaled = scale(problem, self.damp)
        return scaled.finish(masked_cg(scaled, support.mask, scaled.weight, self.iterations), support.mask)


def masked_cg(scaled: ScaledProblem, mask: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Minimise the scaled problem over the weights of a mask, by conjugate gradients in all rows at once.

    Rows are independent systems, so each has step sizes of its own; one that has converged stops moving.

    Args:
        scaled: the problem; its constant diagonal is the Jacobi preconditioner.
        mask: bool ``[rows, columns]``.
        start: ``[rows, columns]`` in scaled units; what lies outside the mask is ignored.
        iterations: each one product rows x columns x columns.

    Returns:
        ``[rows, columns]`` in scaled units, zero outside the mask. Memory five matrices of this size.
    """
    kept = mask.float()  # multiplying by floats is several times faster than by bools
    values = start * kept
    residual = torch.addmm(scaled.target, values, scaled.gram, alpha=-1).mul_(kept)
    direction = residual.clone()
    image = torch.empty_like(residual)
    square = torch.linalg.vecdot(residual, residual)
    enough = CONVERGED * square
    for _ in range(iterations):
        torch.mm(direction, scaled.gram, out=image).mul_(kept)
        curvature = torch.linalg.vecdot(direction, image)
        # Going on with a converged row would divide one vanishing number by another.
        step = torch.where((square > enough) & (curvature > 0), square / curvature, 0.0)[:, None]
        values.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        previous, square = square, torch.linalg.vecdot(residual, residual)
        direction.mul_(torch.where(square > enough, square / previous, 0.0)[:, None]).add_(residual)
    return values
