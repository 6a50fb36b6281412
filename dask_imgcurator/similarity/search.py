"""Search a score table by text, by image or by one of its rows.

Each query is one vector, and what is found are the rows with the highest cosine to it. By default every row is
compared: a partition at a time gives its k best, and these are merged, so memory holds a few partitions whatever the
table's length, and the answer depends on neither partitions nor workers. A second pass reads the other columns of these
rows. With an index (`build_search_index`) only the rows that it proposes are compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import dask
import distributed
import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, get_backend, is_dask, resolve_name
from ..jobs.plan import model_notes
from ..engine.run import Place
from ..report.search_page import Answers, write_search_page
from ..select import where as filters
from ..select.ranks import IDENTITY
from ..engine import frames as collection
from .index import SearchIndex, open_search_index
from .queries import Query, image_queries, table_encoder, table_provenance, text_queries, vector_queries
from .scan import (
    RowScan,
    SearchError,
    best_partition,
    check_width,
    eligible,
    fetch_partition,
    keep_best,
    locate_partition,
    rescore_partition,
    unit,
    vectors_partition,
)

__all__ = ["search"]

_OURS = ("query", "query_number", "rank", "similarity")


@dataclass(frozen=True)
class _Table:
    """What is searched.

    Attributes
    ----------
    df : frame
        dask, pandas or cuDF.
    scan : RowScan
        What is compared.
    made : mapping
        Provenance; empty where nothing tells.
    urls : tuple of str
        Files, one a partition; none for a frame.
    storage_options : mapping
        For the files, and those that the queries name.
    """

    df: Any
    scan: RowScan
    made: Mapping[str, Any] = field(default_factory=dict)
    urls: tuple[str, ...] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """Of the partitions."""
        return self.scan.backend


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
    **place: Any,
) -> pd.DataFrame:
    """Find the rows of a score table that are most similar to texts, images, or rows of it.

    Parameters
    ----------
    scores : str, path, sequence of them, or dask, pandas or cuDF DataFrame
        Score table, as for `read_scores`; or a frame with an embedding column.
    text : str or sequence of str
        What the images show: "a red car". The model must have a text tower, which the starter model has not.
    image : str, path, or sequence of them
        Image files or URLs; they are decoded and embedded just as the rows were.
    like : str or sequence of str
        Keys of rows to find others like; ``SHARD:KEY`` where several have the key. Needs no model.
    embedding : array_like, optional
        (d,) or (m, d): vectors of your own, say the mean of several.
    k : int
        Rows for each query.
    where : str, optional
        Only rows that this expression takes. Rows whose ``status`` is not ``ok`` are never found.
    index : str or path, optional
        Index of this table, by `build_search_index`. It is much faster for large tables, and may miss rows.
    model, pretrained : str, optional
        Model of the queries, as for `embed`. By default the one that the table's files name. A frame names none.
    column : str
        The embeddings that are compared.
    html : str or path, optional
        Page with the queries and the pictures that they found.
    source_options : mapping, optional
        For the fsspec file systems of the shards, of which that page's pictures are; by default as `storage_options`.
    **place
        See `deciding.Place`; `storage_options` also are those of images that are searched for. By default a table runs
        on the client of this session, or on threads.

    Returns
    -------
    pandas.DataFrame
        At most `k` rows for each query, the best first; one query after another, texts before images, rows and vectors.
        ``query`` (its text, path, ``SHARD:KEY``, or "embedding 1"), ``query_number`` (from 0), ``rank`` (from 1),
        ``similarity`` (float32, -1 to 1), then the table's columns but vectors. Columns of the table that have such a
        name come as ``table_NAME``.

    Raises
    ------
    SearchError
        If nothing is searched for, a row or a model is unknown, an image cannot be decoded, widths differ, or an index
        is not of this table.
    ModelError
        If the model has no text tower, cannot be loaded, or is not the table's.
    WhereError
        For a mistake in the expression.
    FileNotFoundError
        If there is no such table, image or index.

    Notes
    -----
    Similarity is the cosine, computed in float64 and rounded to float32; rows of equal similarity stand in the order of
    ``shard``, ``key`` and ``sample_offset``. Similarities of images with a text are low (0.2 to 0.35 for CLIP) and say
    something only beside each other. Several queries are answered in one pass.

    A frame is computed once for each pass: give it a score table, not a lazy `embed`.

    Examples
    --------
    >>> best = search("run/scores", text="a red car", k=5)  # doctest: +SKIP
    >>> best[["rank", "similarity", "key", "caption"]]  # doctest: +SKIP
    """
    texts, images, names = ([text] if isinstance(text, str) else list(text)), _listed(image), _listed(like)
    if not (texts or images or names or embedding is not None):
        raise SearchError("there is nothing to search for: give text=, image=, like= or embedding= (--text …)")
    if k < 1:
        raise SearchError(f"k={k}: it must be at least 1")
    vectors = [] if embedding is None else vector_queries(embedding)
    with _opened(scores, column, k, where, Place(**place)) as table:
        if index is not None and not table.urls:
            raise SearchError("an index belongs to the files of a score table: give their folder, not a frame")
        opened = None if index is None else open_search_index(index, table.urls, column, table.storage_options)
        queries = [*_embedded(table, texts, images, model, pretrained), *_like(table, list(map(str, names))), *vectors]
        best = _scanned(table, queries) if opened is None else _proposed(table, queries, opened)
        found = _fetched(table, queries, _without_own(best, queries, k))
        if html is not None:
            _write_page(html, found, queries, table, scores, source_options)
    return found


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | os.PathLike) else list(value)


# --- what is searched -----------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(scores: Any, column: str, k: int, where: str | None, place: Place) -> Iterator[_Table]:
    options = dict(place.storage_options or {})
    if not (isinstance(scores, str | os.PathLike) or _are_paths(scores)):
        with place.client.as_current() if place.client else contextlib.nullcontext():
            yield _Table(scores, _scan(scores, column, k, where), storage_options=options)
        return
    backend = resolve_name(place.backend)
    urls = collection.score_urls(scores, options)
    df = collection.scores_from_files(urls, options, backend)
    table = _Table(df, _scan(df, column, k, where), table_provenance(urls, options), tuple(urls), options)
    client = place.client or (None if place.scheduler or place.n_workers else _session())
    with (
        lend_client(client, place.scheduler, place.n_workers, backend, [], place.monitor, light=True) as lent,
        lent.as_current(),
    ):
        yield table


def _are_paths(scores: Any) -> bool:
    return isinstance(scores, list | tuple) and all(isinstance(one, str | os.PathLike) for one in scores)


def _session() -> distributed.Client | None:
    """Return the client that this session has already."""
    try:
        return distributed.default_client()
    except ValueError:
        return None


def _scan(df: Any, column: str, k: int, where: str | None) -> RowScan:
    collection.require_columns(df, [column], "search", "make it with embed, or name yours with column=")
    collection.refuse_text(df, column)
    parsed = None if where is None else filters.parse_where(where, filters.kinds_of(df))
    identity = tuple(name for name in IDENTITY if name in df.columns)
    return RowScan(backend_of(df).name, column, identity, "status" in df.columns, k, parsed)


# --- queries --------------------------------------------------------------------------------------


def _embedded(
    table: _Table, texts: list[str], images: list[Any], model: str | None, pretrained: str | None
) -> list[Query]:
    """Embed what needs a model."""
    if not (texts or images):
        return []
    spec, device = table_encoder(table.made, model, pretrained), get_backend(table.backend).device
    queries = text_queries(texts, spec, table.made, device) if texts else []
    if images:
        queries += image_queries(images, spec, table.made, table.backend, table.storage_options)
    return queries


def _like(table: _Table, names: list[str]) -> list[Query]:
    """Take the embeddings of rows that are named."""
    if not names:
        return []
    collection.require_columns(table.df, ["key"], "like=", "a row is known by its key; or give its vector, embedding=")
    columns = [name for name in ("shard", "key") if name in table.df.columns]
    parts = [
        dask.delayed(locate_partition)(part, number, names, table.backend)
        for number, part in enumerate(partitions(table.df, columns))
    ]
    found = sorted(hit for part in dask.compute(*parts) for hit in part)
    for number, name in enumerate(names):
        full = [shown for n, _, _, shown in found if n == number]
        if not full:
            raise SearchError(f"like={name!r}: no row of the table has that key (or SHARD:KEY)")
        if len(full) > 1:
            raise SearchError(f"like={name!r}: {len(full)} rows have that key: say which, as {' or '.join(full[:2])}")
    places = [(part, row) for _, part, row, _ in found]
    pieces = partitions(table.df, [table.scan.column])
    read = dask.delayed(vectors_partition)
    got = dask.compute(*[read(pieces[p], np.array([row]), table.scan.column, table.backend) for p, row in places])
    queries = []
    for (_, part, row, full), (vector,) in zip(found, got, strict=True):
        vector = unit([np.nan] if vector is None else vector)
        if not np.isfinite(vector).all():
            raise SearchError(f"like={full!r}: the row has no embedding (see its status), so nothing is like it")
        queries.append(Query("like", full, vector, (part, row)))
    return queries


# --- what is found --------------------------------------------------------------------------------


def _roomy(table: _Table, queries: Sequence[Query]) -> RowScan:
    """Let there be one row more where a query finds itself first."""
    return replace(table.scan, k=table.scan.k + any(query.own is not None for query in queries))


def _stacked(queries: Sequence[Query], column: str) -> np.ndarray:
    for query in queries[1:]:
        check_width(len(query.vector), queries[0].vector[None], column)
    return np.stack([query.vector for query in queries])


def _scanned(table: _Table, queries: Sequence[Query]) -> pd.DataFrame:
    """Compare all rows."""
    scan, asked = _roomy(table, queries), _stacked(queries, table.scan.column)
    parts = partitions(table.df, scan.columns)
    if not is_dask(table.df):
        return best_partition(parts[0], 0, scan, asked)
    shared = [dask.delayed(one, traverse=False) for one in (scan, asked)]
    best = [dask.delayed(best_partition)(part, number, *shared) for number, part in enumerate(parts)]
    found: pd.DataFrame = tree(best, _itself, partial(keep_best, scan=scan))
    return found


def _itself(found: pd.DataFrame) -> pd.DataFrame:
    return found


def _proposed(table: _Table, queries: Sequence[Query], index: SearchIndex) -> pd.DataFrame:
    """Compare the rows that an index proposes, by their own embeddings."""
    scan, asked = _roomy(table, queries), _stacked(queries, table.scan.column)
    check_width(index.about["width"], asked, scan.column)
    counts = np.array([file["rows"] for file in index.about["files"]])
    starts = np.cumsum(counts) - counts
    allowed = None
    if scan.where is not None:
        parts = partitions(table.df, scan.light or scan.columns)
        taken = dask.compute(*[dask.delayed(eligible)(part, scan) for part in parts])
        allowed = np.zeros(int(counts.sum()), bool)
        allowed[np.concatenate([start + rows for start, rows in zip(starts, taken, strict=True)])] = True
    found = [index.propose(query, scan.k, allowed) for query in asked]
    ids = np.concatenate([ids for ids, _ in found])
    pairs = pd.DataFrame({"query": np.repeat(np.arange(len(asked)), [len(ids) for ids, _ in found]), "id": ids})
    pairs["part"] = np.searchsorted(starts, ids, "right") - 1
    pairs["row"] = ids - starts[pairs["part"]]
    pairs["cosine"] = np.concatenate([cosines for _, cosines in found])
    return _rescored(table, scan, asked, pairs, index)


def _rescored(table: _Table, scan: RowScan, asked: np.ndarray, pairs: pd.DataFrame, index: SearchIndex) -> pd.DataFrame:
    """Compare pairs of query and row; what the index said of them must be true."""
    parts = partitions(table.df, [scan.column, *scan.identity])
    everything = replace(scan, k=max(1, len(pairs)))
    shared = [dask.delayed(one, traverse=False) for one in (everything, asked)]
    jobs = [
        dask.delayed(rescore_partition)(parts[part], part, *shared, *(own[n].to_numpy() for n in ("query", "row")))
        for part in sorted(set(pairs["part"].tolist()))
        for own in [pairs[pairs["part"] == part]]
    ]
    exact = dask.compute(*jobs)
    if not exact:
        return best_partition(get_backend(scan.backend).from_arrow(_no_rows(table, scan.columns)), 0, scan, asked)
    rows = keep_best(exact, everything)
    checked = rows.merge(pairs, on=["query", "part", "row"], validate="one_to_one")
    if len(checked) < len(pairs) or (checked["similarity"] - checked["cosine"]).abs().max() > index.error:
        raise SearchError(
            f"the index {index.path} tells other embeddings than the table's: build it anew (build_search_index, "
            "--build-index)"
        )
    return keep_best([rows], scan)


def _without_own(best: pd.DataFrame, queries: Sequence[Query], k: int) -> pd.DataFrame:
    """Leave out the rows that the queries are, and what is more than k."""
    places = pd.MultiIndex.from_frame(best[["query", "part", "row"]])
    own = [(number, *query.own) for number, query in enumerate(queries) if query.own is not None]
    kept = best[~places.isin(own)] if own else best
    kept = kept.groupby("query", sort=False).head(k).reset_index(drop=True)
    return kept.assign(rank=kept.groupby("query").cumcount() + 1)


# --- the rows -------------------------------------------------------------------------------------


def _no_rows(table: _Table, columns: Sequence[str]) -> pa.Table:
    from dask.dataframe.utils import make_meta

    empty = make_meta(table.df) if is_dask(table.df) else table.df.iloc[:0]
    return get_backend(table.backend).to_host(empty, list(columns))


def _rows(table: _Table, places: Sequence[tuple[int, int]]) -> pa.Table:
    """Columns, but for vectors, of the rows at places (partition and row), in their order."""
    kinds = filters.kinds_of(table.df)
    columns = [name for name in table.df.columns if name != table.scan.column and kinds[name] != "list"]
    if not places:
        return _no_rows(table, columns)
    parts = partitions(table.df, columns)
    wanted: dict[int, list[int]] = {}
    for part, row in sorted(set(places)):
        wanted.setdefault(part, []).append(row)
    fetch = dask.delayed(fetch_partition)
    read = dask.compute(*[fetch(parts[part], np.array(rows), columns, table.backend) for part, rows in wanted.items()])
    position = {place: i for i, place in enumerate(sorted(set(places)))}
    whole = pa.concat_tables(read, promote_options="permissive")
    return whole.take([position[place] for place in places])


def _fetched(table: _Table, queries: Sequence[Query], best: pd.DataFrame) -> pd.DataFrame:
    """Make the result: the rows that were found, with what is known of them."""
    rows = _rows(table, list(zip(best["part"].tolist(), best["row"].tolist(), strict=True)))
    rows = rows.rename_columns([f"table_{name}" if name in _OURS else name for name in rows.column_names])
    numbers = best["query"].to_numpy()
    own = {
        "query": pa.array([queries[number].label for number in numbers], pa.string()),
        "query_number": pa.array(numbers, pa.int32()),
        "rank": pa.array(best["rank"], pa.int32()),
        "similarity": pa.array(best["similarity"], pa.float32()),
    }
    schema = pa.schema([pa.field(name, values.type, nullable=False) for name, values in own.items()])
    for field_ in rows.schema:
        schema = schema.append(field_)
    found: pd.DataFrame = get_backend("pandas").from_arrow(
        pa.Table.from_arrays([*own.values(), *rows.columns], schema=schema)
    )
    return found


def _write_page(
    path: str | os.PathLike[str],
    found: pd.DataFrame,
    queries: Sequence[Query],
    table: _Table,
    scores: Any,
    source_options: Mapping[str, Any] | None,
) -> None:
    first = scores[0] if _are_paths(scores) else scores
    named = isinstance(first, str | os.PathLike)
    title = os.fspath(first).partition("?")[0].rstrip("/").rpartition("/")[2] if named else "a table"
    encoder = table.made.get("encoder", {})
    owners = {number: query.own for number, query in enumerate(queries) if query.own is not None}
    own = dict(zip(owners, _rows(table, list(owners.values())).to_pylist(), strict=True))
    notes = model_notes(encoder.get("model"), encoder.get("pretrained"))
    upright = bool(table.made.get("decode", {}).get("adjust_orientation"))
    write_search_page(
        path,
        Answers(found, queries, title, notes, own, upright),
        source_options=table.storage_options if source_options is None else source_options,
        storage_options=table.storage_options,
    )
