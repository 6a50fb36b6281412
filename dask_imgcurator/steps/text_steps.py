"""The public steps on captions, prompts and a user's own heads: from table to table, without decoding an image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..models.encoders import EncoderSpec, resolve_encoder
from ..models.head_files import HeadFile
from ..models.text_tower import require_text_tower
from ..schema import COLUMNS
from . import captions, own_heads, text
from .collection import apply_step, refuse_text, require_columns

__all__ = ["caption_stats", "embed_text", "score_clip", "score_head", "score_prompts"]

_READ = "read the shards with read_webdataset, or name yours with "
_EMBED = "make it with embed, or name yours with embedding="


def _encoder(model: str, pretrained: str | None, dtype: str | None, step: str) -> EncoderSpec:
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
        With a column of text.
    model : str
        open_clip's name of a model. The starter model has no text tower.
    pretrained : str, optional
        open_clip's tag, a checkpoint's path, or ``random:SEED``.
    column : str
        Column with the text.
    output : str
        Name of the new column.
    batch_size : int, optional
        Texts a forward pass; by default 16 on a CPU and 512 on a GPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Of the encoder; ``auto`` is settled on the worker, by its processor.

    Returns
    -------
    the frame's type
        With `output` (list of float32, unit length); null where there is no caption.

    Raises
    ------
    ModelError
        For a model or tag that does not exist, has no text tower, or whose weights or tokenizer cannot be had.

    Notes
    -----
    The tokenizer is the model's own (`open_clip.get_tokenizer`), with its cleaning and its length of context; of a
    caption the first 3,000 characters are read. Where the images are embedded by the same model in the same process,
    the model is in memory once.
    """
    require_columns(df, [column], "embed_text", _READ + "column=")
    _check_batch(batch_size)
    use = text.TextUse(_encoder(model, pretrained, dtype, "embed_text"), column, "", output, batch_size)
    return apply_step(df, text.embed_text_partition, use, pa.schema([(output, pa.list_(pa.float32()))]))


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
        With embeddings of images and a column of text.
    model : str
        The open_clip model that made the embeddings; a frame does not tell it, only the width is checked.
    pretrained : str, optional
        Its weights, as for `embed`.
    embedding : str
        Column with the images' embeddings.
    caption : str
        Column with the text.
    output : str
        Name of the new column.
    batch_size : int, optional
        Texts a forward pass; by default 16 on a CPU and 512 on a GPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Of the encoder; ``auto`` is settled on the worker, by its processor.

    Returns
    -------
    the frame's type
        With `output` (float32, −1 to 1), null where there is no caption or no embedding.

    Raises
    ------
    ModelError
        For a model that does not exist, has no text tower, cannot be loaded, or gives another width than the column's.

    Notes
    -----
    With OpenAI's ViT-L/14 it is DataComp's ``clip_l14_similarity_score``.
    """
    require_columns(df, [embedding], "score_clip", _EMBED)
    require_columns(df, [caption], "score_clip", _READ + "caption=")
    refuse_text(df, embedding)
    _check_batch(batch_size)
    use = text.TextUse(_encoder(model, pretrained, dtype, "score_clip"), caption, embedding, output, batch_size)
    return apply_step(df, text.clip_score_partition, use, pa.schema([(output, pa.float32())]))


def score_prompts(
    df: Any,
    prompts: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]],
    model: str = "ViT-L-14",
    pretrained: str | None = None,
    *,
    negative: Sequence[str] = text.NEGATIVE,
    method: str = "softmax",
    temperature: float | None = None,
    embedding: str = "embedding",
    dtype: str | None = None,
) -> Any:
    """Score images against prompts, without training: one column for each name.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With embeddings of images.
    prompts : mapping
        Name to its prompts: a list of texts that say what the score is for, or a mapping with the keys ``positive``
        and ``negative``. The name ``watermark`` gives the column ``watermark_score``.
    model : str
        The open_clip model that made the embeddings; a frame does not tell it, only the width is checked.
    pretrained : str, optional
        Its weights, as for `embed`.
    negative : sequence of str
        What is compared with, for those names that have no negative set of their own.
    method : {"softmax", "margin"}
        ``softmax``: probability of the positive set, 0 to 1. ``margin``: difference of the two cosines, −2 to 2.
    temperature : float, optional
        What cosines are multiplied with before the softmax; by default the model's own logit scale.
    embedding : str
        Column with the images' embeddings.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Of the encoder; ``auto`` is settled on the worker, by its processor.

    Returns
    -------
    the frame's type
        With a float32 column for each name, null where there is no embedding.

    Raises
    ------
    PromptError
        For prompts, a method or a temperature that make no sense.
    ModelError
        For a model that does not exist, has no text tower, cannot be loaded, or gives another width than the column's.

    Notes
    -----
    A set's embedding p (or n, of the negative one) is the mean of its prompts' unit embeddings, at unit length again.
    With the image's v and the temperature s, ``softmax`` is exp(s v·p) / (exp(s v·p) + exp(s v·n)) and ``margin`` is
    v·p − v·n. Prompts are embedded once in each worker process.

    Examples
    --------
    >>> prompts = {"watermark": ["a photo with a watermark", "a stock photo with text across it"]}
    >>> df = score_prompts(df, prompts, "ViT-L-14", "openai")  # doctest: +SKIP
    """
    require_columns(df, [embedding], "score_prompts", _EMBED)
    refuse_text(df, embedding)
    checked = text.check_method(method, temperature)
    parsed = text.parse_prompts(prompts, negative)
    use = text.PromptUse(_encoder(model, pretrained, dtype, "score_prompts"), parsed, checked, temperature, embedding)
    return apply_step(df, text.prompts_partition, use, pa.schema([(p.column, pa.float32()) for p in parsed]))


def caption_stats(df: Any, caption: str = "caption", *, language: bool = False, min_confidence: float = 0.2) -> Any:
    """Add the length of captions and, if asked for, their language.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With a column of text.
    caption : str
        Its name; new columns begin with it.
    language : bool
        Whether the language is detected, by py3langid (``pip install "dask-imgcurator[text]"``).
    min_confidence : float
        Least probability of a language, 0 to 1; below it, it is undetermined.

    Returns
    -------
    the frame's type
        With ``caption_words`` (int32: runs between white space), ``caption_chars`` (int32: Unicode code points) and,
        with `language`, ``caption_language`` (code of ISO 639-1, or 639-3 where there is no other; null where it is
        undetermined) and ``caption_language_confidence`` (float32); null where there is no caption.

    Raises
    ------
    ImportError
        If languages are asked for and py3langid is not installed.
    """
    require_columns(df, [caption], "caption_stats", _READ + "caption=")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence={min_confidence}: it must be from 0 to 1")
    problem = captions.language_problem() if language else None
    if problem:
        raise ImportError(problem)
    use = captions.CaptionUse(caption, language, min_confidence)
    return apply_step(df, captions.caption_stats_partition, use, use.schema)


def score_head(
    df: Any,
    head: str | os.PathLike[str] | HeadFile,
    *,
    embedding: str = "embedding",
    column: str | None = None,
) -> Any:
    """Add the score of a head of your own: a linear layer or an MLP on embeddings.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With an embedding column of any origin.
    head : path, str, or HeadFile
        A file that `head_files.save_head` or `head_files.convert_pth` wrote, or the name of one that a package
        registered.
    embedding : str
        Column with the embeddings.
    column : str, optional
        Name of the new column; by default the one that the head names.

    Returns
    -------
    the frame's type
        With the head's column (float32), null where there is no embedding.

    Raises
    ------
    HeadError
        If there is no such head, its file is damaged or was changed since, or it does not fit the embeddings.
    """
    require_columns(df, [embedding], "score_head", _EMBED)
    refuse_text(df, embedding)
    found = own_heads.resolve_head(head)
    name = column or found.column
    if name in COLUMNS and COLUMNS[name].type != pa.float32():
        raise ValueError(f"column={name!r} is no score: choose another name, such as 'my_score'")
    use = own_heads.OwnHeadUse(found, embedding, name)
    return apply_step(df, own_heads.own_head_partition, use, pa.schema([(name, pa.float32())]))
