"""The README's pictures: each view finds what it shows, and nothing of it is cut off."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("PIL", reason="Pillow, which matplotlib brings, is not installed")
from PIL import Image

from benchmarks.gallery import MARGIN, VIEWS, cropped
from trim_export.report.page import TEMPLATE


def test_every_figure_that_a_view_shows_is_on_the_page() -> None:
    alternatives = re.findall(r'alt="([^"]+)"', TEMPLATE.read_text(encoding="utf-8"))
    wanted = [begin for view in VIEWS.values() for begin in re.findall(r'alt\^="([^"]+)"', view.hidden)]
    assert len(wanted) == 4
    for begin in wanted:
        assert sum(text.startswith(begin) for text in alternatives) == 1


def test_white_is_cut_away_but_for_a_margin() -> None:
    image = Image.new("RGB", (400, 300), "white")
    image.paste("black", (100, 80, 150, 260))
    cut = cropped(image)
    assert cut.size == (50 + 2 * MARGIN, 180 + MARGIN + MARGIN)
    assert cut.getpixel((MARGIN, MARGIN)) == (0, 0, 0)
    image.paste("black", (0, 0, 400, 300))
    assert cropped(image).size == (400, 300)
