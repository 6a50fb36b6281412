"""Input for DataComp's tools: metadata, and uids for its resharder."""

from __future__ import annotations

import hashlib
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..select.ranks import IDENTITY
from .base import ExportError, Field, Layout, export_format, filled, require
from .lists import values_of

_FIELDS = (
    Field("url", ("url", "URL"), pa.string()),
    Field("text", ("caption", "text"), pa.string(), needs="caption"),
    Field("original_width", ("original_width", "width"), pa.int64(), needs="width"),
    Field("original_height", ("original_height", "height"), pa.int64(), needs="height"),
    Field("clip_b32_similarity_score", ("clip_b32_similarity_score",), pa.float32()),
    Field("clip_l14_similarity_score", ("clip_l14_similarity_score",), pa.float32()),
    Field("face_bboxes", ("face_bboxes",)),
    Field("sha256", ("sha256",), pa.string()),
)


@export_format("datacomp", "*.parquet and *.npz as distributed by DataComp")
def datacomp(
    df: Any, arch: str | None = None, embedding: str | None = "embedding", text_embedding: str | None = None
) -> Layout:
    """Write metadata as distributed by DataComp (baselines/apply_filter.py, image_based_clustering.py).

    ``<8 digits>.parquet`` has ``uid``, ``text``, ``original_width``, ``original_height`` and, if the table has them,
    ``url``, ``clip_<arch>_similarity_score`` (from ``clip_score``), ``face_bboxes`` and ``sha256``. ``<8 digits>.npz``
    has ``<arch>_img`` and ``<arch>_txt`` for the same rows, float16, from the columns `embedding` (if it exists) and
    `text_embedding`. `arch`, ``b32`` or ``l14``, is the CLIP model of scores and vectors, and required if there are
    any.

    Without a column ``uid``, uids are computed: 128 bits of BLAKE2b of ``shard``, ``key`` and ``sample_offset``. The
    resharder will not find these in the tars. ``original_width`` and ``original_height`` are the size before
    img2dataset resized the image: read these JSON fields if they exist, otherwise the decoded size is written.
    """
    if embedding == "embedding" and embedding not in df.columns:
        embedding = None
    scored = "clip_score" in df.columns
    if arch not in ("b32", "l14") and (embedding or text_embedding or scored or arch is not None):
        raise ExportError(
            f"arch={arch!r}: name the CLIP model of the scores and vectors, 'b32' or 'l14' "
            "(on the command line: --arch)"
        )
    fields = filled(df, _FIELDS, "datacomp")
    if scored:
        score = f"clip_{arch}_similarity_score"
        fields = [f for f in fields if f.name != score] + [Field(score, ("clip_score",), pa.float32())]
    vectors = {f"{arch}_{kind}": c for kind, c in (("img", embedding), ("txt", text_embedding)) if c}
    for column in vectors.values():
        require(df, column, "datacomp", vector=True)
    uid = Field("uid", ("uid",), pa.string())
    if "uid" not in df.columns:
        require(df, "key", "datacomp")
        uid = Field("uid", tuple(name for name in IDENTITY if name in df.columns), make=_made_uids)
    names = {"parquet": "{}.parquet"} | ({"npz": "{}.npz"} if vectors else {})
    return Layout([uid, *fields], names, 8, vectors)


def _made_uids(table: pa.Table) -> pa.Array:
    """Hash the identity of rows to 128 bits: BLAKE2b of shard, key and sample_offset, as 32 digits."""
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    uids = (hashlib.blake2b("\0".join(map(str, row)).encode(), digest_size=16).hexdigest() for row in rows)
    return pa.array(uids, pa.string())


@export_format("datacomp-subset", "sorted uids (u8,u8) for DataComp's resharder, one .npy file", folder=False)
def datacomp_subset(df: Any, file: IO[bytes], uid: str = "uid", repeat: str | None = None) -> int:
    """Write the rows' uids for DataComp's resharder (README, "filtering track", and resharder.py).

    A NumPy array of dtype ``u8,u8``, shape (n,): the upper and the lower 64 bits, sorted by both. Each uid occurs once,
    or, with `repeat`, as often as this column of whole numbers says: the resharder writes a sample as often as its uid
    occurs. Sorted in the memory of this process, about 64 bytes per uid.
    `uid` is a column of 32 hexadecimal digits: the samples' own uids, from their JSON
    (``read_webdataset(columns=["uid"])``), because the resharder looks there.
    """
    parts = (_words(values, uid) for values in values_of(df, uid, repeat, "datacomp-subset"))
    words = np.concatenate([np.empty((0, 2), np.uint64), *parts])
    words = words[np.lexsort((words[:, 1], words[:, 0]))]
    if repeat is None:
        words = words[np.r_[True, (words[1:] != words[:-1]).any(1)][: len(words)]]
    np.save(file, np.ascontiguousarray(words).view(np.dtype("u8,u8")).reshape(-1))
    return len(words)


def _words(values: pa.ChunkedArray, column: str) -> np.ndarray:
    """Split uids into two numbers each: (n, 2) uint64."""
    values = values.cast(pa.string())
    good = pc.match_substring_regex(values, "^[0-9a-fA-F]{32}$")
    if not pc.all(good, min_count=0).as_py():
        wrong = values.filter(pc.invert(good))[0].as_py()
        raise ExportError(f"column {column!r} holds {wrong!r}: a uid has 32 hexadecimal digits")
    digits = bytes.fromhex("".join(values.to_pylist()))
    return np.frombuffer(digits, ">u8").astype(np.uint64).reshape(-1, 2)
