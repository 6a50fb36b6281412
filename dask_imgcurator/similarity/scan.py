"""One partition in, its best rows out: cosine of embeddings with queries. No Dask.

A partition's cosines are computed at once, in float32, whose rounding depends on the number of rows. So they only
select candidates: every row that may be among the k best, given a bound on the rounding. A candidate's similarity is
computed in float64 from its two vectors alone and rounded to float32: it is the same in every partition, and equal
vectors have equal similarities. Rows with equal similarity are sorted by shard, key and offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import backend_of
from ..engine.device import full_float32
from ..select.where import Where

if TYPE_CHECKING:
    import torch

#: Columns of a result, before the table's own.
OURS = ("query", "query_number", "rank", "similarity")

_BLOCK = 8192  # rows at a time: 16 MB of 512 float32


class SearchError(ValueError):
    """The search is impossible."""


@dataclass(frozen=True)
class RowScan:
    """Which rows and which column to compare, and what to return of each query's `k` best rows.

    `identity` lists the available columns of `ranks.IDENTITY`, which break ties. With `has_status`, only rows that are
    ``ok`` are compared.
    """

    column: str
    returned: tuple[str, ...]
    identity: tuple[str, ...]
    has_status: bool
    k: int
    where: Where | None = None

    @property
    def light(self) -> list[str]:
        """Columns that decide which rows are compared, and identify them."""
        names = [*self.identity, *(["status"] if self.has_status else []), *(self.where.columns if self.where else ())]
        return list(dict.fromkeys(names))

    @property
    def columns(self) -> list[str]:
        """All needed columns."""
        return list(dict.fromkeys([self.column, *self.light, *self.returned]))

    def best(self, found: Sequence[pa.Table]) -> pa.Table:
        """Merge the best rows of several partitions into the k best of each query, in order."""
        table = pa.concat_tables(found, promote_options="permissive")
        by = [("query_number", "ascending"), ("similarity", "descending"), *((n, "ascending") for n in self.identity)]
        table = table.take(pc.sort_indices(table, sort_keys=by))
        numbers = table["query_number"].to_numpy()
        return table.filter(pa.array(np.arange(len(table)) - np.searchsorted(numbers, numbers) < self.k))


# --- selection ------------------------------------------------------------------------------------


def eligible(frame: Any, scan: RowScan) -> np.ndarray:
    """Numbers of the rows that are compared: (n,) int64."""
    masks = [frame["status"] == "ok"] if scan.has_status else []
    masks += [] if scan.where is None else [scan.where.mask(frame)]
    chosen = np.ones(len(frame), bool)
    for mask in masks:
        host = backend_of(frame).to_host(mask.to_frame("chosen"), ["chosen"])["chosen"]
        chosen &= host.fill_null(False).to_numpy()
    return np.flatnonzero(chosen)


def best_rows(frame: Any, scan: RowScan, queries: np.ndarray) -> pa.Table:
    """Find the rows of a partition that are most similar to each of (m, d) queries, float64 and of unit length.

    Returns ``query_number``, ``similarity`` and all wanted columns, the best first. Rows without a nonzero vector are
    left out.
    """
    rows, matrix = eligible(frame, scan), backend_of(frame).matrix
    if 2 * len(rows) < len(frame):
        values, there = matrix(frame[scan.column].iloc[rows])
        rows = rows[there]
    else:
        # Failed rows have no vector, so usually nothing is left out and nothing is copied here.
        values, there = matrix(frame[scan.column])
        kept = np.isin(there, rows)
        values, rows = (values, there) if kept.all() else (values[np.flatnonzero(kept)], there[kept])
    check_width(values.shape[1], queries, scan.column)
    query, at = near(values, queries, scan.k)
    fetched, place = np.unique(rows[at], return_inverse=True)
    table = fetch(frame, fetched, scan.returned).take(place)
    return scan.best([with_similarity(table, query, similarity(values, at, queries[query]))])


def check_width(width: int, queries: np.ndarray, column: str) -> None:
    """Raise SearchError if queries cannot be compared with vectors of this width."""
    if width and width != queries.shape[1]:
        raise SearchError(
            f"the query's embedding has {queries.shape[1]} numbers, those of column {column!r} have {width}: "
            "embed the query with the model that made the column (model=, pretrained=)"
        )


def near(values: torch.Tensor, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of query and row that include every query's k best."""
    import torch

    if not len(values):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    asked = torch.from_numpy(queries).to(values)
    with full_float32(values.is_cuda):
        cosines = torch.cat([(x @ asked.T) / x.norm(dim=1, keepdim=True) for x in values.split(_BLOCK)])
    cosines.nan_to_num_(nan=-torch.inf, posinf=-torch.inf)
    worst = cosines.topk(min(k, len(cosines)), dim=0).values[-1]
    # A dot product of d numbers of float32 is off by at most d / 2^24 for unit vectors (Higham 2002, section 3.1), a
    # norm by half of that; two cosines are compared.
    slack = 4 * (values.shape[1] + 8) * 2.0**-24
    at, query = torch.nonzero((cosines >= worst - slack) & cosines.isfinite(), as_tuple=True)
    return query.cpu().numpy(), at.cpu().numpy()


def similarity(values: torch.Tensor, at: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Cosine of rows `at` with a query each: (n,) float32, the same in any partition."""
    import torch

    out = np.empty(len(at), np.float32)
    for start in range(0, len(at), _BLOCK):
        piece = slice(start, start + _BLOCK)
        x = values[torch.from_numpy(at[piece]).to(values.device)].cpu().numpy().astype(np.float64)
        out[piece] = (x * queries[piece]).sum(1) / np.sqrt((x * x).sum(1))
    return out


def unit(vectors: Any) -> np.ndarray:
    """Vectors in float64 at unit length; zero vectors become NaN."""
    x = np.asarray(vectors, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- rows -----------------------------------------------------------------------------------------


def fetch(frame: Any, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Copy columns of some rows into host memory; categories as their values."""
    host = backend_of(frame).to_host(frame[list(columns)].iloc[rows], list(columns))
    for i, field in enumerate(host.schema):
        if pa.types.is_dictionary(field.type):
            host = host.set_column(i, field.name, host[i].cast(field.type.value_type))
    return host


def with_similarity(table: pa.Table, query: np.ndarray, values: np.ndarray) -> pa.Table:
    """Put the result's columns before the table's own, some of which may have the same names."""
    table = table.rename_columns([f"table_{name}" if name in OURS else name for name in table.column_names])
    table = table.add_column(0, "similarity", pa.array(values))
    return table.add_column(0, "query_number", pa.array(query, pa.int32()))


def named_rows(frame: Any, scan: RowScan, names: Sequence[str]) -> list[tuple[int, str, np.ndarray | None, Any]]:
    """Find named rows in a partition: number of the name, full name, vector if any, columns."""
    backend = backend_of(frame)
    hits = find_names(backend.to_host(frame, [name for name in ("shard", "key") if name in frame.columns]), names)
    rows = np.array([row for _, row, _ in hits], np.int64)
    values, there = backend.matrix(frame[scan.column].iloc[rows])
    vectors = dict(zip(there.tolist(), values.cpu().numpy(), strict=True))
    own = fetch(frame, rows, scan.returned).to_pylist()
    return [(number, full, vectors.get(i), own[i]) for i, (number, _, full) in enumerate(hits)]


def find_names(table: pa.Table, names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Number of the name, row and ``SHARD:KEY`` of all rows that match names.

    A name is a key, or ``SHARD:KEY`` with the end of a shard's URL after a slash.
    """
    keys = table["key"].cast(pa.string())
    full = keys
    if "shard" in table.column_names:
        full = pc.binary_join_element_wise(table["shard"].cast(pa.string()), keys, ":")
    found = []
    for number, name in enumerate(names):
        whole = pc.or_kleene(pc.equal(full, name), pc.ends_with(full, f"/{name}"))
        hit = pc.or_kleene(pc.equal(keys, name), whole).fill_null(False)
        rows = np.flatnonzero(hit.to_numpy()).tolist()
        found += [(number, row, full[row].as_py() or keys[row].as_py()) for row in rows]
    return found
