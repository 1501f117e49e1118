"""Filling the store: one cell after the other, each written down the moment it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.cells import DENSE, Cell, recipe_settings
from benchmarks.quality.store import Record, Store
from trim_export.errors import CheckFailed

__all__ = ["fill"]


def fill(
    store: Store,
    cells: Sequence[Cell],
    measure: Callable[[Cell], dict[str, Any]],
    again: bool = False,
    minutes: float | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Measure what the store lacks; a killed run loses the cell it was at.

    Args:
        store: grows by each cell.
        cells: in the order in which they are wanted.
        measure: gives a cell's figures, or ``{"failed": sentence}``, which is recorded too and not tried again.
        again: measure cells that are there as well, failed ones included.
        minutes: no cell is started later than this.
        say: gets a line for each cell.

    Raises:
        CheckFailed: the dense model could not be measured, so that there is nothing to compare with.
    """
    begin = time.monotonic()
    missing = [cell for cell in cells if again or store.find(cell) is None]
    say(f"{len(missing)} of {len(cells)} cells to measure")
    for number, cell in enumerate(missing, start=1):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            say(f"{minutes:g} minutes are over; the same command measures the other {len(missing) - number + 1}")
            return
        if not again and store.find(cell) is not None:  # by another run, meanwhile
            continue
        outcome = measure(cell)
        if "failed" in outcome and cell.row is DENSE:
            raise CheckFailed(f"the dense model could not be measured: {outcome['failed']}")
        store.add({"recipe": recipe_settings(cell, store.protocol)} | outcome)
        say(f"{number}/{len(missing)}  {cell}: {_summary(outcome)}")


def _summary(outcome: Record) -> str:
    if "failed" in outcome:
        return f"failed ({outcome['failed']})"
    pruned = f", pruned in {outcome['prune_seconds']:.0f} s" if "prune_seconds" in outcome else ""
    return f"perplexity {outcome['perplexity']:.2f}, later windows {outcome['later_perplexity']:.2f}{pruned}"
