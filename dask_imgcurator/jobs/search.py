"""Search a score table, and show the results as a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..engine.run import Place
from ..monitor import Monitor
from ..report.search_page import Answers, write_search_page
from ..runs.plan import model_notes
from ..similarity.search import Asked, are_paths, find


def search(
    scores: Any,
    *,
    text: str | Sequence[str] = (),
    image: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    like: str | Sequence[str] = (),
    embedding: Any = None,
    k: int = 20,
    where: str | None = None,
    index: str | os.PathLike[str] | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    column: str = "embedding",
    html: str | os.PathLike[str] | None = None,
    source_options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> pd.DataFrame:
    """Find the rows of a score table that are most similar to texts, images, or rows of it.

    Parameters
    ----------
    scores : str, path, sequence of them, or dask, pandas or cuDF DataFrame
        Score table, as for `read_scores`; or a frame with an embedding column.
    text : str or sequence of str
        What the images show: "a red car". Needs a model with a text tower, which the starter lacks.
    image : str, path, or sequence of them
        Image files or URLs, decoded and embedded exactly like the rows.
    like : str or sequence of str
        Keys of rows to find similar ones to; ``SHARD:KEY`` if several rows have the key. Needs no model.
    embedding : array_like, optional
        (d,) or (m, d): your own vectors, such as the mean of several.
    k : int
        Number of rows per query.
    where : str, optional
        Only rows that match this expression. Rows whose ``status`` is not ``ok`` are never found.
    index : str or path, optional
        Index of this table, made by `build_search_index`. It is much faster for large tables, but may miss rows.
    model, pretrained : str, optional
        Model of the queries, as for `embed`. By default the one recorded in the table's files; frames record none.
    column : str
        The embeddings to compare.
    html : str or path, optional
        Page to write, with the queries and the pictures found.
    source_options : mapping, optional
        For the fsspec file systems of the shards, for that page's pictures; by default as `storage_options`.
    storage_options : mapping, optional
        For the fsspec file systems of the table and of query images.
    backend : {"auto", "cudf", "pandas"}, optional
        For reading a table.
    client : distributed.Client, str or int, optional
        Where to compute: a client, a scheduler's address, or a number of new worker processes. By default the session's
        client, or threads of this process.
    monitor : Monitor, optional
        Receives progress and notes.

    Returns
    -------
    pandas.DataFrame
        At most `k` rows per query, the best first, query by query: texts, then images, rows and vectors. ``query`` (its
        text, path, ``SHARD:KEY``, or "embedding 1"), ``query_number`` (from 0), ``rank`` (from 1), ``similarity``
        (float32, -1 to 1), then the table's columns except vectors. Columns of the table with these names become
        ``table_NAME``.

    Raises
    ------
    SearchError
        If there is no query, a row or model is unknown, an image cannot be decoded, widths differ, or the index belongs
        to another table.
    ModelError
        If the model has no text tower, cannot be loaded, or differs from the table's.
    WhereError
        If the expression has a mistake.
    FileNotFoundError
        If a table, image or index does not exist.

    Notes
    -----
    Similarity is the cosine, computed in float64 and rounded to float32; rows with equal similarity are sorted by
    ``shard``, ``key`` and ``sample_offset``. Similarities of images with a text are low (0.2 to 0.35 for CLIP) and only
    meaningful relative to each other. All queries take one pass; rows named by `like` are looked up in another.

    Examples
    --------
    >>> best = search("run/scores", text="a red car", k=5)  # doctest: +SKIP
    >>> best[["rank", "similarity", "key", "caption"]]  # doctest: +SKIP
    """
    asked = Asked(
        texts=_listed(text),
        images=_listed(image),
        like=_listed(like),
        embedding=embedding,
        k=k,
        where=where,
        column=column,
        index=index,
        model=model,
        pretrained=pretrained,
    )
    found, queries, made = find(scores, asked, storage_options, backend, client, monitor)
    if html is not None:
        encoder = made.get("encoder", {})
        answers = Answers(
            found,
            queries,
            _title(scores),
            model_notes(encoder.get("model"), encoder.get("pretrained")),
            {number: query.own for number, query in enumerate(queries) if query.own is not None},
            upright=bool(made.get("decode", {}).get("adjust_orientation")),
        )
        write_search_page(html, answers, storage_options if source_options is None else source_options, storage_options)
    return found


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | os.PathLike) else list(value)


def _title(scores: Any) -> str:
    if not are_paths(scores):
        return "a table"
    first = os.fspath(scores[0] if isinstance(scores, list | tuple) else scores)
    return first.partition("?")[0].rstrip("/").rpartition("/")[2]
