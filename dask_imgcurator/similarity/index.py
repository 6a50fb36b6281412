"""Search by an index: only the cells nearest to a query are looked into, and only the rows that are found are read.

An index (`duplicates.index`) holds the vectors as the table has them, so similarities and order are exact; it can only
miss rows, and how many it misses is measured when it is built. The table's files are known by name and version: one
that is not the same any more is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa

from ..duplicates.index import FORMAT, Index, centroids_of, open_index, save_about, source_of, write_part
from ..duplicates.rows import DedupError, gather, is_in, row_ids
from ..engine.backend import get_backend
from ..select.ranks import IDENTITY
from ..steps.read import URLPath
from ..steps.score_table import ScoreFiles, file_schema, read_score_files, score_urls, scores_from_files
from ..storage import files
from ..storage.urls import fingerprint
from .queries import table_provenance
from .scan import RowScan, SearchError, eligible, fetch, near, similarity

#: Recall is measured with so many rows as queries, of so many rows most similar to each, and brought to this.
_QUERIES, _K, _RECALL = 64, 20, 0.98


# --- opening --------------------------------------------------------------------------------------


def _versions(urls: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": url.rpartition("/")[2], "version": fingerprint(url, options)} for url in urls]


def open_search_index(
    folder: str | os.PathLike[str], urls: Sequence[str], column: str, storage_options: Mapping[str, Any]
) -> Index:
    """Open an index for the table, of these files in order, that it was built of."""
    anew = f"the index {os.fspath(folder)} cannot be used: %s. Build it anew (build_search_index, --build-index)"
    try:
        index = open_index(folder)
    except FileNotFoundError as err:
        raise FileNotFoundError(
            f"no index for searches at {os.fspath(folder)}: make one with build_search_index (--build-index)"
        ) from err
    except DedupError as err:
        raise SearchError(anew % err) from err
    about = index.about
    if "nprobe" not in about or about["parts"] != 1:
        raise SearchError(anew % "it is one of rows for dedup, and no index for searches in a score table")
    if about["column"] != column:
        raise SearchError(anew % f"it was built of column {about['column']!r}, not of {column!r}")
    now = _versions(urls, storage_options)
    if len(about["files"]) != len(now):
        raise SearchError(anew % f"it was built of {len(about['files'])} files, the table has {len(now)}")
    changed = next((url for url, a, b in zip(urls, about["files"], now, strict=True) if a != b), None)
    if changed is not None:
        raise SearchError(anew % f"{changed} was written or changed after it was built")
    return index


# --- building -------------------------------------------------------------------------------------


def build_search_index(
    scores: URLPath,
    folder: str | os.PathLike[str],
    *,
    column: str = "embedding",
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Index:
    """Build an index over a score table's embeddings, for `search` with ``index=``.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    folder : str or path
        Where the index goes, on this machine.
    column : str
        The embeddings.
    overwrite : bool
        Whether an index that is there is replaced.
    storage_options : mapping, optional
        For the fsspec file system of the table.

    Returns
    -------
    Index
        The index; ``about["recall"]`` says how many of the 20 rows most similar to a row of the table it finds. It also
        serves `dedup` with ``against=``.

    Raises
    ------
    FileExistsError
        If there is an index and `overwrite` is False.
    SearchError
        If the table has no vectors, vectors of several lengths or of several models, or rows that cannot be told apart.
    ModuleNotFoundError
        If k-means is needed, for more than 20,000 rows, and FAISS is not installed.

    Notes
    -----
    It takes as much of the disk as the embeddings do, 2 GB for a million rows of 512, and while it is built as much
    again in Dask's ``temporary-directory``. The files are read once. Rows that are not ``ok`` are left out. There is
    one cell for up to 20,000 rows, 2 √n from there on; a search looks into as many of them as it takes to find 98 % of
    the 20 rows that are most similar to 64 rows of the table. Texts lie farther from images than images do, so of a
    text's rows more are missed.
    """
    path, options = str(files.local_path(os.fspath(folder))), dict(storage_options or {})
    there = files.join(path, "index.json")
    if files.exists(there) and not overwrite:
        raise FileExistsError(f"{path} holds an index already: choose another folder, or overwrite it")
    urls = score_urls(scores, options)
    made, before = table_provenance(urls, options), _versions(urls, options)
    names = file_schema(urls[0], options).names
    if column not in names:
        raise SearchError(f"{urls[0]} has no column {column!r} of embeddings (there are: {', '.join(names)})")
    columns = {"embedding": column, **{name: name for name in ("sha256", "phash") if name in names}}
    try:
        rows = gather([source_of(scores_from_files(urls, options, "pandas"), columns, by_file=True)])
    except DedupError as err:
        raise SearchError(f"{err} (index what one model has embedded)") from err
    if not rows.vectors.width:
        raise SearchError(f"no row of the table has a vector in column {column!r}: there is nothing to find")
    about = {
        "format": FORMAT,
        "width": rows.vectors.width,
        "dtype": "float32",
        "seed": 0,
        "columns": sorted(columns),
        "provenance": made.get("encoder", {}),
        "column": column,
        "files": before,
    }
    files.remove(there)
    backend = get_backend("pandas")
    index = write_part(rows, path, about, centroids_of(rows, None, 0, backend), backend.device, {})
    index.about["nprobe"], index.about["recall"] = _measure(index)
    save_about(path, index.about, {})
    return index


def _measure(index: Index) -> tuple[int, float]:
    """Find how many cells a search must look into, and what recall that gives."""
    (part,) = index.parts
    n = len(part.vectors)
    asked = np.argsort(part.rows["id"].to_numpy()[:n])[:_QUERIES]  # ids are random
    queries = _unit(part.vectors[asked])
    best, at = np.full((len(asked), 1), -np.inf, np.float32), np.zeros((len(asked), 1), np.int64)
    for start in range(0, n, 65_536):
        cosine = queries @ _unit(part.vectors[start : start + 65_536]).T
        own = asked - start
        inside = np.flatnonzero((own >= 0) & (own < cosine.shape[1]))
        cosine[inside, own[inside]] = -np.inf
        best = np.concatenate([best, cosine], axis=1)
        at = np.concatenate([at, np.broadcast_to(np.arange(start, start + cosine.shape[1]), cosine.shape)], axis=1)
        first = np.argpartition(-best, min(_K, best.shape[1] - 1), axis=1)[:, :_K]
        best, at = np.take_along_axis(best, first, 1), np.take_along_axis(at, first, 1)
    # Where a query finds the cell of each of these rows, in the order in which it looks into cells.
    query, found = np.nonzero(np.isfinite(best))
    cells = np.searchsorted(part.starts, at[query, found], "right") - 1
    place = np.argsort(np.stack([cell_order(index, q) for q in queries]), axis=1)[query, cells]
    if not len(place):
        return 1, 1.0
    nprobe = int(np.quantile(place, _RECALL, method="inverted_cdf")) + 1
    return nprobe, float((place < nprobe).mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- searching ------------------------------------------------------------------------------------


def cell_order(index: Index, query: np.ndarray) -> np.ndarray:
    """Cells, the nearest to a query first."""
    return np.argsort((index.centroids**2).sum(1) - index.centroids @ (2 * query.astype(np.float32)), kind="stable")


def takes(frame: Any, scan: RowScan) -> np.ndarray:
    """Ids of the rows of a partition that may be found."""
    rows = eligible(frame, scan)
    return row_ids(fetch(frame, rows, scan.identity))


def best_of_index(index: Index, scan: RowScan, queries: np.ndarray, allowed: np.ndarray | None) -> pa.Table:
    """Find for each query the best rows of the cells that are looked into, and some more.

    Returns ``query_number``, ``similarity``, ``id`` and ``file``. Of rows with sorted `allowed` ids alone, more cells
    are looked into: as many as leave as much to find.
    """
    (part,) = index.parts
    n, ids = len(part.vectors), part.rows["id"].to_numpy()
    mask = np.ones(n, bool) if allowed is None else is_in(ids[:n], allowed)
    counts = np.diff(np.r_[0, np.cumsum(mask)][part.starts])
    total = int(counts.sum())
    probed = min(len(counts), round(index.about["nprobe"] * n / total) + (allowed is not None)) if total else 0
    found = []
    for number, query in enumerate(queries):
        order = cell_order(index, query)
        enough = int(np.searchsorted(np.cumsum(counts[order]), min(scan.k, total))) + 1
        cells = np.sort(order[: max(probed, enough) if total else 0])
        rows = np.concatenate([np.empty(0, np.int64), *(np.arange(*part.starts[c : c + 2]) for c in cells)])
        rows = rows[mask[rows]]
        if len(rows):
            found.append(_candidates(part.vectors, rows, query, number, scan.k))
    numbers, rows, values = (np.concatenate(side) for side in zip(_NONE, *found, strict=True))
    columns = {"query_number": pa.array(numbers, pa.int32()), "similarity": values, "id": ids[rows]}
    return pa.table({**columns, "file": part.rows["file"].take(rows)})


_NONE = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


def _candidates(
    vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, number: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import torch

    values = torch.from_numpy(vectors[rows].astype(np.float32, copy=False))
    _, at = near(values, query[None], k)
    exact = similarity(values, at, np.broadcast_to(query, (len(at), len(query))))
    return np.full(len(at), number), rows[at], exact


class _WithIds:
    """Takes the rows that have one of sorted ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self.columns = ids, list(IDENTITY)

    def mask(self, frame: pd.DataFrame) -> pd.Series:
        there = [name for name in IDENTITY if name in frame.columns]
        return pd.Series(is_in(row_ids(get_backend("pandas").to_host(frame, there)), self._ids), frame.index)


def read_rows(
    index: Index, urls: Sequence[str], scan: RowScan, wanted: pa.Table, storage_options: Mapping[str, Any]
) -> pa.Table:
    """Read the rows of the table that have the wanted ids, in their order, from the files that hold them."""
    ids, numbers = wanted["id"].to_numpy(), wanted["file"].to_numpy()
    parts = [
        dask.delayed(_read_file)(urls[number], np.unique(ids[numbers == number]), scan, dict(storage_options))
        for number in np.unique(numbers).tolist()
    ]
    # With no file at all, the first one's columns.
    read = list(dask.compute(*parts)) or [_read_file(urls[0], ids, scan, dict(storage_options))]
    table = pa.concat_tables([rows for rows, _ in read], promote_options="permissive")
    there = np.concatenate([own for _, own in read])
    order = np.argsort(there)
    if not is_in(ids, there[order]).all():
        raise SearchError(
            f"the index {index.path} tells of other rows than the table's: build it anew (build_search_index, "
            "--build-index)"
        )
    return table.take(order[np.searchsorted(there[order], ids)] if len(ids) else order[:0])


def _read_file(url: str, ids: np.ndarray, scan: RowScan, options: Mapping[str, Any]) -> tuple[pa.Table, np.ndarray]:
    spec = ScoreFiles("pandas", tuple(dict.fromkeys([*scan.identity, *scan.returned])), options, _WithIds(ids))
    frame = read_score_files([url], spec)
    rows = np.arange(len(frame))
    return fetch(frame, rows, scan.returned), row_ids(fetch(frame, rows, scan.identity))
