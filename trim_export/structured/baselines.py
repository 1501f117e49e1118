"""Block removal that looks at nothing: what every importance has to be better than."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trim_export.forward import Compute
from trim_export.models import DenseModel, decoder_blocks
from trim_export.progress import Track
from trim_export.structured.depth import blocks_to_remove, remove_blocks

__all__ = ["LastBlocks", "RandomBlocks"]


@dataclass(frozen=True)
class LastBlocks:
    """Remove the last blocks."""

    name: str = "last"

    def __call__(
        self, dense: DenseModel, tokens: Tensor, share: float, seed: int, compute: Compute, track: Track[Any]
    ) -> dict[str, Any]:
        """Remove as many as ``share`` asks for."""
        count, present = blocks_to_remove(dense.model, share), len(decoder_blocks(dense.model))
        removed = list(range(present - count, present))
        remove_blocks(dense.model, removed)
        return {"blocks": removed}


@dataclass(frozen=True)
class RandomBlocks:
    """Remove blocks drawn with the seed, each set equally likely."""

    name: str = "random"

    def __call__(
        self, dense: DenseModel, tokens: Tensor, share: float, seed: int, compute: Compute, track: Track[Any]
    ) -> dict[str, Any]:
        """Remove as many as ``share`` asks for."""
        count, present = blocks_to_remove(dense.model, share), len(decoder_blocks(dense.model))
        order = torch.randperm(present, generator=torch.Generator().manual_seed(seed))
        removed = sorted(order[:count].tolist())
        remove_blocks(dense.model, removed)
        return {"blocks": removed}
