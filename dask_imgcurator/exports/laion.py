"""Tables with LAION's column names."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from .base import Field, Layout, export_format, filled

# Spelled and typed as in `laion/aesthetics_v2`; then columns of other releases, which are only copied.
_FIELDS = (
    Field("URL", ("url", "URL"), pa.string(), needs="url"),
    Field("TEXT", ("caption", "TEXT"), pa.string(), needs="caption"),
    Field("WIDTH", ("original_width", "WIDTH", "width"), pa.float64()),
    Field("HEIGHT", ("original_height", "HEIGHT", "height"), pa.float64()),
    Field("similarity", ("clip_score", "similarity"), pa.float64()),
    Field("punsafe", ("nsfw_score", "punsafe"), pa.float32()),
    Field("pwatermark", ("pwatermark", "watermark_score"), pa.float32()),
    Field("AESTHETIC_SCORE", ("aesthetic_score", "AESTHETIC_SCORE"), pa.float32()),
    Field("hash", ("hash",), pa.int64()),
    Field("SAMPLE_ID", ("SAMPLE_ID",)),
    Field("LICENSE", ("LICENSE", "license")),
    Field("NSFW", ("NSFW",)),
    Field("LANGUAGE", ("LANGUAGE",)),
)


@export_format("laion", "part-*.parquet with LAION's column names")
def laion(df: Any) -> Layout:
    """Write a table with LAION's column names.

    ``part-<5 digits>.parquet`` has, as far as the table can fill them, ``URL``, ``TEXT`` (caption), ``WIDTH``,
    ``HEIGHT`` (from the JSON fields ``original_width`` and ``original_height`` if they exist, otherwise as decoded),
    ``similarity`` (clip_score), ``punsafe`` (nsfw_score), ``pwatermark``, ``AESTHETIC_SCORE``, ``hash``, ``SAMPLE_ID``,
    ``LICENSE``, ``NSFW`` and ``LANGUAGE``. Types are those of ``laion/aesthetics_v2_4.75``; LAION's ``similarity`` is
    ViT-B/32's.
    """
    return Layout(filled(df, _FIELDS, "laion"), {"parquet": "part-{}.parquet"}, 5)
