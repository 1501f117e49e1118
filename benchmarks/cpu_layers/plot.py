"""Speed over sparsity, and how near to the memory's speed each contestant comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plotting import draw_over_sparsity, drawn

__all__ = ["plot"]

# Told apart by marker and lightness, so that no hue is needed.
STYLES: dict[str, dict[str, Any]] = {
    "native float32": {"color": "#3d6f9e", "marker": "D", "linestyle": (0, (7, 2, 1, 2))},
    "native bfloat16": {"color": "#0b2545", "marker": "o", "linestyle": "-"},
    "native int8": {"color": "#0b2545", "marker": "^", "linestyle": (0, (5, 2))},
    "torch CSR float32": {"color": "#8a8a8a", "marker": "s", "linestyle": (0, (1, 1.5))},
    "deepsparse float32": {"color": "#8a8a8a", "marker": "v", "linestyle": (0, (4, 1.5, 1, 1.5))},
    "torch dense bfloat16": {"color": "#6f6f6f", "marker": "", "linestyle": (0, (5, 2))},
    "onnxruntime 4 bits": {"color": "#6f6f6f", "marker": "x", "linestyle": (0, (1, 1.5))},
}


def plot(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> str:
    """Draw ``path``; returns a sentence that says so, or why not.

    Lines are medians over all layers with at least 3000 rows and columns, or over all if none has.
    """
    rows = [row for row in rows if min(row["rows"], row["columns"]) >= 3000] or rows
    counts = sorted({row["tokens"] for row in rows})

    def draw(figure: Any) -> None:
        *panels, roof = figure.subplots(1, len(counts) + 1, squeeze=False)[0]
        for panel, tokens in zip(panels, counts, strict=True):
            draw_over_sparsity(panel, [row for row in rows if row["tokens"] == tokens], STYLES, "times_float32", 1)
            panel.set(title=f"{tokens} token{'s' * (tokens > 1)}", ylabel="x torch dense float32")
        first = [row for row in rows if row["tokens"] == counts[0] and row["gb_per_s"] is not None]
        draw_over_sparsity(roof, first, STYLES, "gb_per_s", about["read_gb_per_s"])
        roof.set(title="weights read, 1 token", ylabel="GB/s (line: what the memory gives)")
        roof.legend(fontsize=7)

    return drawn(draw, (9, 3.6), path)
