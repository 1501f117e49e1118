"""The two pictures: perplexity over sparsity, and perplexity over stored bytes. Legible when printed in grey."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plotting import NO_PLOT
from benchmarks.quality.cells import DENSE, TABLE, Cell
from benchmarks.quality.store import Store
from benchmarks.quality.stored import GGUF
from benchmarks.quality.tables import Contestant, contestants
from trim_export.report.figures import GREY, SETTINGS

__all__ = ["plots"]

# Told apart by marker, dashes and lightness, so that no hue is needed; the default recipe is the darkest.
STYLES: dict[str, dict[str, Any]] = {
    "wanda": {"color": "#8a8a8a", "marker": "s", "linestyle": (0, (1, 1.5))},
    "trim": {"color": "#6f6f6f", "marker": "^", "linestyle": (0, (5, 2))},
    "fast": {"color": "#3d6f9e", "marker": "D", "linestyle": (0, (7, 2, 1, 2))},
    "best": {"color": "#0b2545", "marker": "o", "linestyle": "-"},
}


def plots(store: Store) -> list[str]:
    """Draw what the store has enough of, beside it, and say in a sentence each what was drawn or why not."""
    try:
        import matplotlib as mpl
    except ImportError:
        return [NO_PLOT]
    with mpl.rc_context(SETTINGS):
        drawn = [_quality(store, store.path.with_suffix(".svg"))]
        drawn.append(_frontier(store, store.path.with_name("frontier.svg")))
    return [f"Plot in {path}." for path in drawn if path is not None]


def _quality(store: Store, path: Path) -> Path | None:
    """Means as lines, single seeds as faint points, the name of each recipe at the end of its line."""
    dense = store.find(Cell(DENSE))
    curves = {
        row.name: {
            sparsity: [record["perplexity"] for record in seeds.values() if "failed" not in record]
            for sparsity, seeds in store.of_row(row).items()
        }
        for row in TABLE
    }
    curves = {name: {at: values for at, values in curve.items() if values} for name, curve in curves.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    if dense is None or not curves:
        return None
    figure, axes = _axes(
        f"{store.protocol.model} pruned: first {store.protocol.windows} windows of {store.protocol.data}",
        "sparsity of the block matrices",
    )
    axes.axhline(dense["perplexity"], color=GREY, linewidth=0.8)
    ends = {f"dense {dense['perplexity']:.1f}": dense["perplexity"]}
    for name, curve in curves.items():
        style = STYLES[name]
        means = [statistics.mean(values) for values in curve.values()]
        axes.plot(list(curve), means, linewidth=1.6, markersize=4.5, **style)
        for sparsity, values in curve.items():
            axes.plot(
                [sparsity] * len(values), values, linestyle="", marker=style["marker"], markersize=3.5,
                markerfacecolor="none", markeredgecolor=style["color"], alpha=0.45,
            )  # fmt: skip
        ends[name] = means[-1]
    sparsities = sorted({sparsity for curve in curves.values() for sparsity in curve})
    axes.set_xticks(sparsities, [f"{sparsity:g}" for sparsity in sparsities])
    axes.set_xlim(sparsities[0] - 0.01, sparsities[-1] + 0.01)
    _round_ticks(axes)
    _label_ends(axes, ends)
    return _saved(figure, path)


def _frontier(store: Store, path: Path) -> Path | None:
    """Pruned models along a line for each form of their values, the dense model's forms along another."""
    field = contestants(store)
    dense = [c for c in field if c.sparsity is None and c.form != GGUF]
    if not field:
        return None
    figure, axes = _axes(
        f"{store.protocol.model}: quality against size, first {store.protocol.windows} windows of "
        f"{store.protocol.data}",
        "weights on disk, MB (embeddings, head, norms in bf16 for all)",
    )
    _line(axes, dense, "x", GREY, (0, (1, 1.5)), [f"dense {c.form}" for c in dense], (-6, -11))
    for form, marker, color, dashes in (("bf16", "D", "#3d6f9e", (0, (5, 2))), ("int8", "o", "#0b2545", "-")):
        pruned = [c for c in field if c.sparsity is not None and c.form == form]
        names = [f"{c.sparsity:g}" for c in pruned[:-1]] + [f"{c.sparsity:g} sparse, {form}" for c in pruned[-1:]]
        _line(axes, pruned, marker, color, dashes, names, (7, 3))
    _line(axes, [c for c in field if c.form == GGUF], "*", "black", "", ["dense, its GGUF file"], (-8, -4))
    axes.margins(x=0.13, y=0.12)
    _round_ticks(axes)
    return _saved(figure, path)


def _axes(title: str, across: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel("perplexity, log scale")
    axes.set_yscale("log")
    return figure, axes


def _line(
    axes: Any,
    field: Sequence[Contestant],
    marker: str,
    color: str,
    dashes: Any,
    names: Sequence[str],
    offset: tuple[int, int],
) -> None:
    """Contestants of one kind by size, each with its name at an offset in points: beside it, on that side."""
    sizes = [c.nbytes / 1e6 for c in field]
    axes.plot(sizes, [c.perplexity for c in field], marker=marker, color=color, linestyle=dashes)
    for c, size, name in zip(field, sizes, names, strict=False):
        axes.annotate(
            name, (size, c.perplexity), xytext=offset, textcoords="offset points", color=color, fontsize=9,
            ha="left" if offset[0] > 0 else "right",
        )  # fmt: skip


def _label_ends(axes: Any, ends: Mapping[str, float]) -> None:
    """Names to the right of the axes at the heights of the lines' ends, moved apart where they would touch."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    gap = 0.055 * (high - low)
    height = -math.inf
    for name, value in sorted(ends.items(), key=lambda item: item[1]):
        height = max(math.log(value), height + gap)
        color = STYLES[name]["color"] if name in STYLES else GREY
        axes.text(1.015, math.exp(height), name, color=color, va="center", transform=axes.get_yaxis_transform())


def _round_ticks(axes: Any) -> None:
    """1, 2, 5, 10, ... instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path
