"""What pruning costs each row once its kept weights have been fitted anew, at any number of pruned weights.

`trim_export.curves` knows the outputs of rows whose kept weights stay as they are. Where they will be updated, that is
the wrong thing to compare: the rows that pruning harms most are not those that an update can help least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from trim_export.updates.problem import LayerProblem
from trim_export.updates.refit import Refit, masked_cg
from trim_export.updates.scaled import scale

__all__ = ["interpolate", "refit_losses"]

ITERATIONS = 3
"""Of conjugate gradients at each level, which starts from the one before; eight left the final errors as they were."""


def refit_losses(problem: LayerProblem, masks: Sequence[Tensor]) -> Tensor:
    """Loss of every row after a short refit on each of several masks.

    Args:
        problem: what the weight update will minimise.
        masks: bool ``[rows, columns]``, each best a part of the one before, whose weights it starts from.

    Returns:
        float64 ``[rows, masks]``: a row's share of f (see `trim_export.updates.problem`) with the ridge of `Refit`, in
        the same units for all rows, its constant left out. Time: five products rows x columns x columns a mask.
    """
    scaled = scale(problem, Refit().damp)
    values = scaled.weight
    losses = []
    for mask in masks:
        values = masked_cg(scaled, mask, values, ITERATIONS)
        image = torch.addmm(scaled.target, values, scaled.gram, beta=-2)
        losses.append(torch.linalg.vecdot(image.double(), values.double()))
    return torch.stack(losses, dim=1)


def interpolate(levels: Sequence[int], losses: Tensor) -> Tensor:
    """Fill in the losses between ``levels`` by a smooth curve that does not overshoot (PCHIP).

    Straight lines would have corners at the levels, at which nearly all rows would come to lie.

    Args:
        levels: ascending numbers of pruned weights.
        losses: ``[rows, levels]`` at them.

    Returns:
        float64 ``[rows, levels[-1] - levels[0] + 1]``, on the device of ``losses``.
    """
    if len(levels) == 1:
        return losses.double()
    curve = PchipInterpolator(levels, losses.double().cpu().numpy(), axis=1)
    return torch.from_numpy(curve(np.arange(levels[0], levels[-1] + 1))).to(losses.device)
