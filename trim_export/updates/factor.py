"""Gram matrices made safe to solve with: unit diagonal, and a ridge that is raised until a factor exists."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky", "equilibrate"]

RAISE = 10.0


def equilibrate(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Give every input unit power: ``G_ij / (n_i n_j)`` with ``n_j = sqrt(G_jj)``.

    A dead input, whose power is zero, becomes a unit vector on its own, so that the matrix keeps a unit diagonal.

    Args:
        gram: ``[columns, columns]``.

    Returns:
        A new matrix ``[columns, columns]``, and ``1 / n`` ``[columns]`` with 0 for dead inputs.
    """
    power = gram.diagonal()
    inverse_norms = torch.where(power > torch.finfo(torch.float32).tiny, power.rsqrt(), 0.0)
    scaled = (gram * inverse_norms).mul_(inverse_norms[:, None])
    scaled.diagonal().fill_(1.0)
    return scaled, inverse_norms


def cholesky(matrix: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``matrix + ridge * I``; the ridge is raised tenfold until there is one.

    Rounding alone can leave a Gram matrix of fewer tokens than columns with eigenvalues slightly below zero.

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
