"""Small pictures of rows, made from the original bytes at their locators."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any

from ..storage.tar_read import read_extents
from .pillow import inspect, open_image

#: Where an image is: URL of its shard, and offset.
Place = tuple[str, int]

#: Pixels of the longer side, in notebooks and in pages (where pictures can be enlarged): 5 and 12 kB per photograph.
SIDE, PAGE_SIDE = 160, 320

_MAX_NBYTES, _MAX_PIXELS = 64_000_000, 50_000_000  # larger images are not worth decoding for a thumbnail


def make_thumbnails(
    rows: Iterable[Mapping[str, Any]],
    *,
    side: int = SIDE,
    upright: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[Place, str]:
    """Make ``data:`` URIs for rows (with ``shard``, ``offset`` and ``nbytes``), shard by shard.

    Rows are left out if their shard is gone, or their bytes are damaged, of an unknown format or of too many pixels.
    """
    by_shard: dict[str, dict[int, int]] = {}
    for row in rows:
        if row.get("shard") and row.get("nbytes") and row["nbytes"] <= _MAX_NBYTES:
            by_shard.setdefault(row["shard"], {})[row["offset"]] = row["nbytes"]
    made: dict[Place, str] = {}
    for url, extents in by_shard.items():
        places = sorted(extents.items())
        try:
            for (offset, _), data in zip(places, read_extents(url, places, storage_options), strict=True):
                uri = thumbnail(data, side, upright)
                if uri is not None:
                    made[url, offset] = uri
        except Exception:  # the shard is gone, or a remote file system fails somehow: the page counts missing pictures
            continue
    return made


def thumbnail(data: bytes, side: int = SIDE, upright: bool = False) -> str | None:
    """Make the ``data:`` URI of an image file, its longer side at most `side`; None if it cannot be made.

    `upright` applies the orientation in its EXIF data.
    """
    from PIL import Image, ImageOps

    try:
        inspect(data, _MAX_PIXELS)
        with open_image(data) as image:
            image.draft("RGB", (2 * side, 2 * side))
            small = ImageOps.exif_transpose(image) if upright else image
            small.thumbnail((side, side))
            rgba = small.convert("RGBA")
        # Only the pixels are kept: no EXIF data, no profile.
        flat = Image.new("RGB", rgba.size, "white")
        flat.paste(rgba, mask=rgba.getchannel("A"))
        out = io.BytesIO()
        flat.save(out, "WEBP", quality=75)
    except Exception:  # a damaged file can raise nearly anything in Pillow's plugins
        return None
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
