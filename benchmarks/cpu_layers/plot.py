"""Speed over sparsity, and how near to the memory's speed each contestant comes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

# Told apart by marker and lightness, so that no hue is needed.
STYLES: dict[str, dict[str, Any]] = {
    "native float32": {"color": "#3d6f9e", "marker": "D", "linestyle": (0, (7, 2, 1, 2))},
    "native bfloat16": {"color": "#0b2545", "marker": "o", "linestyle": "-"},
    "native int8": {"color": "#0b2545", "marker": "^", "linestyle": (0, (5, 2))},
    "torch CSR float32": {"color": "#8a8a8a", "marker": "s", "linestyle": (0, (1, 1.5))},
    "torch dense bfloat16": {"color": "#6f6f6f", "marker": "", "linestyle": (0, (5, 2))},
    "onnxruntime 4 bits": {"color": "#6f6f6f", "marker": "x", "linestyle": (0, (1, 1.5))},
}


def plot(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> str:
    """Draw ``path``; returns a sentence that says so, or why not."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return "No plot: matplotlib is not installed (pip install 'trim-export[bench]')."
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "trim-export"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        counts = sorted({row["tokens"] for row in rows})
        panels = figure.subplots(1, len(counts) + 1, squeeze=False)[0]
        for panel, tokens in zip(panels, counts, strict=False):
            for name, style in STYLES.items():
                points = _medians(rows, name, tokens, "times_float32")
                if points:
                    panel.plot(*zip(*points, strict=True), label=name, **style)
            panel.axhline(1, color="#bbbbbb", linewidth=0.8)
            panel.set(title=f"{tokens} token{'s' * (tokens > 1)}", xlabel="sparsity", ylabel="x torch dense float32")
        roof = panels[-1]
        for name, style in STYLES.items():
            points = _medians(rows, name, counts[0], "gb_per_s")
            if points:
                roof.plot(*zip(*points, strict=True), label=name, **style)
        roof.axhline(about["read_gb_per_s"], color="#bbbbbb", linewidth=0.8)
        roof.set(title="weights read, 1 token", xlabel="sparsity", ylabel="GB/s (line: what the memory gives)")
        roof.legend(frameon=False, fontsize=7)
        figure.savefig(path)
    return f"Plot in {path}."


def _medians(rows: Sequence[Mapping[str, Any]], name: str, tokens: int, what: str) -> list[tuple[float, float]]:
    """For each sparsity the median over all layers with at least 3000 rows and columns, or over all if none has."""
    mine = [row for row in rows if row["contestant"] == name and row["tokens"] == tokens]
    large = [row for row in mine if min(row["rows"], row["columns"]) >= 3000] or mine
    sparsities = sorted({row["sparsity"] for row in large})
    return [(s, statistics.median(row[what] for row in large if row["sparsity"] == s)) for s in sparsities]
