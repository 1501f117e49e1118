"""The pictures of a report, as SVG. Legible when printed in grey, and on a phone: narrow, with large letters."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from trim_export.errors import EnvironmentLacks
from trim_export.report.rows import MatrixRows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GREY",
    "SETTINGS",
    "blocks_figure",
    "concentration_figure",
    "rates_figure",
    "rows_figure",
    "runtimes_figure",
]

WIDTH = 5.2
"""Inches; with letters of 10 points a phone shows them at about 8."""
QUANTILES = 60
USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The order in which a block of Llama's family computes them; others come after, by name."""
DARK, MIDDLE, GREY = "#0b2545", "#3d7ea6", "#6b7280"
SETTINGS: Any = {
    "font.size": 10,
    "font.family": ["sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "trim-export",  # the same artifact gives the same file
    "text.parse_math": False,  # names come from an artifact
}
"""Of matplotlib, for every picture that we draw."""


P = ParamSpec("P")
T = TypeVar("T")


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw under our settings and leave the caller's alone; `EnvironmentLacks` where matplotlib is not installed."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise EnvironmentLacks("the pictures need the report extra: pip install 'trim-export[report]'") from error
        with mpl.rc_context(SETTINGS):
            return draw(*args, **kwargs)

    return styled


@_styled
def blocks_figure(matrices: Sequence[MatrixRows]) -> str:
    """Sparsity of each decoder block and its matrices, and how well their outputs are preserved."""
    blocks = _by_block(matrices)
    figure = _figure(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    sizes = {block: np.array([_size(matrix) for matrix in found]) for block, found in blocks.items()}
    sparsities = {
        block: np.array([1 - matrix.entry["nnz"] / _size(matrix) for matrix in found])
        for block, found in blocks.items()
    }
    together = [float(np.average(sparsities[block], weights=sizes[block])) for block in blocks]
    least = [float(sparsities[block].min()) for block in blocks]
    most = [float(sparsities[block].max()) for block in blocks]
    if max(high - low for low, high in zip(least, most, strict=True)) > 1e-3:
        label = "from its least to its most pruned matrix"
        upper.fill_between(list(blocks), least, most, color=MIDDLE, alpha=0.25, linewidth=0, label=label)
    upper.plot(list(blocks), together, color=DARK, marker="o", markersize=3, label="whole block")
    upper.set_ylabel("sparsity")
    upper.legend(fontsize=8, loc="best")
    for field, label, style in (
        ("cosine", "as pruned", {"color": DARK, "marker": "o", "markersize": 3}),
        ("cosine_uniform", "rows pruned alike, no update", {"color": GREY, "linestyle": (0, (4, 2))}),
    ):
        means = [float(np.mean([matrix.entry[field] for matrix in found])) for found in blocks.values()]
        lower.plot(list(blocks), means, label=label, **style)
    lower.set_ylabel("cosine of outputs")
    lower.set_xlabel("decoder block")
    lower.legend(fontsize=8, loc="best")
    return _svg(figure)


@_styled
def rows_figure(matrices: Sequence[MatrixRows]) -> str:
    """Heat map for each projection: decoder blocks from top to bottom, rows from the densest to the sparsest."""
    projections = _by_projection(matrices)
    lines = -(-len(projections) // 2)
    spare = 2 * lines > len(projections)  # then the colours are explained where no projection is
    figure = _figure((0.4 if spare else 1.0) + 1.4 * lines)
    axes = figure.subplots(lines, 2, squeeze=False).flatten()
    low = min(float(matrix.sparsities[0]) for found in projections.values() for matrix in found)
    high = max(float(matrix.sparsities[-1]) for found in projections.values() for matrix in found)
    places = np.linspace(0, 1, QUANTILES)
    for place, (axis, (name, found)) in enumerate(zip(axes, projections.items(), strict=False)):
        levels = np.stack([np.quantile(matrix.sparsities, places) for matrix in found])
        image = axis.imshow(
            levels, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=max(high, low + 1e-6),
            extent=(0, 100, len(found) - 0.5, -0.5),
        )  # fmt: skip
        axis.set_title(name)
        axis.set_ylabel("block" if place % 2 == 0 else "")
        lowest = place >= 2 * (lines - 1)
        axis.tick_params(labelbottom=lowest, labelleft=place % 2 == 0)
        axis.set_xlabel("rows, %" if lowest else "")
    label = "share of a row that is pruned"
    if spare:
        axes[-1].axis("off")
        place_of_bar = axes[-1].inset_axes((0.05, 0.45, 0.9, 0.12))
        figure.colorbar(image, cax=place_of_bar, orientation="horizontal", label=label)
    else:
        figure.colorbar(image, ax=list(axes), location="top", shrink=0.7, aspect=40, label=label)
    return _svg(figure)


@_styled
def concentration_figure(matrices: Sequence[MatrixRows]) -> str:
    """Gini coefficient of the kept weights over the rows of each matrix, blocks against projections."""
    return _grid(matrices, {matrix.name: matrix.gini for matrix in matrices}, "Gini coefficient", "viridis", "%.2f")


@_styled
def rates_figure(matrices: Sequence[MatrixRows]) -> str | None:
    """The learning rate that TRIM chose for each matrix; None if no search chose any."""
    rates = {matrix.name: matrix.entry.get("learning_rate") for matrix in matrices}
    if all(rate is None for rate in rates.values()):
        return None
    found = {name: np.nan if rate is None else rate for name, rate in rates.items()}
    return _grid(matrices, found, "learning rate (white: uniform rows stayed best)", "PuOr_r", "%g", symmetric=True)


@_styled
def runtimes_figure(bench: Mapping[str, Any]) -> str:
    """Tokens per second of every runtime, decode and prefill, and the memory of its weights."""
    rows = bench["rows"]
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    names = list(dict.fromkeys((row["runtime"], row["dtype"]) for row in rows))
    panels = [
        ("decode, tokens/s", "decode", "tokens_per_s", 1.0),
        ("prefill, tokens/s", "prefill", "tokens_per_s", 1.0),
        ("weights in memory, MB", "decode", "weight_bytes", 1e-6),
    ]
    figure = _figure(0.6 + 0.27 * len(names) * len(panels) + 0.5 * len(panels))
    for axis, (title, phase, field, unit) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        values = {(row["runtime"], row["dtype"]): row[field] * unit for row in rows if row["phase"] == phase}
        shown = [name for name in names if name in values]
        bars = axis.barh(
            [f"{runtime} {dtype}" for runtime, dtype in shown],
            [values[name] for name in shown],
            color=[GREY if runtime == "dense" else DARK for runtime, _ in shown],
        )
        axis.bar_label(bars, fmt="{:.1f}" if unit == 1 else "{:.0f}", padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title)
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
    return _svg(figure)


def _grid(
    matrices: Sequence[MatrixRows], values: Mapping[str, float], label: str, colours: str, form: str,
    symmetric: bool = False,
) -> str:  # fmt: skip
    """One cell for each matrix: projections from top to bottom, blocks from left to right."""
    projections = _by_projection(matrices)
    blocks = sorted(_by_block(matrices))
    cells = np.full((len(projections), len(blocks)), np.nan)
    for line, found in enumerate(projections.values()):
        for matrix in found:
            cells[line, blocks.index(_index(matrix))] = values[matrix.name]
    high = float(np.nanmax(np.abs(cells)))
    low = -high if symmetric else min(0.0, float(np.nanmin(cells)))
    figure = _figure(1.4 + 0.28 * len(projections))
    axis: Axes = figure.subplots()
    image = axis.imshow(cells, aspect="auto", interpolation="nearest", cmap=colours, vmin=low, vmax=high or 1.0,
                        extent=(blocks[0] - 0.5, blocks[-1] + 0.5, len(projections) - 0.5, -0.5))  # fmt: skip
    axis.set_yticks(range(len(projections)), list(projections))
    axis.set_xlabel("decoder block")
    figure.colorbar(image, ax=axis, location="top", shrink=0.8, aspect=35, label=label, format=form)
    return _svg(figure)


def _by_block(matrices: Sequence[MatrixRows]) -> dict[int, list[MatrixRows]]:
    blocks: dict[int, list[MatrixRows]] = {}
    for matrix in matrices:
        if matrix.block is not None:
            blocks.setdefault(matrix.block, []).append(matrix)
    return blocks


def _by_projection(matrices: Sequence[MatrixRows]) -> dict[str, list[MatrixRows]]:
    """Matrices of one kind together, called by the last part of their name where that says which, in `USUAL` order."""
    found: dict[str, list[MatrixRows]] = {}
    for matrix in matrices:
        if matrix.block is not None:
            found.setdefault(matrix.projection, []).append(matrix)
    short = [name.rpartition(".")[2] for name in found]
    named = found if len(set(short)) < len(short) else dict(zip(short, found.values(), strict=True))
    return dict(sorted(named.items(), key=lambda item: USUAL.index(item[0]) if item[0] in USUAL else len(USUAL)))


def _index(matrix: MatrixRows) -> int:
    assert matrix.block is not None
    return matrix.block


def _size(matrix: MatrixRows) -> int:
    rows, columns = matrix.entry["shape"]
    return int(rows * columns)


def _figure(height: float) -> Figure:
    """An empty figure, drawn without a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _svg(figure: Figure) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    # Not `savefig`, which lays the figure out a second time before it draws.
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    return file.getvalue()
