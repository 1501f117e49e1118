"""The problem in units where every input has power one, with a ridge towards the dense weight.

With n_j = sqrt(G_jj), a weight v_ij becomes v_ij n_j. Its magnitude is then its Wanda score, so that weights of
different inputs can be compared; conjugate gradients are Jacobi-preconditioned; one relative ridge suits all inputs:

    f(V) + damp * sum_ij G_jj (v_ij - w_ij)^2  =  tr(V' H V'^T) - 2 tr(V' T^T) + constant,   V' = V diag(n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.updates.factor import equilibrate
from trim_export.updates.problem import LayerProblem, Update

__all__ = ["ScaledProblem", "scale"]


@dataclass(frozen=True)
class ScaledProblem:
    """A `LayerProblem` in scaled units.

    Attributes:
        weight: ``[rows, columns]`` dense, zero at dead inputs, which are thereby the first to be pruned.
        gram: ``[columns, columns]``, H, its diagonal ``1 + damp``.
        target: ``[rows, columns]``, T, the ridge included.
        inverse_norms: ``[columns]``, 0 for dead inputs.
        problem: what was scaled.
    """

    weight: Tensor
    gram: Tensor
    target: Tensor
    inverse_norms: Tensor
    problem: LayerProblem

    def finish(self, values: Tensor, mask: Tensor) -> Update:
        """Back to the layer's units; kept weights of dead inputs stay dense, since nothing is known about them."""
        weight = torch.where(self.inverse_norms > 0, values * self.inverse_norms, self.problem.weight)
        return Update(torch.where(mask, weight, 0.0), mask)


def scale(problem: LayerProblem, damp: float) -> ScaledProblem:
    """Scale a problem and add the ridge; ``damp`` is relative to the mean diagonal, which is one in these units."""
    gram, inverse_norms = equilibrate(problem.gram)
    gram.diagonal().add_(damp)
    weight = torch.where(inverse_norms > 0, problem.weight / inverse_norms, 0.0)
    target = (problem.target * inverse_norms).add_(weight, alpha=damp)
    return ScaledProblem(weight, gram, target, inverse_norms, problem)
