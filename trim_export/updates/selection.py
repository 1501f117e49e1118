"""Exactly the largest k of each line, without sorting.

The threshold is found by bisection over the bits of the scores: non-negative floats order like their bit patterns
read as integers, so 31 passes of compare and count give the k-th largest value exactly, for any mixture of k, and
fewer passes give it roughly. On a 1536 x 576 matrix that is 4 ms where sorting takes 26, and it runs on any device
without a wait for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest", "roughly_largest"]

BITS = 31
ROUGH_BITS = 16
"""The exponent and eight bits of the mantissa: thresholds to 0.4 %."""
SAMPLE = 256
"""Scores of a line that are enough for a rough threshold."""
MAX_STRIDE = 8


def largest(scores: Tensor, keep: Tensor) -> Tensor:
    """Mark the ``keep[i]`` largest scores of line i; among equal ones the first.

    Args:
        scores: float32 ``[lines, width]``, not negative.
        keep: integers ``[lines]``.

    Returns:
        bool ``[lines, width]``. Time 31 passes over the scores, memory two bool copies.
    """
    patterns = scores.contiguous().view(torch.int32)
    threshold = _thresholds(patterns, keep, BITS)[:, None]
    chosen = patterns >= threshold
    if torch.equal(chosen.sum(dim=1), keep):
        return chosen
    above, equal = patterns > threshold, patterns == threshold
    missing = keep[:, None] - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= missing))


def roughly_largest(scores: Tensor, keep: Tensor) -> Tensor:
    """`largest` for about ``keep[i]`` scores, from 16 passes over at least 256 evenly spread scores of each line."""
    stride = max(1, min(MAX_STRIDE, scores.shape[1] // SAMPLE))
    sample = scores[:, ::stride].contiguous().view(torch.int32)
    wanted = (keep * sample.shape[1] + scores.shape[1] - 1) // scores.shape[1]
    return scores >= _thresholds(sample, wanted, ROUGH_BITS).view(torch.float32)[:, None]


def _thresholds(patterns: Tensor, keep: Tensor, bits: int) -> Tensor:
    """The greatest int32 ``[lines]``, in its leading bits, that at least ``keep[i]`` patterns of line i reach."""
    threshold = torch.zeros(len(patterns), dtype=torch.int32, device=patterns.device)
    reaches = torch.empty_like(patterns)  # adding up integers is several times faster than adding up bools
    for bit in range(BITS - 1, BITS - 1 - bits, -1):
        candidate = threshold | (1 << bit)
        reached = torch.ge(patterns, candidate[:, None], out=reaches).sum(dim=1, dtype=torch.int32)
        threshold = torch.where(reached >= keep, candidate, threshold)
    return threshold
