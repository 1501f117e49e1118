"""By what name and version a stored artifact is known, to those who write it and to those who load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT_VERSION", "METHOD", "STORED", "guard"]

METHOD = "trim-sparse"
"""The `quant_method` in config.json by which transformers finds our loader."""

FORMAT_VERSION = 1
"""The newest layout of an artifact that this version writes and reads."""

STORED = "bitmap"
"""The encoding in which pruning stores its matrices; `convert` makes others of it."""


def guard(modules: Sequence[str]) -> dict[str, Tensor]:
    """An empty tensor under the dense name of the first pruned matrix, stored with every artifact.

    A transformers that does not know our format skips it with a warning and fills the pruned matrices with random
    numbers. A tensor of the wrong shape it refuses. Our own loader passes over this one.
    """
    import torch

    return {f"{min(modules)}.weight": torch.zeros(0)} if modules else {}
