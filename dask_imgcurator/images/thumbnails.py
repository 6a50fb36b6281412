"""Small pictures of rows, made from the original bytes that their locators point to."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any

from ..storage.tar_read import read_extents
from .pillow import inspect, opened

#: Where an image lies: URL of its shard, and offset.
Place = tuple[str, int]

#: Pixels of the longer side. Of pure noise such a picture is about 20 kB of a page, of a photograph about 5.
SIDE = 160

_MAX_NBYTES, _MAX_PIXELS = 64_000_000, 50_000_000  # of a picture that is worth decoding for a thumbnail


def make_thumbnails(
    rows: Iterable[Mapping[str, Any]],
    *,
    side: int = SIDE,
    upright: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[Place, str]:
    """Make ``data:`` URIs of rows (with ``shard``, ``offset`` and ``nbytes``), shard by shard.

    Rows whose picture cannot be made are left out: their shard is gone, or their bytes are damaged, of an unknown kind
    or of too many pixels.
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
        except Exception:  # a shard that is gone, or any error of a remote file system: the page counts what is missing
            continue
    return made


def thumbnail(data: bytes, side: int = SIDE, upright: bool = False) -> str | None:
    """Make the ``data:`` URI of an image file, its longer side at most `side`; None if it cannot be made.

    `upright` applies the orientation that its EXIF data name.
    """
    from PIL import Image, ImageOps

    try:
        inspect(data, _MAX_PIXELS)
        with opened(data) as image:
            image.draft("RGB", (2 * side, 2 * side))
            small = ImageOps.exif_transpose(image) if upright else image
            small.thumbnail((side, side))
            rgba = small.convert("RGBA")
        # Nothing of the file but its pixels goes on: no EXIF, no profile.
        flat = Image.new("RGB", rgba.size, "white")
        flat.paste(rgba, mask=rgba.getchannel("A"))
        out = io.BytesIO()
        flat.save(out, "WEBP", quality=75)
    except Exception:  # bytes of strangers can raise nearly anything in Pillow's plugins
        return None
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
