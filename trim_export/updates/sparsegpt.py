"""SparseGPT: prune column by column, and let later columns make up for each (arXiv 2301.00774)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.updates.factor import cholesky, dead_inputs
from trim_export.updates.problem import LayerProblem, Support, Update
from trim_export.updates.selection import largest

__all__ = ["SparseGpt"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseGpt:
    """Optimal brain surgery in blocks of columns.

    Of the support only the budget is used, spread evenly over the blocks: a budget by matrix takes the best scores
    ``|w| / U_jj`` of a whole block, as the authors do; a budget by row gives every row its share of each block,
    fractions carried on, so that the totals are exact.

    The authors' right-hand side is W G. Any other is reduced to it: with the damping lam, W is first replaced by the
    solution of V (G + lam I) = B + lam W, because f(V) + lam |V - W|^2 grows from there like a squared error with
    Hessian G + lam I. For B = W G that is W itself.

    Time: one Cholesky factor and one triangular inverse in float64, three products rows x columns x columns, and the
    sweep, rows x columns x (columns + block) / 2. Memory: four matrices of the weight's size, five of the Gram's in
    float64.

    Attributes:
        block: columns that share a threshold.
        damp: lam, relative to the mean diagonal of the Gram matrix.
    """

    block: int = 128
    damp: float = 0.01
    name: str = "sparsegpt"

    def __call__(self, problem: LayerProblem, support: Support) -> Update:
        """Choose mask and weights for the support's budget."""
        dead = dead_inputs(problem.gram)
        factor = inverse_factor(problem.gram, dead, self.damp)
        # Columns are pruned one after the other: transposed, each is contiguous.
        excess = problem.target - problem.weight @ problem.gram
        weight = torch.addmm(problem.weight, excess @ factor.T, factor).masked_fill_(dead, 0.0).T.contiguous()
        columns = len(weight)
        mask = torch.empty_like(support.mask)
        for begin in range(0, columns, self.block):
            end = min(begin + self.block, columns)
            keep = _share(support.keep, end, columns) - _share(support.keep, begin, columns)
            here, triangle = weight[begin:end], factor[begin:end, begin:end]
            scores = (here / triangle.diagonal()[:, None]).abs_().T.contiguous()
            mask[:, begin:end] = largest(support.grouped(scores), keep).view_as(scores)
            errors = _sweep(here, triangle, mask[:, begin:end].T.float())
            weight[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
        weight = torch.where(dead, problem.weight, weight.T)  # nothing is known about what dead inputs would need
        return Update(torch.where(mask, weight, 0.0), mask)


def inverse_factor(gram: Tensor, dead: Tensor, damp: float) -> Tensor:
    """The upper triangle U with ``U^T U = (G + lam I)^-1``, float32, computed in float64.

    Found from the Cholesky factor of G with its columns in reverse order, whose inverse, turned back, is U: there is
    no inverse of G to be factored, which could fail a second time.

    Args:
        gram: ``[columns, columns]``.
        dead: bool ``[columns]``, inputs of zero power, which count as inputs of mean power.
        damp: lam, relative to the mean diagonal.
    """
    exact = gram.double().masked_fill_(dead, 0.0).masked_fill_(dead[:, None], 0.0)
    power = exact.diagonal()
    mean = power[~dead].mean() if not bool(dead.all()) else power.new_ones(())
    power += dead * mean
    factor, used = cholesky((exact / mean).flip(0, 1), damp)
    if used > damp:
        logger.warning("the Gram matrix is not positive definite: SparseGPT's damping is raised to %g", used)
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
    return (inverse / mean.sqrt()).float()


def _share(keep: Tensor, columns: int, of: int) -> Tensor:
    """How many of the kept weights lie in the first columns: the proportional number, rounded."""
    return (2 * keep * columns + of) // (2 * of)


def _sweep(weight: Tensor, triangle: Tensor, kept: Tensor) -> Tensor:
    """Prune a block ``[columns, rows]`` in place, column by column.

    Returns:
        ``[columns, rows]`` by how much each pruned column errs, in units of its own row of the triangle.
    """
    errors = weight.new_zeros(weight.shape)
    for column, (diagonal, keep) in enumerate(zip(triangle.diagonal().tolist(), kept, strict=True)):
        torch.mul(weight[column], 1 - keep, out=errors[column]).div_(diagonal)
        weight[column + 1 :].addr_(triangle[column, column + 1 :], errors[column], alpha=-1)
    return errors
