"""TRIM's search as the plain loop that the paper describes (arXiv 2505.16743, Algorithm 1), slow and obvious.

Each candidate vector of row sparsities is judged by zeroing the weights for real and multiplying with the inputs.
Written from the description of the procedure; it shares nothing with `trim_export.trim`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LiteralSearch", "literal_counts", "literal_search"]


class LiteralSearch(NamedTuple):
    """What the loop found, and the best cosine of every learning rate that it tried, in their order."""

    pruned: Tensor
    cosine: float
    uniform_cosine: float
    learning_rate: float | None
    tried: dict[float, float]


def literal_search(weight: Tensor, order: Tensor, inputs: Tensor, target: float) -> LiteralSearch:
    # How many weights of its row come before a weight in the ascending order of importance.
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    dense = weight @ inputs
    uniform = torch.full((len(weight),), target)

    def row_and_layer_cosines(sparsity: Tensor) -> tuple[Tensor, float]:
        masked = torch.where(rank < literal_counts(sparsity, weight.shape[1])[:, None], 0.0, weight)
        sparse = masked @ inputs
        return _cosine(dense, sparse), float(_cosine(dense.reshape(1, -1), sparse.reshape(1, -1)))

    start_quality, uniform_cosine = row_and_layer_cosines(uniform)
    best_cosine, best_sparsity, best_rate = uniform_cosine, uniform, None
    tried: dict[float, float] = {}
    for sweep in ([0.01, 0.02, 0.04, 0.08, 0.12, 0.16], [-0.01, -0.02, -0.04]):
        best_of_sweep = -1.0
        for rate in sweep:
            sparsity, quality, best_of_rate = uniform, start_quality, uniform_cosine
            for _ in range(10):
                relative = (quality - quality.min()) / (quality.max() - quality.min() + 1e-6)
                sparsity = sparsity + 2 * rate * relative - (2 * rate * relative).mean()
                sparsity = _clip_and_recentre(sparsity, target)
                quality, cosine = row_and_layer_cosines(sparsity)
                best_of_rate = max(best_of_rate, cosine)
                if cosine > best_cosine:
                    best_cosine, best_sparsity, best_rate = cosine, sparsity, rate
            tried[rate] = best_of_rate
            if not best_of_rate > best_of_sweep:
                break
            best_of_sweep = best_of_rate
        if best_rate is not None:
            break  # negative rates are only for layers where no positive one beat uniform
    final = _clip_and_recentre(best_sparsity.float(), target)
    return LiteralSearch(literal_counts(final, weight.shape[1]), best_cosine, uniform_cosine, best_rate, tried)


def literal_counts(sparsity: Tensor, columns: int) -> Tensor:
    """The integer part of each row's share; a negative share prunes nothing."""
    return torch.tensor([max(0, int(share)) for share in (columns * sparsity).tolist()])


def _cosine(dense: Tensor, sparse: Tensor) -> Tensor:
    dense, sparse = dense.double(), sparse.double()
    return (dense * sparse).sum(dim=1) / ((dense.norm(dim=1) + 1e-8) * (sparse.norm(dim=1) + 1e-8))


def _clip_and_recentre(sparsity: Tensor, target: float) -> Tensor:
    sparsity = torch.where(sparsity > 0.95, 0.95, sparsity)
    sparsity = torch.where(sparsity < 0, 0.0, sparsity)
    return sparsity - sparsity.mean() + target
