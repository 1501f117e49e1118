"""Gram matrices made safe to solve with: unit diagonal, and a ridge that is raised until a factor exists."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky", "dead_inputs", "equilibrate"]

RAISE = 10.0


def dead_inputs(gram: Tensor) -> Tensor:
    """bool ``[columns]``: inputs that were zero at every token, so that nothing is known about their weights."""
    return gram.diagonal() <= torch.finfo(torch.float32).tiny


def equilibrate(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Give every input unit power: ``G_ij / (n_i n_j)`` with ``n_j = sqrt(G_jj)``.

    A dead input, whose power is zero, becomes a unit vector on its own, so that the matrix keeps a unit diagonal.

    Args:
        gram: ``[columns, columns]``.

    Returns:
        A new matrix ``[columns, columns]``, and ``1 / n`` ``[columns]`` with 0 for dead inputs.
    """
    dead = dead_inputs(gram)
    inverse_norms = gram.diagonal().rsqrt().masked_fill_(dead, 0.0)
    # A Gram matrix satisfies Cauchy and Schwarz' inequality; holding any matrix to it keeps what follows finite.
    scaled = (gram * inverse_norms).mul_(inverse_norms[:, None]).clamp_(-1, 1).nan_to_num_(0.0)
    scaled.diagonal().fill_(1.0)
    return scaled, inverse_norms


def cholesky(matrix: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``matrix + ridge * I``; the ridge is raised tenfold until there is one.

    Rounding alone can leave a Gram matrix of fewer tokens than columns with eigenvalues slightly below zero. The end
    is certain: at the latest when the ridge exceeds every row's sum of absolute values.

    Args:
        matrix: finite and symmetric ``[columns, columns]``; only the lower triangle counts.
        ridge: the least to add, positive.

    Returns:
        The factor, and the ridge that was needed. Time columns^3 / 3, memory two matrices.
    """
    while True:
        shifted = matrix.clone()
        shifted.diagonal().add_(ridge)
        factor, failure = torch.linalg.cholesky_ex(shifted)
        if int(failure) == 0:
            return factor, ridge
        ridge *= RAISE
