"""Captions: embeddings, similarity to their images, length and language. No image is decoded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..engine.backend import Backend, backend_of
from ..engine.cache import cache
from ..engine.frames import apply_step, refuse_text, require_columns
from ..models import ModelError
from ..models.encoders import EncoderSpec, resolve_encoder
from ..models.text_tower import TextEncoder, load_text_encoder, require_text_tower

if TYPE_CHECKING:
    import torch

READ = "read the shards with read_webdataset, or name yours with "
EMBED = "make it with embed, or name yours with embedding="

#: Rows compared at a time.
BLOCK = 65_536


@dataclass(frozen=True)
class TextUse:
    """Which text column is embedded by which model, and the output column."""

    encoder: EncoderSpec
    caption: str = "caption"
    embedding: str = "embedding"
    column: str = "clip_score"
    batch_size: int | None = None


def texts_of(backend: Backend, frame: Any, column: str) -> list[str | None]:
    """Texts of a column, in host memory; TypeError if it holds anything else."""
    values = backend.to_host(frame, [column])[column]
    type_ = values.type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
        values = values.cast(type_)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_text(type_) for is_text in texts):
        raise TypeError(f"column {column!r} holds {type_}, not text: name the column with the captions")
    return list(values.to_pylist())


def embed_text_partition(frame: Any, use: TextUse) -> Any:
    """Embed a partition's captions; an empty caption is a text like any other."""
    backend = backend_of(frame)
    texts = texts_of(backend, frame, use.caption)
    rows = np.array([i for i, text in enumerate(texts) if text is not None], np.int64)
    if len(rows):
        encoder = load_text_encoder(use.encoder, backend.device)
        values = encoder.encode_texts([texts[i] or "" for i in rows], use.batch_size)
    else:
        values = _no_vectors(backend)
    return frame.assign(**{use.column: backend.matrix_column(values, rows, frame.index)})


def clip_score_partition(frame: Any, use: TextUse) -> Any:
    """Compare each image of a partition with its caption."""
    backend = backend_of(frame)
    texts = texts_of(backend, frame, use.caption)
    values, rows = backend.matrix(frame[use.embedding])
    kept = [i for i, row in enumerate(rows.tolist()) if texts[row] is not None]
    if kept:
        encoder = load_text_encoder(use.encoder, backend.device)
        check_width(values, encoder, use.embedding)
        text = encoder.encode_texts([texts[i] or "" for i in rows[kept].tolist()], use.batch_size)
        scores = _cosine(values[kept], text)
    else:
        scores = _no_vectors(backend)[:, 0]
    return frame.assign(**{use.column: backend.float_column(scores, rows[kept], frame.index)})


def _no_vectors(backend: Backend) -> torch.Tensor:
    import torch

    return torch.empty((0, 1), device=backend.device)


def check_width(values: torch.Tensor, encoder: TextEncoder, column: str) -> None:
    if values.shape[1] != encoder.width:
        raise ModelError(
            f"column {column!r} holds embeddings of width {values.shape[1]}, the text tower of "
            f"{encoder.spec.model!r} gives {encoder.width}: name the model that made them, as model= and pretrained="
        )


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise cosine."""
    import torch

    pairs = zip(a.split(BLOCK), b.split(BLOCK), strict=True)
    return torch.cat([torch.nn.functional.cosine_similarity(x, y, dim=1) for x, y in pairs])


def encoder_of(model: str, pretrained: str | None, dtype: str | None, step: str) -> EncoderSpec:
    """Resolve the model whose text tower a step needs."""
    spec = resolve_encoder(model, pretrained, dtype)
    require_text_tower(spec, step)
    return spec


def _check_batch(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")


def embed_text(
    df: Any,
    model: str = "ViT-L-14",
    pretrained: str | None = None,
    *,
    column: str = "caption",
    output: str = "text_embedding",
    batch_size: int | None = None,
    dtype: str | None = None,
) -> Any:
    """Embed the captions of a DataFrame.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With a column of captions.
    model : str
        Name of an open_clip model. The starter model has no text tower.
    pretrained : str, optional
        open_clip's tag, a checkpoint's path, or ``random:SEED``.
    column : str
        Column with the captions.
    output : str
        Name of the new column.
    batch_size : int, optional
        Texts per forward pass; by default 16 on a CPU and 512 on a GPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Type of the encoder; each worker resolves ``auto`` for its processor.

    Returns
    -------
    the frame's type
        With `output` (list of float32, unit length); null without a caption.

    Raises
    ------
    ModelError
        If the model or tag does not exist, has no text tower, or its weights or tokenizer are unavailable.

    Notes
    -----
    The tokenizer is the model's own (`open_clip.get_tokenizer`), with its text cleaning and context length; only the
    first 3,000 characters of a caption are used. If the same process embeds images with the same model, the model is
    in memory only once.
    """
    require_columns(df, [column], "embed_text", READ + "column=")
    _check_batch(batch_size)
    use = TextUse(encoder_of(model, pretrained, dtype, "embed_text"), column, "", output, batch_size)
    return apply_step(df, embed_text_partition, use, pa.schema([(output, pa.list_(pa.float32()))]), [column])


def score_clip(
    df: Any,
    model: str = "ViT-L-14",
    pretrained: str | None = None,
    *,
    embedding: str = "embedding",
    caption: str = "caption",
    output: str = "clip_score",
    batch_size: int | None = None,
    dtype: str | None = None,
) -> Any:
    """Add ``clip_score``: the cosine of each caption's and its image's embeddings.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With embeddings of images and a column of captions.
    model : str
        The open_clip model that made the embeddings; a frame does not record it, so only the width is checked.
    pretrained : str, optional
        Its weights, as for `embed`.
    embedding : str
        Column with the images' embeddings.
    caption : str
        Column with the captions.
    output : str
        Name of the new column.
    batch_size : int, optional
        Texts per forward pass; by default 16 on a CPU and 512 on a GPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Type of the encoder; each worker resolves ``auto`` for its processor.

    Returns
    -------
    the frame's type
        With `output` (float32, −1 to 1), null without a caption or embedding.

    Raises
    ------
    ModelError
        If the model does not exist, has no text tower, cannot be loaded, or has another width than the column.

    Notes
    -----
    With OpenAI's ViT-L/14, this is DataComp's ``clip_l14_similarity_score``.
    """
    require_columns(df, [embedding], "score_clip", EMBED)
    require_columns(df, [caption], "score_clip", READ + "caption=")
    refuse_text(df, embedding)
    _check_batch(batch_size)
    use = TextUse(encoder_of(model, pretrained, dtype, "score_clip"), caption, embedding, output, batch_size)
    return apply_step(df, clip_score_partition, use, pa.schema([(output, pa.float32())]), [caption, embedding])


# --- length and language --------------------------------------------------------------------------

#: Characters used to detect a text's language; more do not change the answer.
_MAX_CHARS = 3_000


@dataclass(frozen=True)
class CaptionUse:
    """Which measures of which text column."""

    caption: str = "caption"
    language: bool = False
    min_confidence: float = 0.2

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the added columns."""
        fields = [(f"{self.caption}_words", pa.int32()), (f"{self.caption}_chars", pa.int32())]
        if self.language:
            fields.append((f"{self.caption}_language", pa.string()))
            fields.append((f"{self.caption}_language_confidence", pa.float32()))
        return pa.schema(fields)


def caption_stats_partition(frame: Any, use: CaptionUse) -> Any:
    """Measure a partition's captions; null without one."""
    backend = backend_of(frame)
    texts = texts_of(backend, frame, use.caption)
    columns: list[Sequence[Any]] = [
        [None if text is None else len(text.split()) for text in texts],
        [None if text is None else len(text) for text in texts],
    ]
    if use.language:
        found = detect_languages(texts, use.min_confidence)
        columns += [[language for language, _ in found], [confidence for _, confidence in found]]
    schema = use.schema
    table = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    added = backend.from_arrow(table)
    added.index = frame.index
    # By position: labels of an index may repeat.
    return frame.assign(**{name: added[name] for name in schema.names})


def language_problem() -> str | None:
    """Say why languages cannot be detected here and how to fix it; None if they can."""
    if importlib.util.find_spec("py3langid") is None:
        return 'detecting languages needs py3langid: pip install "dask-imgcurator[text]"'
    return None


def detect_languages(texts: Sequence[str | None], min_confidence: float = 0.2) -> list[tuple[str | None, float | None]]:
    """Detect each text's language (of py3langid's 140) and its probability; both None for missing or blank text."""
    # The code (ISO 639-1, else 639-3) is None if undetermined: too short, too mixed, or not a language.
    classify = cache.get("language", None, _load_classifier)
    found: list[tuple[str | None, float | None]] = []
    for text in texts:
        if text is None or not text.strip():
            found.append((None, None))
            continue
        language, confidence = classify(text[:_MAX_CHARS])
        # "zxx": no linguistic content.
        found.append((language if confidence >= min_confidence and language != "zxx" else None, confidence))
    return found


def _load_classifier() -> Callable[[str], tuple[str, float]]:
    problem = language_problem()
    if problem:
        raise ImportError(problem)
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # Our own instance, because the package's functions share one that any code may restrict to other languages.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    classify: Callable[[str], tuple[str, float]] = identifier.classify
    return classify


def caption_stats(df: Any, caption: str = "caption", *, language: bool = False, min_confidence: float = 0.2) -> Any:
    """Add the length of captions and, on request, their language.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With a column of text.
    caption : str
        Name of the column; new columns begin with it.
    language : bool
        Whether the language is detected, by py3langid (``pip install "dask-imgcurator[text]"``).
    min_confidence : float
        Minimum probability of a language, 0 to 1; below it, the language is undetermined.

    Returns
    -------
    the frame's type
        With ``caption_words`` (int32: runs between white space), ``caption_chars`` (int32: Unicode code points) and,
        with `language`, ``caption_language`` (ISO 639-1 code, or 639-3 if there is none; null if undetermined) and
        ``caption_language_confidence`` (float32); null without a caption.

    Raises
    ------
    ImportError
        If `language` is set and py3langid is not installed.
    """
    require_columns(df, [caption], "caption_stats", READ + "caption=")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: it must be from 0 to 1")
    problem = language_problem() if language else None
    if problem:
        raise ImportError(problem)
    use = CaptionUse(caption, language, min_confidence)
    return apply_step(df, caption_stats_partition, use, use.schema, [caption])
