"""Search a score table by text, by image or by one of its rows.

Each query is one vector, and what is found are the rows with the highest cosine to it. By default every row is
compared, in one pass: a partition at a time gives its k best rows, with all their columns, and these are merged. So
memory holds a few partitions whatever the table's length, and the answer depends on neither partitions nor workers.
With an index (`build_search_index`) only the rows of some cells are compared, and only the files of those found read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..duplicates.index import Index
from ..engine.backend import backend_of, get_backend, resolve_name
from ..engine.frames import refuse_text, require_columns
from ..engine.run import Place, current_client, place, reduce
from ..monitor import Monitor
from ..select.ranks import IDENTITY
from ..select.where import kinds_of, parse_where
from ..steps.score_table import score_urls, scores_from_files
from . import index as by_index
from .queries import Query, image_queries, table_encoder, table_provenance, text_queries, vector_queries
from .scan import (
    OURS,
    Named,
    RowScan,
    SearchError,
    best_rows,
    check_width,
    find_names,
    keep_best,
    named_rows,
    unit,
    with_similarity,
)


@dataclass(frozen=True)
class Asked:
    """What is searched for, and in which rows."""

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
class Answer:
    """What was found for queries, and the provenance of the table; empty where nothing tells."""

    found: pd.DataFrame
    queries: list[Query]
    made: Mapping[str, Any]


@dataclass(frozen=True)
class _Table:
    """What is searched: a frame of any kind, of these files if it is a score table."""

    df: Any
    scan: RowScan
    made: Mapping[str, Any] = field(default_factory=dict)
    urls: Sequence[str] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    index: Index | None = None

    @property
    def frame(self) -> Any:
        """The columns that are needed."""
        return self.df[self.scan.columns]


def find(
    scores: Any,
    asked: Asked,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> Answer:
    """Search; see `jobs.search.search`."""
    if not (asked.texts or asked.images or asked.like or asked.embedding is not None):
        raise SearchError("there is nothing to search for: give text=, image=, like= or embedding= (--text …)")
    if asked.k < 1:
        raise SearchError(f"k={asked.k}: it must be at least 1")
    vectors = [] if asked.embedding is None else vector_queries(asked.embedding)
    with _opened(scores, asked, dict(storage_options or {}), backend, client, monitor or Monitor()) as table:
        queries = [*_embedded(table, asked), *_like(table, list(map(str, asked.like))), *vectors]
        for query in queries[1:]:
            check_width(len(query.vector), queries[0].vector[None], table.scan.column)
        found = (_scanned if table.index is None else _proposed)(table, queries)
        return Answer(_shown(_without_own(found, queries, table.scan), queries), queries, table.made)


# --- what is searched -----------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(
    scores: Any, asked: Asked, options: Mapping[str, Any], backend: str | None, client: Place, monitor: Monitor
) -> Iterator[_Table]:
    client = current_client() if client is None else client
    if not are_paths(scores):
        if asked.index is not None:
            raise SearchError("an index belongs to the files of a score table: give their folder, not a frame")
        name = backend_of(scores).name
        # Without a client, a frame is computed as its owner has set it.
        with contextlib.nullcontext() if client is None else place(client, name, monitor):
            yield _Table(scores, _scan(scores, asked), storage_options=options)
        return
    name = resolve_name(backend)
    urls = score_urls(scores, options)
    made = table_provenance(urls, options)
    df = scores_from_files(urls, options, name)
    scan = _scan(df, asked)
    index = None if asked.index is None else by_index.open_search_index(asked.index, urls, asked.column, options)
    with place(client, name, monitor, light=True):
        yield _Table(df, scan, made, urls, options, index)


def are_paths(scores: Any) -> bool:
    """Whether a score table is given by its files."""
    items = scores if isinstance(scores, list | tuple) else [scores]
    return all(isinstance(one, str | os.PathLike) for one in items)


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
    """Embed what needs a model."""
    if not (asked.texts or asked.images):
        return []
    backend = backend_of(table.df)
    spec = table_encoder(table.made, asked.model, asked.pretrained)
    queries = text_queries(asked.texts, spec, table.made, backend.device) if asked.texts else []
    if asked.images:
        queries += image_queries(asked.images, spec, table.made, backend, table.storage_options)
    return queries


def _like(table: _Table, names: list[str]) -> list[Query]:
    """Take the embeddings of rows that are named."""
    if not names:
        return []
    require_columns(table.df, ["key"], "like=", "a row is known by its key; or give its vector, embedding=")
    if table.index is None:
        found = reduce(table.frame, named_rows, _joined, table.scan, names)
    else:
        found = _named_in_index(table, table.index, names)
    queries = []
    for number, name in enumerate(names):
        hits = [one for one in found if one.number == number]
        if not hits:
            raise SearchError(f"like={name!r}: no row of the table has that key (or SHARD:KEY)")
        if len(hits) > 1:
            which = " or ".join(sorted(one.full for one in hits)[:2])
            raise SearchError(f"like={name!r}: {len(hits)} rows have that key: say which, as {which}")
        (one,) = hits
        vector = unit([np.nan] if one.vector is None else one.vector)
        if not np.isfinite(vector).all():
            raise SearchError(f"like={one.full!r}: the row has no embedding (see its status), so nothing is like it")
        queries.append(Query("like", one.full, vector, one.row))
    return queries


def _joined(lists: list[list[Named]]) -> list[Named]:
    return [one for some in lists for one in some]


def _named_in_index(table: _Table, index: Index, names: Sequence[str]) -> list[Named]:
    (part,) = index.parts
    hits = find_names(part.rows.select([n for n in ("shard", "key") if n in table.scan.identity]), names)
    at = np.array([row for _, row, _ in hits], np.int64)
    rows = by_index.read_rows(index, table.urls, table.scan, part.rows.take(at), table.storage_options).to_pylist()
    return [
        Named(number, full, part.vectors[row] if row < len(part.vectors) else None, own)
        for (number, row, full), own in zip(hits, rows, strict=True)
    ]


# --- what is found --------------------------------------------------------------------------------


def _roomy(table: _Table, queries: Sequence[Query]) -> tuple[RowScan, np.ndarray]:
    """Let there be one row more where a query finds itself first."""
    more = any(query.own is not None for query in queries)
    return replace(table.scan, k=table.scan.k + more), np.stack([query.vector for query in queries])


def _scanned(table: _Table, queries: Sequence[Query]) -> pa.Table:
    """Compare all rows."""
    scan, asked = _roomy(table, queries)
    return reduce(table.frame, best_rows, _Best(scan), scan, asked)


@dataclass(frozen=True)
class _Best:
    scan: RowScan

    def __call__(self, found: list[pa.Table]) -> pa.Table:
        return keep_best(found, self.scan)


def _proposed(table: _Table, queries: Sequence[Query]) -> pa.Table:
    """Compare the rows of the cells that an index looks into."""
    scan, asked = _roomy(table, queries)
    index = table.index
    assert index is not None
    check_width(index.about["width"], asked, scan.column)
    allowed = None
    if scan.where is not None:
        allowed = np.sort(reduce(table.df[scan.light], by_index.takes, np.concatenate, scan))
    found = by_index.best_of_index(index, scan, asked, allowed)
    rows = by_index.read_rows(index, table.urls, scan, found, table.storage_options)
    return keep_best([with_similarity(rows, found["query_number"].to_numpy(), found["similarity"].to_numpy())], scan)


def _without_own(found: pa.Table, queries: Sequence[Query], scan: RowScan) -> pa.Table:
    """Leave out the rows that the queries are, and what is more than k."""
    names = scan.identity
    own = {(n, *(query.own[name] for name in names)) for n, query in enumerate(queries) if query.own is not None}
    rows = zip(*(found[name].to_pylist() for name in ("query_number", *names)), strict=True)
    return keep_best([found.filter(pa.array([row not in own for row in rows], pa.bool_()))], scan)


def _shown(found: pa.Table, queries: Sequence[Query]) -> pd.DataFrame:
    """Make the result."""
    numbers = found["query_number"].to_numpy()
    rank = np.arange(len(numbers)) - np.searchsorted(numbers, numbers) + 1
    own = {
        "query": pa.array([queries[number].label for number in numbers], pa.string()),
        "query_number": found["query_number"],
        "rank": pa.array(rank, pa.int32()),
        "similarity": found["similarity"],
    }
    rest = found.drop_columns(["query_number", "similarity"])
    fields = [*(pa.field(name, own[name].type, nullable=False) for name in OURS), *rest.schema]
    frame: pd.DataFrame = get_backend("pandas").from_arrow(
        pa.Table.from_arrays([*(own[name] for name in OURS), *rest.columns], schema=pa.schema(fields))
    )
    return frame
