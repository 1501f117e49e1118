"""The page: self-contained, safe with hostile names, and without errors in a real browser."""

from __future__ import annotations

import base64
import copy
import dataclasses
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_results import BENCH

from trim_export.artifact import Artifact
from trim_export.report.headline import Measured
from trim_export.report.rows import matrix_rows

pytest.importorskip("matplotlib", reason="the report extra is not installed")
from trim_export.report.page import page, pictures

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def shown(pruned: Callable[[str], Artifact]) -> str:
    return page(pruned("llama"), Measured(bench=BENCH))


def test_nothing_is_fetched_and_nothing_runs(shown: str) -> None:
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", shown)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in shown


def test_every_picture_is_drawn(pruned: Callable[[str], Artifact], shown: str) -> None:
    encoded = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', shown)
    drawn = [ET.fromstring(base64.b64decode(picture)) for picture in encoded]
    texts = [{"".join(node.itertext()).strip() for node in picture.iter() if node.tag.endswith("text")}
             for picture in drawn]  # fmt: skip
    expected = pictures(matrix_rows(pruned("llama")), Measured(bench=BENCH))
    assert set(expected) == {"rows", "blocks", "concentration", "rates", "runtimes"}
    assert len(drawn) == len(expected)
    assert any({"q_proj", "down_proj", "rows, %"} <= words for words in texts)
    assert any({"decode, tokens/s", "b float32", "20.0"} <= words for words in texts)


@pytest.mark.parametrize("kind", ["opt", "gpt-neox", "gemma3"])
def test_every_architecture_has_a_page(kind: str, pruned: Callable[[str], Artifact]) -> None:
    shown = page(pruned(kind))
    assert all(name in shown for name in pruned(kind).modules)
    assert "Speed was not measured" in shown


def test_the_same_artifact_gives_the_same_page(pruned: Callable[[str], Artifact], shown: str) -> None:
    assert page(pruned("llama"), Measured(bench=BENCH)) == shown


def test_names_from_an_artifact_are_text(pruned: Callable[[str], Artifact]) -> None:
    manifest = copy.deepcopy(pruned("llama").manifest)
    manifest["source"]["model"] = "<script>alert(1)</script>$x^$"
    shown = page(dataclasses.replace(pruned("llama"), manifest=manifest))
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


def console(html: str, place: Path) -> list[str]:
    """What a browser says on its console about a page."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    file = place / "page.html"
    file.write_text(html, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=390,2000")
    command = [browser, *options, f"--user-data-dir={place / 'profile'}", "--dump-dom", file.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>" in run.stdout
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_has_nothing_to_complain_about(shown: str, tmp_path: Path) -> None:
    assert console(shown, tmp_path) == []


def test_a_browser_would_complain_about_a_page_that_fetches(shown: str, tmp_path: Path) -> None:
    """That the test above can fail."""
    broken = shown.replace("</body>", '<img src="https://example.invalid/x.png"></body>')
    assert console(broken, tmp_path) != []
