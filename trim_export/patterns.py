"""Where kept weights may lie: anywhere, N in every M of a row, or in whole blocks.

A pattern turns scores and row budgets into a mask. Scores stay what they are; budgets are kept as far as the pattern
has room for them:

* ``N:M`` fixes how many weights every piece of a row keeps, so there is nothing left to allocate: rows and layers are
  all alike. TRIM's authors name it as a limit of row budgets.
* ``block:RxC`` scores a block by the sum of its weights' scores. Row budgets (TRIM's search among them) are made for
  rows that lose whole pieces of blocks in that order, and what R rows together may keep is rounded to whole blocks,
  largest remainders first, so that the matrix meets its target to within one block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trim_export.errors import UsageError
from trim_export.row_budgets import keep_best
from trim_export.updates.selection import largest

__all__ = ["Anywhere", "Blocks", "NofM", "Pattern", "parse_pattern", "require_fit"]


class Pattern(Protocol):
    """A shape that masks have."""

    def scores(self, score: Tensor) -> Tensor:
        """The scores ``[rows, columns]`` by which row budgets shall order weights."""
        ...

    def mask(self, score: Tensor, pruned: Tensor) -> Tensor:
        """bool ``[rows, columns]`` of this pattern, near the budget.

        Args:
            score: float32 ``[rows, columns]``, of `scores`.
            pruned: int64 ``[rows]``, what a row budget would prune.
        """
        ...

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a matrix cannot have this pattern; None if it can."""
        ...

    def holds(self, mask: Tensor) -> bool:
        """Whether a mask ``[rows, columns]`` has this pattern."""
        ...


@dataclass(frozen=True)
class Anywhere:
    """No pattern: each row keeps its best."""

    def scores(self, score: Tensor) -> Tensor:
        """As they are."""
        return score

    def mask(self, score: Tensor, pruned: Tensor) -> Tensor:
        """Each row's lowest ``pruned[i]`` go."""
        return keep_best(score, pruned)

    def misfit(self, rows: int, columns: int) -> str | None:
        """Fits all."""
        return None

    def holds(self, mask: Tensor) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class NofM:
    """``kept`` weights in every ``group`` consecutive ones of a row."""

    kept: int
    group: int

    @property
    def sparsity(self) -> float:
        """The only one it has."""
        return 1 - self.kept / self.group

    def scores(self, score: Tensor) -> Tensor:
        """As they are."""
        return score

    def mask(self, score: Tensor, pruned: Tensor) -> Tensor:
        """The best of each group; there is no choice of ``pruned``."""
        groups = score.reshape(-1, self.group)
        keep = torch.full((len(groups),), self.kept, dtype=torch.int64, device=score.device)
        return largest(groups, keep).view_as(score)

    def misfit(self, rows: int, columns: int) -> str | None:
        """Groups must fill a row."""
        return f"{columns} columns are not a multiple of {self.group}" if columns % self.group else None

    def holds(self, mask: Tensor) -> bool:
        """Whether no group keeps more; a kept weight may be zero and then be lost in another encoding."""
        return bool((mask.reshape(-1, self.group).sum(dim=1) <= self.kept).all())


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``height`` x ``width`` weights, kept or pruned as a whole."""

    height: int
    width: int

    def scores(self, score: Tensor) -> Tensor:
        """Each weight gets the sum of its block."""
        return self._spread(self._grid(score).sum(dim=(2, 3)))

    def mask(self, score: Tensor, pruned: Tensor) -> Tensor:
        """Whole blocks, as many in each line of blocks as its rows' budgets come to."""
        scores = self._grid(score)[:, :, 0, 0].contiguous()
        lines = pruned.view(-1, self.height).sum(dim=1).double() / (self.height * self.width)
        counts = lines.floor().long()
        missing = round(float(lines.sum())) - int(counts.sum())
        counts[(lines - counts).argsort(descending=True, stable=True)[:missing]] += 1
        return self._spread(keep_best(scores, counts))

    def misfit(self, rows: int, columns: int) -> str | None:
        """Blocks must fill the matrix."""
        if rows % self.height:
            return f"{rows} rows are not a multiple of {self.height}"
        return f"{columns} columns are not a multiple of {self.width}" if columns % self.width else None

    def holds(self, mask: Tensor) -> bool:
        """Whether every block is kept or pruned as a whole."""
        blocks = self._grid(mask)
        return bool((blocks == blocks[:, :, :1, :1]).all())

    def _grid(self, matrix: Tensor) -> Tensor:
        """``[lines, blocks, height, width]``."""
        rows, columns = matrix.shape
        shape = rows // self.height, self.height, columns // self.width, self.width
        return matrix.reshape(shape).transpose(1, 2)

    def _spread(self, grid: Tensor) -> Tensor:
        """A value for each block, repeated for its weights."""
        return grid.repeat_interleave(self.height, dim=0).repeat_interleave(self.width, dim=1)


def parse_pattern(text: str) -> Pattern:
    """Read ``none``, ``2:4`` or ``block:16x16``.

    Raises:
        UsageError: anything else.
    """
    if text == "none":
        return Anywhere()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = map(int, found.groups())
        if 0 < kept < group:
            return NofM(kept, group)
    if found := re.fullmatch(r"block:(\d+)x(\d+)", text):
        height, width = map(int, found.groups())
        if min(height, width) > 0:
            return Blocks(height, width)
    raise UsageError(f"pattern {text!r} is neither N:M with 0 < N < M, as in 2:4, nor block:RxC, as in block:16x16")


def require_fit(pattern: Pattern, shapes: Iterable[tuple[str, tuple[int, int]]]) -> None:
    """Stop at the first matrix that cannot have a pattern.

    Raises:
        UsageError: naming it and the reason.
    """
    for name, (rows, columns) in shapes:
        reason = pattern.misfit(rows, columns)
        if reason is not None:
            raise UsageError(f"{name}: {reason}; choose another --pattern")
