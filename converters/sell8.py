"""Sliced ELLPACK in slices of eight rows: lists of columns that eight lanes read side by side.

After SELL-C-sigma (Kreutzer et al., SIAM J. Sci. Comput. 2014, arXiv 1307.6209), with C = 8 and rows sorted by length
throughout. A block of eight rows has an even number of steps, each an entry of every row; a row that is shorter repeats
its last column with values of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["BLOCK", "encode_lists", "list_entries"]

BLOCK = 8
"""Rows that stand together."""


def encode_lists(mask: Tensor, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that stand in the order of their lengths, as lists.

    Args:
        mask: bool ``[rows, columns]``, at most 65536 columns.
        values: ``[nnz]``, row by row.
        counts: int64 ``[rows]``, the weights kept in each row.

    Returns:
        int64 ``[blocks + 1]``, where each block begins; int16 (read as unsigned) columns and values ``[entries]``.
    """
    lengths = pad(counts, (0, -len(counts) % BLOCK)).reshape(-1, BLOCK)
    steps = lengths.amax(dim=1) if len(lengths) else lengths.sum(dim=1)
    steps = steps + steps % 2
    start = pad((steps * BLOCK).cumsum(0), (1, 0))
    _, entry = list_entries(counts, start)
    column = mask.nonzero()[:, 1]
    last = torch.zeros(lengths.numel(), dtype=torch.int64)
    last[: len(counts)][counts > 0] = column[(counts.cumsum(0) - 1)[counts > 0]]
    filled = last.reshape(-1, BLOCK).repeat_interleave(steps, dim=0).reshape(-1)
    filled[entry] = column
    spread = values.new_zeros(filled.numel())
    spread[entry] = values
    return start, filled.to(torch.int16), spread


def list_entries(counts: Tensor, list_start: Tensor) -> tuple[Tensor, Tensor]:
    """Of each weight in lists, row by row: the place of its row among them, and where it stands."""
    lengths = counts.long()
    place = torch.arange(len(lengths)).repeat_interleave(lengths)
    step = torch.arange(len(place)) - (lengths.cumsum(0) - lengths)[place]
    return place, list_start[place // BLOCK] + step * BLOCK + place % BLOCK
