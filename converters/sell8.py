"""Sliced ELLPACK in slices of eight rows: lists of columns that eight lanes read side by side.

After SELL-C-sigma (Kreutzer et al., SIAM J. Sci. Comput. 2014, arXiv 1307.6209), with C = 8 and rows sorted by length
throughout. A block of eight rows has an even number of steps, each an entry of every row; a row that is shorter repeats
its last column with values of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "list_entries"]

BLOCK = 8
"""Rows that stand together."""


def list_entries(counts: Tensor, list_start: Tensor) -> tuple[Tensor, Tensor]:
    """Of each weight in lists, row by row: the place of its row among them, and where it stands."""
    lengths = counts.long()
    place = torch.arange(len(lengths)).repeat_interleave(lengths)
    step = torch.arange(len(place)) - (lengths.cumsum(0) - lengths)[place]
    return place, list_start[place // BLOCK] + step * BLOCK + place % BLOCK
