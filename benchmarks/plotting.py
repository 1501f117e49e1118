"""What the plots of benchmarks share: their looks are those of the report's pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trim_export.report.figures import GREY, SETTINGS

__all__ = ["NO_PLOT", "draw_over_sparsity", "drawn"]

NO_PLOT = "No plot: matplotlib is not installed (pip install 'trim-export[bench]')."


def drawn(draw: Callable[[Any], None], size: tuple[float, float], path: Path) -> str:
    """Let ``draw`` fill a figure of this size, in inches, and write it; a sentence that says so, or why not."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return NO_PLOT
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, metadata={"Date": None})
    return f"Plot in {path}."


def draw_over_sparsity(
    axes: Any, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, Mapping[str, Any]], what: str, level: float
) -> None:
    """One line for each contestant in ``styles``: the median of ``what`` over all its rows of a sparsity.

    Args:
        axes: matplotlib's.
        rows: of a sweep over layers, each with ``contestant`` and ``sparsity``.
        styles: of the lines, in their order.
        what: the key of a number in each row.
        level: where a thin line goes across, for comparison.
    """
    for name, style in styles.items():
        values: dict[float, list[float]] = {}
        for row in rows:
            if row["contestant"] == name:
                values.setdefault(row["sparsity"], []).append(row[what])
        if values:
            axes.plot(sorted(values), [statistics.median(values[at]) for at in sorted(values)], label=name, **style)
    axes.axhline(level, color=GREY, linewidth=0.8)
    axes.set_xlabel("sparsity")
