"""The folder layout of clip-retrieval, autofaiss and embedding-reader."""

from __future__ import annotations

from typing import Any

from ..schema import kind_of
from ..select.ranks import arrow_type
from .base import Field, Layout, export_format, require


@export_format("clip-retrieval", "img_emb/*.npy (float16) and metadata/*.parquet")
def clip_retrieval(df: Any, embedding: str = "embedding", text_embedding: str | None = None) -> Layout:
    """Write the folder layout of ``clip-retrieval inference`` (clip_retrieval/clip_inference/writer.py).

    ``img_emb/img_emb_<i>.npy``, (n, d) float16 from the column `embedding`, and ``metadata/metadata_<i>.parquet`` with
    the same rows, i zero-padded to the length of the number of files; with `text_embedding`, also
    ``text_emb/text_emb_<i>.npy``. The metadata has ``image_path`` (the table's, or else ``key``, as in clip-retrieval
    for webdatasets), ``caption``, and every other column except vectors.
    """
    vectors = {"img_emb": embedding} | ({"text_emb": text_embedding} if text_embedding else {})
    for column in vectors.values():
        require(df, column, "clip-retrieval", vector=True)
    path = "image_path" if "image_path" in df.columns else "key"
    require(df, path, "clip-retrieval")
    first = [Field("image_path", (path,))] + [Field("caption", ("caption",))] * ("caption" in df.columns)
    skipped = {path, "caption", *vectors.values()}
    others = [c for c in df.columns if c not in skipped and kind_of(arrow_type(df, c)) != "list"]
    names = {name: f"{name}/{name}_{{}}.npy" for name in vectors} | {"parquet": "metadata/metadata_{}.parquet"}
    return Layout([*first, *(Field(c, (c,)) for c in others)], names, vectors=vectors)
