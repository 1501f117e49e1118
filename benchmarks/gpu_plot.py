"""Speed over sparsity for each number of tokens, as `benchmarks.gpu_layers` measured it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

# Told apart by marker and line as well, so that no hue is needed.
_MARKERS = "oDs^vxP*"
_LINES = ("-", "--", "-.", ":")


def plot(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> str:
    """Draw ``path``, each contestant's median over all layers; returns a sentence that says so, or why not."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return "No plot: matplotlib is not installed (pip install 'trim-export[bench]')."
    counts = sorted({row["tokens"] for row in rows})
    names = [name for name in dict.fromkeys(row["contestant"] for row in rows) if name != "cublas"]
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "trim-export"}):
        figure = Figure(figsize=(3 * len(counts), 3.6), layout="constrained")
        for panel, tokens in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
            for place, name in enumerate(names):
                points = _medians(rows, name, tokens)
                if points:
                    look = {"marker": _MARKERS[place % len(_MARKERS)], "linestyle": _LINES[place % len(_LINES)]}
                    panel.plot(*zip(*points, strict=True), label=name, **look)
            panel.axhline(1, color="#bbbbbb", linewidth=0.8)
            panel.set(title=f"{tokens} token{'s' * (tokens > 1)}", xlabel="sparsity", ylabel="x cuBLAS bfloat16")
        figure.axes[0].legend(frameon=False, fontsize=7)
        figure.suptitle(f"{about['gpu']}, torch {about['torch']}")
        figure.savefig(path)
    return f"Plot in {path}."


def _medians(rows: Sequence[Mapping[str, Any]], name: str, tokens: int) -> list[tuple[float, float]]:
    mine = [row for row in rows if row["contestant"] == name and row["tokens"] == tokens]
    ratios: dict[float, list[float]] = {}
    for row in mine:
        ratios.setdefault(row["sparsity"], []).append(row["ratio_to_cublas"])
    return [(sparsity, statistics.median(ratios[sparsity])) for sparsity in sorted(ratios)]
