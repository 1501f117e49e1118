"""Row counts that minimise the sum of the rows' errors, without a search.

Given each row's error as a function of how many of its weights are pruned, the best counts for a fixed total have one
Lagrange multiplier: in every row the last weight pruned costs less, and the next one would cost more, than that price.
On convex curves that means to prune, one after the other, whatever is cheapest in any row. Curves that are not convex
are replaced by their lower convex hulls, whose slopes are the isotonic regression of the curve's increments.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from trim_export.curves import Curves

__all__ = ["allocate", "squared_errors"]


def allocate(errors: Tensor, total: int) -> Tensor:
    """Distribute ``total`` prunings over the rows.

    The sum of errors is the least possible where the curves are convex. Otherwise it is the least of their convex
    hulls, plus what the one row that may stop between two corners of its hull lies above it; never more than for equal
    counts, which are the answer if they are better.

    Args:
        errors: ``[rows, levels]``, of each row with k = 0 .. levels - 1 weights pruned.
        total: from 0 to ``rows * (levels - 1)``.

    Returns:
        int64 ``[rows]`` on the device of ``errors``, their sum exactly ``total``. Time: one sort of all increments.
    """
    rows, steps = errors.shape[0], errors.shape[1] - 1
    exact = errors.double().cpu()
    slopes = np.stack([isotonic_regression(increments).x for increments in exact.diff(dim=1).numpy()])
    # Stable: among equal prices the first row goes first, so that at most one stops inside an edge of its hull.
    cheapest = torch.from_numpy(slopes).flatten().argsort(stable=True)[:total]
    counts = torch.bincount(cheapest // max(1, steps), minlength=rows)
    even = total // rows + (torch.arange(rows) < total % rows).long()
    best = min((counts, even), key=lambda pruned: float(exact.gather(1, pruned[:, None]).sum()))
    return best.to(errors.device)


def squared_errors(curves: Curves) -> Tensor:
    """``|y_i - yhat_i(k)|^2``, float64 ``[rows, columns + 1]``."""
    errors = curves.target_norm2[:, None] - 2 * curves.numerator.double() + curves.norm2.double()
    return errors.clamp_(min=0)
