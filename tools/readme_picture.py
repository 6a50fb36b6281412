"""Draw the picture of a report that README.md shows: pictures made here, the starter's scores, a real browser.

    python tools/readme_picture.py docs/_static/report.png

Needs the extra `test` and Debian's chromium. The pictures are landscapes of random hills, so that no one's photographs
are in the repository.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import dask_imgcurator as dic

COUNT, WIDE = 240, 1160


def landscape(rng: np.random.Generator) -> Image.Image:
    """A sky, a sun, some ranges of hills; some pictures small, blurred, dark or nearly plain."""
    width, height = (int(n) for n in rng.integers(100, 640, 2).clip(120, 480))
    top, low = rng.integers(40, 255, (2, 3))
    rows = np.linspace(0, 1, height)[:, None, None]
    sky = np.broadcast_to(top + (low - top) * rows, (height, width, 3)) + rng.normal(0, 4, (height, width, 3))
    image = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    radius, x, y = rng.integers(10, 60), rng.integers(0, width), rng.integers(0, height // 2)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 240, int(rng.integers(120, 230))))
    for nearer in range(int(rng.integers(0, 5))):
        steps = np.cumsum(rng.normal(0, 6, width)) + height * (0.45 + 0.12 * nearer)
        shade = tuple(int(c) for c in low * (0.8 - 0.17 * nearer))
        draw.polygon([(0, height), *enumerate(steps.tolist()), (width, height)], fill=shade)
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(2, 12))))
    return image.point(lambda value: value // 5) if rng.random() < 0.1 else image


def write_shards(folder: Path) -> None:
    """Write the pictures as shards, a few of them damaged."""
    rng = np.random.default_rng(5)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, COUNT, 4):
                file = io.BytesIO()
                landscape(rng).save(file, "JPEG", quality=90)
                image = file.getvalue()
                if i % 29 == 7:
                    image = image[: len(image) // 2]
                for ext, data in (("jpg", image), ("txt", f"hills in the evening, number {i}".encode())):
                    info = tarfile.TarInfo(f"{i:05d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="PNG file to write")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        write_shards(Path(scratch))
        dic.score_shards(f"{scratch}/*.tar", f"{scratch}/hills/scores", model="starter", backend="pandas")
        where = "aesthetic_score >= 4.6 and width >= 200"
        report = dic.write_report(f"{scratch}/hills/scores", f"{scratch}/report.html", where)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDE, "height": 900})
        page.goto(Path(report).as_uri())
        # The first row of histograms does for a look.
        page.evaluate("document.querySelectorAll('.figures > figure:nth-child(n + 4)').forEach(f => f.remove())")
        bottom = page.locator("ul.wall").first.bounding_box()
        height = 900 if bottom is None else int(bottom["y"] + 260)
        page.set_viewport_size({"width": WIDE, "height": height})
        shot = page.screenshot(clip={"x": 0, "y": 0, "width": WIDE, "height": height})
        browser.close()
    Path(args.target).parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(shot)).quantize(256).save(args.target, optimize=True)


if __name__ == "__main__":
    main()
