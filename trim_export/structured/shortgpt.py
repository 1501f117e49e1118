"""Block influence (ShortGPT, arXiv 2403.03853): a block that hardly turns the residual stream can go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trim_export.forward import Compute, block_calls, embed, run_block
from trim_export.models import DenseModel, decoder_blocks
from trim_export.progress import Track
from trim_export.structured.depth import blocks_to_remove, remove_blocks

__all__ = ["ShortGpt", "block_influence"]


@dataclass(frozen=True)
class ShortGpt:
    """Remove the blocks of least influence, all at once as the paper does (section 3.2)."""

    name: str = "shortgpt"

    def __call__(
        self, dense: DenseModel, tokens: Tensor, share: float, seed: int, compute: Compute, track: Track[Any]
    ) -> dict[str, Any]:
        """Measure on all calibration windows, in one forward pass."""
        count = blocks_to_remove(dense.model, share)
        influence = block_influence(dense, tokens, compute, track)
        removed = sorted(sorted(range(len(influence)), key=influence.__getitem__)[:count])
        remove_blocks(dense.model, removed)
        return {"blocks": removed, "influence": influence}


@torch.no_grad()
def block_influence(dense: DenseModel, tokens: Tensor, compute: Compute, track: Track[Any]) -> list[float]:
    """``1 - mean cos(x, y)`` over all tokens, x entering a block and y leaving it (equation 2); one for each block."""
    blocks = list(decoder_blocks(dense.model).values())
    calls = block_calls(dense.model, blocks, tokens[:1])
    hidden = embed(dense.model, blocks, tokens)
    influence = []
    for block, call in track(list(zip(blocks, calls, strict=True)), "block influence"):
        block.to(compute.device)
        output = run_block(block, call, hidden, compute)
        block.to("cpu")
        cosine = torch.nn.functional.cosine_similarity(hidden.double(), output.double(), dim=-1)
        influence.append(float(1 - cosine.mean()))
        hidden = output
    return influence
