"""The README's pictures of a report, taken by a browser without a screen.

    trim-export inspect a --html report.html --bench bench.json --eval eval.json
    python -m benchmarks.gallery report.html

Each view hides the rest of the page and is cut to what is left; the phone sees the page as it is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = 128
"""Of a picture's palette; more than flat colours and the edges of letters need."""
MARGIN = 24
AFTER_THE_TABLE = "body > section:nth-of-type(n + 3), .pictures"


@dataclass(frozen=True)
class View:
    """What one picture shows.

    Attributes:
        hidden: selector of what is left out.
        size: of the window, in CSS pixels.
    """

    hidden: str
    size: tuple[int, int]


def figures(*pictures: str) -> str:
    """Selector of everything but the figures whose pictures' descriptions begin so."""
    others = "".join(f':not(:has(img[alt^="{picture}"]))' for picture in pictures)
    return f"body > :not(.pictures), figure{others}"


VIEWS = {
    "headline": View(AFTER_THE_TABLE, (1160, 1200)),
    "rows": View(figures("Heat maps", "Gini"), (1000, 1600)),
    "blocks": View(figures("Sparsity"), (520, 1200)),
    "runtimes": View(figures("Tokens"), (520, 1200)),
}
PHONE = 390, 844


def main() -> None:
    """Take every picture of one report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("report", type=Path)
    page = options.parse_args().report.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for name, view in VIEWS.items():
            shown = place / f"{name}.html"
            shown.write_text(page.replace("</style>", f"{view.hidden} {{ display: none !important }}\n</style>", 1))
            store(cropped(photograph(shown, view.size)), name)
        (place / "report.html").write_text(page)
        width, height = PHONE
        frame = place / "phone.html"
        frame.write_text(
            '<body style="margin: 8px"><iframe src="report.html" scrolling="no" '
            f'style="width: {width}px; height: {height}px; border: 6px solid #111827; border-radius: 28px"></iframe>'
        )
        store(cropped(photograph(frame, (500, height + 40))), "phone")


def photograph(page: Path, size: tuple[int, int]) -> Image.Image:
    """What a browser shows of a page in a window of so many pixels, with 1.5 pixels for each."""
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    file = page.with_suffix(".png")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1.5",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={size[0]},{size[1]}", f"--screenshot={file}",
        page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(file) as image:
        return image.convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    """Without the white around it, but for a margin."""
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    assert box is not None, "the page is white"
    left, upper, right, lower = box
    width, height = image.size
    return image.crop(
        (max(0, left - MARGIN), max(0, upper - MARGIN), min(width, right + MARGIN), min(height, lower + MARGIN))
    )


def store(image: Image.Image, name: str) -> None:
    """Write one picture, with a palette."""
    file = IMAGES / f"{name}.png"
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {image.width} x {image.height}, {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
