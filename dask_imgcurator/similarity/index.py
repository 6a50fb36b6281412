"""Search with an index: only the cells nearest to a query are searched, and only the rows found are read.

An index (`duplicates.index`) holds the table's vectors unchanged, so similarities and order are exact; it can only miss
rows, and recall is measured when it is built. It records the name and version of each file of the table, and refuses
files that have changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import numpy as np
import pyarrow as pa

from ..duplicates.cells import train
from ..duplicates.index import Index, cell_order, open_index, write_part
from ..duplicates.rows import DedupError, Source, gather, is_in, row_ids
from ..engine.backend import get_backend
from ..steps.read import URLPath
from ..steps.score_table import ScoreFiles, ScoreTable, open_scores
from ..storage import files
from ..storage.urls import fingerprint
from .queries import table_provenance
from .scan import RowScan, SearchError, eligible, fetch, near, similarity


def _versions(urls: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": url.rpartition("/")[2], "version": fingerprint(url, options)} for url in urls]


def open_search_index(
    folder: str | os.PathLike[str], urls: Sequence[str], column: str, storage_options: Mapping[str, Any]
) -> Index:
    """Open the index of a table, which must have been built from the same files in the same order."""
    name = os.fspath(folder)
    try:
        index = open_index(name)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"no search index at {name}: make one with build_search_index (--build-index)") from err
    except DedupError as err:
        raise SearchError(f"{err} (build_search_index, --build-index)") from err
    built, now = index.about.get("files", []), _versions(urls, storage_options)
    changed = [url for url, was, is_ in zip(urls, built, now, strict=False) if was != is_]
    if not built or len(index.parts) > 1:
        problem = "it was built from rows for dedup, not from the files of a table"
    elif index.about["column"] != column:
        problem = f"it was built from column {index.about['column']!r}, not from {column!r}"
    elif len(built) != len(now):
        problem = f"it was built from {len(built)} files, the table has {len(now)}"
    elif changed:
        problem = f"{changed[0]} was written or changed after it was built"
    else:
        return index
    raise SearchError(f"the index {name} cannot be used: {problem}. Rebuild it (build_search_index, --build-index)")


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
        Folder of the index, on this machine.
    column : str
        The embeddings.
    overwrite : bool
        Whether an existing index is replaced.
    storage_options : mapping, optional
        For the fsspec file system of the table.

    Returns
    -------
    Index
        The index; ``about["recall"]`` is the share it finds of the 20 rows most similar to a row of the table. It also
        works for `dedup` with ``against=``.

    Raises
    ------
    FileExistsError
        If the index exists and `overwrite` is False.
    SearchError
        If the table has no vectors, vectors of several lengths or models, or indistinguishable rows.
    ModuleNotFoundError
        If k-means is needed, for more than 20,000 rows, and FAISS is not installed.

    Notes ----- The index takes as much disk space as the embeddings, 2 GB for a million rows of 512, and as much again
    in Dask's ``temporary-directory`` while it is built. The files are read once. Rows that are not ``ok`` are left out.
    It has one cell for up to 20,000 rows, then 2 √n; a search covers as many of them as needed to find 98 % of the 20
    rows most similar to 64 rows of the table. Texts are farther from images than images are from each other, so text
    queries miss more rows.
    """
    path, options = str(files.local_path(os.fspath(folder))), dict(storage_options or {})
    there = files.join(path, "index.json")
    if files.exists(there) and not overwrite:
        raise FileExistsError(f"{path} already holds an index: choose another folder, or overwrite it")
    table = open_scores(scores, options)
    urls, names = table.urls, table.schema.names
    made, before = table_provenance(table), _versions(urls, options)
    if column not in names:
        raise SearchError(f"{urls[0]} has no column {column!r} of embeddings (available: {', '.join(names)})")
    columns = {name: name for name in ("sha256", "phash") if name in names} | {"embedding": column}
    try:
        rows = gather([Source(table.frame("pandas"), columns)])
    except DedupError as err:
        raise SearchError(f"{err} (index embeddings of one model)") from err
    if not rows.width:
        raise SearchError(f"no row of the table has a vector in column {column!r}: there is nothing to find")
    about = {"dtype": "float32", "seed": 0, "columns": list(columns), "provenance": made.get("encoder", {})}
    files.remove(there)
    backend = get_backend("pandas")
    centroids = train(rows, rows.with_vector, backend, None, 0)
    return write_part(rows, path, {**about, "column": column, "files": before}, centroids, backend, {})


def takes(frame: Any, scan: RowScan) -> np.ndarray:
    """Ids of a partition's rows that a search may find."""
    return row_ids(fetch(frame, eligible(frame, scan), scan.identity))


def best_of_index(index: Index, scan: RowScan, queries: np.ndarray, allowed: np.ndarray | None) -> pa.Table:
    """Find for each query the best rows of the searched cells, and some more.

    Returns ``query_number``, ``similarity``, ``id`` and ``file``. If only rows with sorted `allowed` ids count, more
    cells are searched, to cover as many such rows.
    """
    import torch

    (part,) = index.parts
    n, ids = len(part.vectors), part.rows["id"].to_numpy()
    mask = np.ones(n, bool) if allowed is None else is_in(ids[:n], allowed)
    counts = np.diff(np.r_[0, np.cumsum(mask)][part.starts])
    total = int(counts.sum())
    probed = round(index.about["nprobe"] * n / max(total, 1)) + (allowed is not None)
    found = []
    for number, query in enumerate(queries):
        order = cell_order(index.centroids, query)
        enough = int(np.searchsorted(np.cumsum(counts[order]), min(scan.k, total))) + 1
        cells = np.sort(order[: max(probed, enough)])
        rows = np.concatenate([np.arange(*part.starts[cell : cell + 2]) for cell in cells])
        rows = rows[mask[rows]]
        values = torch.from_numpy(part.vectors[rows].astype(np.float32))
        _, at = near(values, query[None], scan.k)
        exact = similarity(values, at, np.broadcast_to(query, (len(at), len(query))))
        some = {"query_number": np.full(len(at), number), "similarity": exact, "id": ids[rows[at]]}
        found.append(pa.table(some | {"file": part.rows["file"].take(rows[at])}))
    return pa.concat_tables(found)


def read_rows(index: Index, scored: ScoreTable, scan: RowScan, wanted: pa.Table) -> pa.Table:
    """Read the table's rows with the wanted ids, in that order, from their files."""
    ids = wanted["id"].to_numpy()
    names = dict.fromkeys([*scan.identity, *scan.returned])
    schema = pa.schema([scored.schema.field(name) for name in names])
    spec = ScoreFiles("pandas", schema, scored.storage_options)
    # If nothing is wanted, the first file provides the columns.
    numbers = np.unique(wanted["file"].to_numpy()).tolist() or [0]
    read = dask.compute(
        *[dask.delayed(_read_file)(scored.urls[number], spec, scan, np.sort(ids)) for number in numbers]
    )
    table = pa.concat_tables([rows for rows, _ in read], promote_options="permissive")
    there = np.concatenate([own for _, own in read])
    order = np.argsort(there)
    if not is_in(ids, there[order]).all():
        raise SearchError(
            f"the index {index.path} lists rows that the table lacks: rebuild it (build_search_index, --build-index)"
        )
    return table.take(order[np.searchsorted(there[order], ids)])


def _read_file(url: str, spec: ScoreFiles, scan: RowScan, ids: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    frame = spec([url])
    found = row_ids(fetch(frame, np.arange(len(frame)), scan.identity))
    rows = np.flatnonzero(is_in(found, ids))
    return fetch(frame, rows, scan.returned), found[rows]
