"""Spreading sparsities around a target without losing it."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["centred", "recentre"]


def centred(measures: Sequence[float], width: float) -> list[float]:
    """Map measures linearly onto an interval of the given width, centred on their mean."""
    low, high = min(measures), max(measures)
    scaled = [(m - low) / (high - low or 1.0) * width for m in measures]
    mean = sum(scaled) / len(scaled)
    return [s - mean for s in scaled]


def recentre(sparsities: Sequence[float], sizes: Sequence[int], target: float, cap: float) -> list[float]:
    """Move sparsities into [0, cap] by one common shift, so that their size-weighted mean is ``target``."""
    reach = max(1.0, *sparsities, *(cap - s for s in sparsities))
    low, high = -reach, reach
    for _ in range(60):
        shift = (low + high) / 2
        kept = [min(max(s + shift, 0.0), cap) for s in sparsities]
        mean = sum(k * size for k, size in zip(kept, sizes, strict=True)) / sum(sizes)
        low, high = (shift, high) if mean < target else (low, shift)
    return [min(max(s + high, 0.0), cap) for s in sparsities]
