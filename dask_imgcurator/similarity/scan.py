"""One partition in, its best rows out: cosine of embeddings with queries. No Dask.

A partition's cosines are computed at once, in float32, whose rounding depends on how many rows there are. So they only
choose candidates: every row that may be among the k best, given a bound of that rounding. A candidate's own similarity
is computed in float64 from its two vectors alone and rounded to float32: it is the same in every partition, and equal
vectors have equal similarities. Rows of one similarity stand in the order of their shard, key and offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import get_backend
from ..engine.device import full_float32
from ..select.where import Where

if TYPE_CHECKING:
    import torch

__all__ = [
    "RowScan",
    "SearchError",
    "best_partition",
    "check_width",
    "compared",
    "eligible",
    "fetch_partition",
    "keep_best",
    "locate_partition",
    "rescore_partition",
    "unit",
    "vectors_partition",
]

_BLOCK = 8192  # rows at a time: 16 MB of 512 float32


class SearchError(ValueError):
    """A search that cannot be made."""


@dataclass(frozen=True)
class RowScan:
    """Which rows are compared, and what is returned of them.

    Attributes
    ----------
    backend : str
        Of the partitions.
    column : str
        Of the embeddings.
    identity : tuple of str
        Which of `ranks.IDENTITY` there are; ties are settled by them.
    has_status : bool
        Whether rows have a ``status``; only those that are ``ok`` are compared.
    k : int
        Rows for each query.
    where : Where, optional
        Only rows that it takes.
    """

    backend: str
    column: str
    identity: tuple[str, ...]
    has_status: bool
    k: int
    where: Where | None = None

    @property
    def light(self) -> list[str]:
        """Columns that tell whether a row is compared."""
        names = [*(["status"] if self.has_status else []), *(self.where.columns if self.where else ())]
        return list(dict.fromkeys(names))

    @property
    def columns(self) -> list[str]:
        """Columns that `best_partition` needs."""
        return list(dict.fromkeys([self.column, *self.identity, *self.light]))


# --- choosing -------------------------------------------------------------------------------------


def eligible(frame: Any, scan: RowScan) -> np.ndarray:
    """Row numbers of the rows that are compared: (n,) int64."""
    mask = None
    if scan.has_status:
        mask = frame["status"] == "ok"
    if scan.where is not None:
        taken = scan.where.mask(frame)
        mask = taken if mask is None else mask & taken
    if mask is None:
        return np.arange(len(frame))
    host = get_backend(scan.backend).to_host(mask.to_frame("chosen"), ["chosen"])["chosen"]
    return np.flatnonzero(host.fill_null(False).to_numpy())


def compared(frame: Any, scan: RowScan) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors of the rows that are compared, (n, d) float32 on the backend's device; and their row numbers."""
    matrix, rows = get_backend(scan.backend).matrix, eligible(frame, scan)
    if 2 * len(rows) < len(frame):
        values, there = matrix(frame[scan.column].iloc[rows])
        return values, rows[there]
    # Rows that failed have no vector: as a rule nothing is left out here, and nothing need be copied.
    values, there = matrix(frame[scan.column])
    kept = np.isin(there, rows)
    return (values, there) if kept.all() else (values[np.flatnonzero(kept)], there[kept])


def best_partition(frame: Any, part: int, scan: RowScan, queries: np.ndarray) -> pd.DataFrame:
    """Find the rows of a partition that are most similar to each query.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With the columns of `scan`.
    part : int
        Number of the partition.
    scan : RowScan
        What to do.
    queries : numpy.ndarray
        (m, d) float64, of unit length.

    Returns
    -------
    pandas.DataFrame
        At most k rows a query, the best first: ``query`` (from 0), ``similarity`` (float32), the identity, ``part`` and
        ``row``, the place in the partition. Rows without a vector, or with one of no direction, are not in it.
    """
    values, rows = compared(frame, scan)
    if not len(values):
        none = np.empty(0, np.int64)
        return _ranked(frame, part, scan, none, none, np.empty(0, np.float32))
    check_width(values.shape[1], queries, scan.column)
    query, at = _near(values, queries, scan.k)
    return _ranked(frame, part, scan, query, rows[at], _similarity(values, at, queries[query]))


def check_width(width: int, queries: np.ndarray, column: str) -> None:
    """Raise SearchError where queries cannot be compared with vectors of that width."""
    if width != queries.shape[1]:
        raise SearchError(
            f"the query's embedding has {queries.shape[1]} numbers, those of column {column!r} have {width}: "
            "embed the query with the model that made the column (model=, pretrained=)"
        )


def _near(values: torch.Tensor, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of query and row of which every query's k best are some."""
    import torch

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


def _similarity(values: torch.Tensor, at: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Cosine of rows `at` with a query each: (n,) float32, the same wherever the rows lie."""
    import torch

    out = np.empty(len(at), np.float32)
    for start in range(0, len(at), _BLOCK):
        piece = slice(start, start + _BLOCK)
        x = values[torch.from_numpy(at[piece]).to(values.device)].cpu().numpy().astype(np.float64)
        out[piece] = (x * queries[piece]).sum(1) / np.sqrt((x * x).sum(1))
    return out


def unit(vectors: Any) -> np.ndarray:
    """Vectors in float64 and of unit length; those without direction become NaN."""
    x = np.asarray(vectors, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- order ----------------------------------------------------------------------------------------


def _ranked(
    frame: Any, part: int, scan: RowScan, query: np.ndarray, rows: np.ndarray, similarity: np.ndarray
) -> pd.DataFrame:
    columns: dict[str, Any] = {"query": query, "similarity": similarity}
    if scan.identity:
        wanted, place = np.unique(rows, return_inverse=True)
        host = get_backend(scan.backend).to_host(frame[list(scan.identity)].iloc[wanted], list(scan.identity))
        columns |= {name: _sortable(host[name])[place] for name in scan.identity}
    columns |= {"part": np.full(len(rows), part), "row": rows}
    return keep_best([pd.DataFrame(columns)], scan)


def _sortable(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_integer(column.type):
        return np.asarray(column.fill_null(-1).to_numpy())
    return np.array([value or "" for value in column.cast(pa.string()).to_pylist()], object)


def keep_best(found: Sequence[pd.DataFrame], scan: RowScan) -> pd.DataFrame:
    """Merge the best rows of several partitions into the k best of each query, in order."""
    rows = pd.concat([f for f in found if len(f)] or found[:1], ignore_index=True)
    by = ["query", "similarity", *scan.identity, "part", "row"]
    rows = rows.sort_values(by, ascending=[name != "similarity" for name in by], kind="stable")
    return rows.groupby("query", sort=False).head(scan.k).reset_index(drop=True)


# --- rows that are known --------------------------------------------------------------------------


def rescore_partition(
    frame: Any, part: int, scan: RowScan, queries: np.ndarray, query: np.ndarray, rows: np.ndarray
) -> pd.DataFrame:
    """Return what `best_partition` says of given pairs of query and row; rows without a vector are left out."""
    wanted, place = np.unique(rows, return_inverse=True)
    values, there = get_backend(scan.backend).matrix(frame[scan.column].iloc[wanted])
    where = np.full(len(wanted), -1)
    where[there] = np.arange(len(there))
    at = where[place]
    query, rows, at = query[at >= 0], rows[at >= 0], at[at >= 0]
    if len(at):
        check_width(values.shape[1], queries, scan.column)
    return _ranked(frame, part, scan, query, rows, _similarity(values, at, queries[query]))


def fetch_partition(frame: Any, rows: np.ndarray, columns: Sequence[str], backend: str) -> pa.Table:
    """Copy columns of some rows into host memory; categories as what they stand for."""
    host = get_backend(backend).to_host(frame[list(columns)].iloc[rows], list(columns))
    for i, field in enumerate(host.schema):
        if pa.types.is_dictionary(field.type):
            host = host.set_column(i, field.name, host[i].cast(field.type.value_type))
    return host


def locate_partition(frame: Any, part: int, names: Sequence[str], backend: str) -> list[tuple[int, int, int, str]]:
    """Find the rows that names of images stand for.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With ``key`` and, if there is one, ``shard``.
    part : int
        Number of the partition.
    names : sequence of str
        Keys, or ``SHARD:KEY`` with the end of a shard's URL, from a slash on.
    backend : str
        Of the frame.

    Returns
    -------
    list of (int, int, int, str)
        Number of the name, `part`, row, and ``SHARD:KEY`` in full.
    """
    columns = [name for name in ("shard", "key") if name in frame.columns]
    host = get_backend(backend).to_host(frame, columns)
    keys, *shards = (host[name].cast(pa.string()).combine_chunks() for name in reversed(columns))
    full = pc.binary_join_element_wise(*shards, keys, ":")
    found = []
    for number, name in enumerate(names):
        whole = pc.or_kleene(pc.equal(full, name), pc.ends_with(full, f"/{name}"))
        hit = pc.or_kleene(pc.equal(keys, name), whole).fill_null(False)
        rows = np.flatnonzero(hit.to_numpy(False)).tolist()
        found += [(number, part, row, full[row].as_py() or keys[row].as_py()) for row in rows]
    return found


def vectors_partition(frame: Any, rows: np.ndarray, column: str, backend: str) -> list[np.ndarray | None]:
    """Vectors of some rows, float32; None for a row without one."""
    values, there = get_backend(backend).matrix(frame[column].iloc[rows])
    out: list[np.ndarray | None] = [None] * len(rows)
    for row, vector in zip(there, values.cpu().numpy(), strict=True):
        out[row] = vector
    return out
