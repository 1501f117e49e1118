"""Speed over sparsity for each number of tokens, as `benchmarks.gpu_layers` measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plotting import draw_over_sparsity, drawn

__all__ = ["plot"]

# Told apart by marker and line as well, so that no hue is needed.
_MARKERS = "oDs^vxP*"
_LINES = ("-", "--", "-.", ":")


def plot(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> str:
    """Draw ``path``, each contestant's median over all layers; returns a sentence that says so, or why not."""
    counts = sorted({row["tokens"] for row in rows})
    names = [name for name in dict.fromkeys(row["contestant"] for row in rows) if name != "cublas"]
    styles = {
        name: {"marker": _MARKERS[place % len(_MARKERS)], "linestyle": _LINES[place % len(_LINES)]}
        for place, name in enumerate(names)
    }

    def draw(figure: Any) -> None:
        for panel, tokens in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
            mine = [row for row in rows if row["tokens"] == tokens]
            draw_over_sparsity(panel, mine, styles, "ratio_to_cublas", 1)
            panel.set(title=f"{tokens} token{'s' * (tokens > 1)}", ylabel="x cuBLAS bfloat16")
        figure.axes[0].legend(fontsize=7)
        figure.suptitle(f"{about['gpu']}, torch {about['torch']}")

    return drawn(draw, (3 * len(counts), 3.6), path)
