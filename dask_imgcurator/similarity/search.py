"""Search a score table by text, by image or by one of its rows.

Each query is one vector; the result is the rows with the highest cosine to it. By default all rows are compared, in one
pass: each partition returns its k best rows, with all their columns, and these are merged. So memory holds a few
partitions whatever the table's length, and the answer does not depend on partitions or workers. With an index
(`build_search_index`), only the rows of some cells are compared, and only the files of the results are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..duplicates.index import Index
from ..engine.backend import backend_of, get_backend
from ..engine.cluster import backend_for
from ..engine.frames import refuse_text, require_columns
from ..engine.run import Place, current_client, place, reduce
from ..monitor import Monitor
from ..select.ranks import IDENTITY
from ..select.where import kinds_of, parse_where
from ..steps.score_table import ScoreTable, open_scores
from . import index as by_index
from .queries import Query, image_queries, table_encoder, table_provenance, text_queries, vector_queries
from .scan import OURS, RowScan, SearchError, best_rows, check_width, find_names, named_rows, unit, with_similarity


@dataclass(frozen=True)
class Asked:
    """The queries, and the rows to search."""

    texts: Sequence[str] = ()
    images: Sequence[str | os.PathLike[str]] = ()
    like: Sequence[str] = ()
    embedding: Any = None
    k: int = 20
    where: str | None = None
    column: str = "embedding"
    index: str | os.PathLike[str] | None = None
    model: str | None = None
    pretrained: str | None = None


@dataclass(frozen=True)
class _Table:
    """The searched table: a frame of any kind, with its files if it is a score table; `made` is its provenance."""

    df: Any
    scan: RowScan
    options: Mapping[str, Any]
    scores: ScoreTable | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    index: Index | None = None


def find(
    scores: Any,
    asked: Asked,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> tuple[pd.DataFrame, list[Query], Mapping[str, Any]]:
    """Search; returns the result, the queries, and the table's provenance; see `jobs.search.search`."""
    if not (asked.texts or asked.images or asked.like or asked.embedding is not None):
        raise SearchError("nothing to search for: give text=, image=, like= or embedding= (--text …)")
    if asked.k < 1:
        raise SearchError(f"k={asked.k}: it must be at least 1")
    vectors = [] if asked.embedding is None else vector_queries(asked.embedding)
    table = _opened(scores, asked, dict(storage_options or {}), backend)
    client = current_client() if client is None else client
    # Without a client, a frame is computed with its owner's settings.
    there = client is not None or table.scores
    name = backend_of(table.df).name
    with place(client, name, monitor or Monitor(), light=True) if there else contextlib.nullcontext():
        queries = [*_embedded(table, asked), *_like(table, list(map(str, asked.like))), *vectors]
        for query in queries[1:]:
            check_width(len(query.vector), queries[0].vector[None], asked.column)
        # One row more if a query finds itself.
        scan = replace(table.scan, k=asked.k + any(query.own is not None for query in queries))
        search = _scanned if table.index is None else _proposed
        found = search(table, scan, np.stack([query.vector for query in queries]))
    return _shown(_without_own(found, queries, table.scan), queries), queries, table.made


def are_paths(scores: Any) -> bool:
    """Whether a score table is given as files."""
    return all(isinstance(one, str | os.PathLike) for one in (scores if isinstance(scores, list | tuple) else [scores]))


def _opened(scores: Any, asked: Asked, options: Mapping[str, Any], backend: str | None) -> _Table:
    if not are_paths(scores):
        if asked.index is not None:
            raise SearchError("an index belongs to the files of a score table: give their folder, not a frame")
        return _Table(scores, _scan(scores, asked), options)
    table = open_scores(scores, options)
    made = table_provenance(table)
    df = table.frame(backend_for(backend, cheap=True))
    index = None if asked.index is None else by_index.open_search_index(asked.index, table.urls, asked.column, options)
    return _Table(df, _scan(df, asked), options, table, made, index)


def _scan(df: Any, asked: Asked) -> RowScan:
    require_columns(df, [asked.column], "search", "make it with embed, or name yours with column=")
    refuse_text(df, asked.column)
    kinds = kinds_of(df)
    parsed = None if asked.where is None else parse_where(asked.where, kinds)
    identity = tuple(name for name in IDENTITY if name in df.columns)
    returned = tuple(name for name in df.columns if name != asked.column and kinds[name] != "list")
    return RowScan(asked.column, returned, identity, "status" in df.columns, asked.k, parsed)


# --- queries --------------------------------------------------------------------------------------


def _embedded(table: _Table, asked: Asked) -> list[Query]:
    """Embed the queries that need a model."""
    if not (asked.texts or asked.images):
        return []
    backend, spec = backend_of(table.df), table_encoder(table.made, asked.model, asked.pretrained)
    queries = text_queries(asked.texts, spec, table.made, backend.device) if asked.texts else []
    return queries + (image_queries(asked.images, spec, table.made, backend, table.options) if asked.images else [])


def _like(table: _Table, names: list[str]) -> list[Query]:
    """Take the embeddings of named rows."""
    if not names:
        return []
    require_columns(table.df, ["key"], "like=", "it identifies rows; or give a vector, embedding=")
    if table.index is None:
        found = reduce(table.df[table.scan.columns], named_rows, lambda some: list(chain(*some)), table.scan, names)
    else:
        (part,) = table.index.parts
        hits = find_names(part.rows.select([name for name in ("shard", "key") if name in table.scan.identity]), names)
        wanted = part.rows.take([row for _, row, _ in hits])
        assert table.scores is not None
        rows = by_index.read_rows(table.index, table.scores, table.scan, wanted).to_pylist()
        vectors = [part.vectors[row] if row < len(part.vectors) else None for _, row, _ in hits]
        found = [(n, full, v, row) for (n, _, full), v, row in zip(hits, vectors, rows, strict=True)]
    queries = []
    for number, name in enumerate(names):
        own = [one for one in found if one[0] == number]
        if not own:
            raise SearchError(f"like={name!r}: no row of the table has that key (or SHARD:KEY)")
        if len(own) > 1:
            which = " or ".join(sorted(full for _, full, _, _ in own)[:2])
            raise SearchError(f"like={name!r}: {len(own)} rows have that key: say which, as {which}")
        _, full, vector, row = own[0]
        vector = unit([np.nan] if vector is None else vector)
        if not np.isfinite(vector).all():
            raise SearchError(f"like={full!r}: the row has no embedding (see its status), so nothing is like it")
        queries.append(Query("like", full, vector, row))
    return queries


# --- results --------------------------------------------------------------------------------------


def _scanned(table: _Table, scan: RowScan, queries: np.ndarray) -> pa.Table:
    """Compare all rows."""
    found: pa.Table = reduce(table.df[scan.columns], best_rows, scan.best, scan, queries)
    return found


def _proposed(table: _Table, scan: RowScan, queries: np.ndarray) -> pa.Table:
    """Compare the rows in the cells that an index searches."""
    index, allowed = table.index, None
    assert index is not None and table.scores is not None
    check_width(index.about["width"], queries, scan.column)
    if scan.where is not None:
        allowed = np.sort(reduce(table.df[scan.light], by_index.takes, np.concatenate, scan))
    found = by_index.best_of_index(index, scan, queries, allowed)
    rows = by_index.read_rows(index, table.scores, scan, found)
    return scan.best([with_similarity(rows, *(found[name].to_numpy() for name in ("query_number", "similarity")))])


def _without_own(found: pa.Table, queries: Sequence[Query], scan: RowScan) -> pa.Table:
    """Leave out the queries' own rows, and any beyond k."""
    own = [(n, *(q.own[name] for name in scan.identity)) for n, q in enumerate(queries) if q.own is not None]
    rows = zip(*(found[name].to_pylist() for name in ("query_number", *scan.identity)), strict=True)
    return scan.best([found.filter(pa.array([row not in own for row in rows], pa.bool_()))])


def _shown(found: pa.Table, queries: Sequence[Query]) -> pd.DataFrame:
    """Build the result."""
    numbers = found["query_number"].to_numpy()
    own = {
        "query": pa.array([queries[number].label for number in numbers], pa.string()),
        "query_number": found["query_number"],
        "rank": pa.array(np.arange(len(numbers)) - np.searchsorted(numbers, numbers) + 1, pa.int32()),
        "similarity": found["similarity"],
    }
    rest = found.drop_columns(["query_number", "similarity"])
    fields = [*(pa.field(name, own[name].type, nullable=False) for name in OURS), *rest.schema]
    shown = pa.Table.from_arrays([*own.values(), *rest.columns], schema=pa.schema(fields))
    frame: pd.DataFrame = get_backend("pandas").from_arrow(shown)
    return frame
