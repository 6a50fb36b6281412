"""Queries as vectors: texts and images by the model that made a table, rows by their own embeddings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from .. import config
from ..engine.backend import Backend
from ..images.dali import dali_problem
from ..models import ModelError
from ..models.encoders import Encoder, EncoderSpec, load_encoder, resolve_encoder
from ..models.text_tower import load_text_encoder, require_text_tower
from ..steps.embed import EmbedSpec, embed_partition
from ..steps.score_table import MixedModelsError, ScoreTable, check_makers
from ..storage import files
from .scan import SearchError, unit

#: Fields that identify weights; a tag or name counts only without a hash.
_WEIGHTS = ("weights_sha256", "backbone_sha256", "starter_sha256")


@dataclass(frozen=True, eq=False)
class Query:
    """A query: its unit vector, (d,) float64, and its label.

    `label` is the text, the image's URL, the row's shard and key, or a number. `own` is the row that it was taken from,
    which is excluded from the results.
    """

    kind: Literal["text", "image", "like", "embedding"]
    label: str
    vector: np.ndarray
    own: Mapping[str, Any] | None = None


# --- the model ------------------------------------------------------------------------------------


def table_provenance(table: ScoreTable) -> dict[str, Any]:
    """Return the provenance of a table's first file, if any; all files must name the same model."""
    try:
        return check_makers(table, ["embedding"])
    except MixedModelsError as err:
        raise SearchError(str(err)) from err


def table_encoder(made: Mapping[str, Any], model: str | None = None, pretrained: str | None = None) -> EncoderSpec:
    """Choose the model that embeds the queries: the one that a table names, unless another is given.

    A table made with your own checkpoint does not record its path: pass it as `pretrained`.
    """
    recorded = made.get("encoder", {})
    name = model or recorded.get("model")
    if name is None:
        raise SearchError(
            "the model of the embeddings is not recorded (it is in a score table of `score` or `curate`, read from its "
            "files): name it, as model= and pretrained= (--model, --pretrained)"
        )
    same = name.replace("/", "-") == str(recorded.get("model", "")).replace("/", "-")
    weights = pretrained or (recorded.get("pretrained") if same else None) or None
    try:
        return resolve_encoder(name, weights, recorded.get("dtype"))
    except ModelError as err:
        if pretrained is None and weights is not None and recorded.get("weights_sha256"):
            raise ModelError(
                f"the table was made with the checkpoint {weights!r} (sha256 {recorded['weights_sha256']}): give its "
                f"path, as pretrained= (--pretrained). {err}"
            ) from err
        raise


def _loaded(spec: EncoderSpec, made: Mapping[str, Any], device: str) -> Encoder:
    """Load a model, which must be the table's."""
    encoder = load_encoder(spec, device)
    recorded, here = made.get("encoder", {}), encoder.provenance
    hashed = [name for name in _WEIGHTS if name in recorded and name in here]
    for name in ["model", *(hashed or ["pretrained"])]:
        if name in recorded and recorded[name] != here.get(name):
            raise ModelError(
                f"the table's embeddings were made with {name} {recorded[name]!r}, the query's would be with "
                f"{here.get(name)!r}: cosines between them are meaningless. Name the same model and weights"
            )
    return encoder


# --- queries --------------------------------------------------------------------------------------


def text_queries(texts: Sequence[str], spec: EncoderSpec, made: Mapping[str, Any], device: str) -> list[Query]:
    """Embed texts."""
    empty = [text for text in texts if not (isinstance(text, str) and text.strip())]
    if empty:
        raise SearchError(f"text={empty[0]!r}: say what to look for, such as 'a red car'")
    require_text_tower(spec, "a search by text (one by image= or like= does not)")
    _loaded(spec, made, device)
    vectors = load_text_encoder(spec, device).encode_texts(list(texts)).cpu().numpy()
    return [Query("text", text, vector) for text, vector in zip(texts, unit(vectors), strict=True)]


def image_queries(
    urls: Sequence[str | os.PathLike[str]],
    spec: EncoderSpec,
    made: Mapping[str, Any],
    backend: Backend,
    storage_options: Mapping[str, Any],
) -> list[Query]:
    """Embed image files exactly like the table's rows: an image file is a shard with one image."""
    names = [files.absolute(url) for url in urls]
    _loaded(spec, made, backend.device)
    decode, n = made.get("decode", {}), len(names)
    decoder = decode.get("decoder", config.get("decoder"))
    how = EmbedSpec(
        spec,
        config.get("batch-size"),
        decoder="auto" if decoder == "dali" and dali_problem() else decoder,
        max_pixels=decode.get("max_pixels", config.get("max-pixels")),
        adjust_orientation=bool(decode.get("adjust_orientation", config.get("adjust-orientation"))),
        scale_high_bit_depth=bool(decode.get("scale_high_bit_depth", config.get("scale-high-bit-depth"))),
        storage_options=storage_options,
    )
    sizes = [_size(name, storage_options) for name in names]
    rows = {"shard": names, "offset": [0] * n, "nbytes": sizes, "status": ["ok"] * n}
    done = embed_partition(backend.from_arrow(pa.table({**rows, "error_message": pa.nulls(n, pa.string())})), how)
    for row in backend.to_host(done, ["shard", "status", "error_message"]).to_pylist():
        if row["status"] != "ok":
            raise SearchError(f"image {row['shard']}: {row['error_message']} ({row['status']})")
    vectors = unit(backend.matrix(done["embedding"])[0].cpu().numpy())
    return [Query("image", name, vector) for name, vector in zip(names, vectors, strict=True)]


def _size(url: str, storage_options: Mapping[str, Any]) -> int:
    with files.opened(url, storage_options) as file:
        return file.seek(0, os.SEEK_END)


def vector_queries(embedding: Any) -> list[Query]:
    """Use vectors as given: (d,) or (m, d), of any length but 0."""
    try:
        vectors = np.atleast_2d(np.asarray(embedding, np.float64))
    except (TypeError, ValueError) as err:
        raise SearchError(f"embedding= is not an array of numbers ({err}): give one of shape (d,) or (m, d)") from err
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise SearchError(f"embedding= has the shape {np.shape(embedding)}: give one of (d,) or (m, d)")
    vectors = unit(vectors)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        raise SearchError(f"embedding= has no direction in row {wrong[0]}: all is zero, or a number is not finite")
    return [Query("embedding", f"embedding {i}", vector) for i, vector in enumerate(vectors, 1)]
