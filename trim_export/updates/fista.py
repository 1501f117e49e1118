"""Convex pruning: an L1 penalty that leaves as many weights as the budget allows (FISTAPruner, arXiv 2408.03728)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.updates.problem import LayerProblem, Support, Update
from trim_export.updates.refit import masked_cg
from trim_export.updates.scaled import ScaledProblem, scale
from trim_export.updates.selection import largest

__all__ = ["Fista"]

PENALTY_RANGE = 2.0**-16
"""The least penalty tried, relative to the one that leaves nothing."""


@dataclass(frozen=True)
class Fista:
    """Minimise ``f(V) / 2 + penalty * |V|_1`` in scaled units, round to the budget, and polish.

    The penalty, one for each group of weights that share a budget, is found by bisection of its logarithm. Every trial
    starts from the weights refitted on the given mask: going on from the previous trial's, one penalty too strong would
    spoil the rest. What is kept in the end are the largest of the last gradient step before shrinking, which orders
    zeros too.

    The penalty is not meant to reach the budget by itself, since one that strong also shrinks what it keeps and then
    chooses badly: on a real matrix at 80 % a converged run that did so ended above a refit of Wanda's mask (error .186
    against .179). It aims at the geometric mean of the budget and all weights, which was near the best penalty at 50 %
    and at 80 % (error .148 at 80 %); rounding does the rest. The number of steps matters for the same reason. Where all
    that ends above the refit it started from, the refit is the answer.

    Time: ``trials * short + iterations + 2 polish + 4`` products rows x columns x columns and two columns^3. Memory:
    ten matrices of the weight's size and three of the Gram's.

    Attributes:
        trials: penalties tried.
        short: accelerated gradient steps of a trial, which only has to tell how many weights it would leave.
        iterations: of the run with the penalty found.
        damp: ridge towards the dense weight, relative to the mean diagonal of the scaled Gram matrix.
        polish: iterations of conjugate gradients, before and after.
    """

    trials: int = 6
    short: int = 5
    iterations: int = 20
    damp: float = 0.1
    polish: int = 10
    name: str = "fista"

    def __call__(self, problem: LayerProblem, support: Support) -> Update:
        """Choose mask and weights for the support's budget."""
        scaled = scale(problem, self.damp)
        step = 1 / largest_eigenvalue(scaled.gram)
        keep = support.keep
        aim = (keep * support.grouped(support.mask).shape[1]).double().sqrt()
        high = support.grouped(scaled.target.abs()).amax(dim=1)
        low = high * PENALTY_RANGE
        refitted = masked_cg(scaled, support.mask, scaled.weight, self.polish)
        for _ in range(self.trials):
            penalty = (low * high).sqrt()
            values, _ = _descend(scaled, refitted, penalty[:, None] * step, step, self.short)
            too_many = support.grouped(values).count_nonzero(dim=1) > aim
            low, high = torch.where(too_many, penalty, low), torch.where(too_many, high, penalty)
        values, unshrunk = _descend(scaled, refitted, high[:, None] * step, step, self.iterations)
        mask = largest(support.grouped(unshrunk.abs_()), keep).view_as(values)
        values = masked_cg(scaled, mask, values, self.polish)
        worse = _objective(scaled, values, support) > _objective(scaled, refitted, support)
        back = worse[:, None] if support.by_row else worse
        return scaled.finish(torch.where(back, refitted, values), torch.where(back, support.mask, mask))


def _descend(
    scaled: ScaledProblem, start: Tensor, limit: Tensor, step: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """A few steps with Nesterov's momentum, each shrinking all weights by ``limit`` (``[groups, 1]``).

    Returns:
        The weights ``[rows, columns]``, and the same before the last shrinking.
    """
    values, ahead, momentum = start, start, 1.0
    for _ in range(iterations):
        gradient = torch.addmm(scaled.target, ahead, scaled.gram, beta=-1)
        unshrunk = torch.addcmul(ahead, gradient, step, value=-1)
        previous, values = values, unshrunk - unshrunk.clamp(-limit, limit)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = torch.lerp(previous, values, 1 + (momentum - 1) / following)
        momentum = following
    return values, unshrunk


def _objective(scaled: ScaledProblem, values: Tensor, support: Support) -> Tensor:
    """f with the ridge, up to a constant, of each group."""
    image = torch.addmm(scaled.target, values, scaled.gram, beta=-2)
    return support.grouped(image.mul_(values)).sum(dim=1)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """A bound from above, and a close one: |H^4|_F^(1/4), between one and columns^(1/8) times the eigenvalue.

    Power iteration of the whole matrix instead of one vector, because a step from an underestimate could diverge.
    """
    size = torch.linalg.matrix_norm(gram)
    square = (gram / size) @ (gram / size)
    bound: Tensor = torch.linalg.matrix_norm(square @ square).sqrt().sqrt() * size
    return bound
