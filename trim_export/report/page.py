"""An artifact as one page to look at: no script, nothing fetched, readable on a phone and on paper."""

from __future__ import annotations

import base64
import statistics
from pathlib import Path
from typing import Any

from trim_export.artifact import Artifact
from trim_export.errors import EnvironmentLacks
from trim_export.report import figures
from trim_export.report.headline import NOTHING, Measured, conditions, headlines
from trim_export.report.rows import MatrixRows, matrix_rows
from trim_export.report.words import method_sentence, recovery_sentence, structured_sentence

__all__ = ["TEMPLATE", "page", "pictures"]

TEMPLATE = Path(__file__).with_name("page.html")


def page(artifact: Artifact, measured: Measured = NOTHING) -> str:
    """The page as HTML, its pictures inside it.

    Args:
        artifact: finished.
        measured: what was measured of it.

    Raises:
        EnvironmentLacks: matplotlib or Jinja is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise EnvironmentLacks("the page needs the report extra: pip install 'trim-export[report]'") from error
    manifest = artifact.manifest
    matrices = matrix_rows(artifact)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        manifest=manifest,
        steps=_steps(manifest),
        headlines=headlines(manifest, measured),
        conditions=conditions(measured),
        bench=measured.bench,
        quality=measured.quality,
        pictures={name: _embedded(svg) for name, svg in pictures(matrices, measured).items()},
        matrices=matrices,
        gini=statistics.mean(matrix.gini for matrix in matrices),
    )


def pictures(matrices: list[MatrixRows], measured: Measured = NOTHING) -> dict[str, str]:
    """The pictures that there is something to draw for, as SVG by name."""
    if all(matrix.block is None for matrix in matrices):
        return {}
    drawn = {
        "blocks": figures.blocks_figure(matrices),
        "rows": figures.rows_figure(matrices),
        "concentration": figures.concentration_figure(matrices),
        "rates": figures.rates_figure(matrices),
        "runtimes": figures.runtimes_figure(measured.bench) if measured.bench and measured.bench["rows"] else None,
    }
    return {name: svg for name, svg in drawn.items() if svg is not None}


def _steps(manifest: dict[str, Any]) -> list[str]:
    """What was done, in order."""
    removed, recovery = manifest["source"].get("structured"), manifest.get("recovery")
    return [
        *([structured_sentence(removed)] if removed else []),
        method_sentence(manifest),
        *([f"recovered: {recovery_sentence(recovery)}"] if recovery else []),
    ]


def _embedded(svg: str) -> str:
    """A picture as an address that needs no file."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
