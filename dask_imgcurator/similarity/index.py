"""An index over the embeddings of a score table, for tables that are too large to be read for every search.

It is FAISS's inverted file: vectors in k-means cells, as float16, of which a search looks into the nearest few cells.
It only proposes rows. They are compared with the query again, by their embeddings in the table, so similarities and
order are exact. What an index can do is miss rows, and how many it misses is measured when it is built.

An index is a folder: ``vectors.faiss`` and ``index.json``, which is written last. Its ids are numbers of rows, counted
through the table's files in their order. Names, versions and lengths of the files are kept with it, and a table that is
not the same any more is refused.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..duplicates.cells import BRUTE_FORCE_ROWS
from ..steps import read as collection, score_table as score
from ..storage import files
from ..storage.urls import fingerprint
from .queries import table_provenance
from .scan import RowScan, SearchError, best_partition, compared, keep_best

__all__ = ["SearchIndex", "build_search_index", "open_search_index"]

_FORMAT = 1
_PER_CELL = 40  # vectors that k-means sees for each cell; FAISS warns below 39
_FILES = 64  # of which these are taken, at most
_QUERIES, _K, _RECALL = 64, 20, 0.98  # recall is measured with so many rows as queries, and brought to this


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")  # which has no types
    except ImportError as err:
        raise ModuleNotFoundError(
            f'an index for searches needs FAISS ({err}): pip install "dask-imgcurator[search]"'
        ) from err


class SearchIndex:
    """An index, opened.

    Attributes
    ----------
    path : str
        The folder.
    about : dict
        What ``index.json`` says: ``column``, ``width``, ``rows``, ``cells``, ``nprobe`` (cells that a search looks
        into), ``recall`` (of the 20 most similar rows to rows of the table), ``encoder`` and ``files``.
    """

    def __init__(self, path: str, about: dict[str, Any], vectors: Any) -> None:
        self.path, self.about, self._vectors = path, about, vectors
        #: By how much a cosine from here can differ from the exact one: float16 has 11 bits, a float32 product of d
        #: numbers is off by some d / 2^24.
        self.error = 2.0**-11 + (about["width"] + 64) * 2.0**-22

    def propose(
        self, query: np.ndarray, k: int, allowed: np.ndarray | None = None, nprobe: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Propose rows for one query: of the cells it looks into, all that may be among the k best.

        Parameters
        ----------
        query : numpy.ndarray
            (d,) of unit length.
        k : int
            Rows that are wanted.
        allowed : numpy.ndarray, optional
            (rows of the table,) bool: only these. More cells are looked into then, as many as leave as much to find.
        nprobe : int, optional
            Cells; by default as many as the index was measured with.

        Returns
        -------
        ids, cosines : numpy.ndarray
            Numbers of rows, int64, and their cosines within `error`, the highest first; fewer than k only if there are
            no more rows.
        """
        faiss, cells = _faiss(), self.about["cells"]
        nprobe, there, selector = nprobe or self.about["nprobe"], self.about["rows"], None
        if allowed is not None:
            share = max(int(allowed.sum()), 1) / len(allowed)
            there, nprobe = int(allowed.sum()), min(cells, round(nprobe / share) + 1)
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        wanted = k + 16
        while True:
            setting = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
            cosines, ids = self._vectors.search(query[None].astype(np.float32), wanted, params=setting)
            found = int((ids[0] >= 0).sum())
            ids, cosines = ids[0, :found], cosines[0, :found]
            if found < min(k, there) and nprobe < cells:
                nprobe = cells
                continue
            least = cosines[k - 1] - 2 * self.error if found >= k else -np.inf
            if found == wanted and found < there and cosines[-1] >= least:
                wanted *= 2
                continue
            return ids[cosines >= least], cosines[cosines >= least]


# --- opening --------------------------------------------------------------------------------------


def _versions(urls: Sequence[str], options: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(url.rpartition("/")[2], fingerprint(url, options)) for url in urls]


def open_search_index(
    folder: str | os.PathLike[str],
    urls: Sequence[str],
    column: str = "embedding",
    storage_options: Mapping[str, Any] | None = None,
) -> SearchIndex:
    """Open an index of `build_search_index` for the table that it was built of; its vectors stay on the disk.

    Parameters
    ----------
    folder : str or path
        The index.
    urls : sequence of str
        Files of the table, in order.
    column : str
        Its embeddings.
    storage_options : mapping, optional
        For the fsspec file system of the table.

    Raises
    ------
    FileNotFoundError
        If there is no index.
    SearchError
        If it was built of another table or column, or the table was changed since.
    """
    path = files.local_path(os.fspath(folder))
    text = files.read_text(str(path / "index.json"))
    if text is None:
        raise FileNotFoundError(f"no index for searches at {path}: make one with build_search_index (--build-index)")
    about = json.loads(text)
    anew = f"the index {path} cannot be used: %s. Build it anew (build_search_index, --build-index)"
    if about.get("format") != _FORMAT or "nprobe" not in about:
        raise SearchError(anew % f"its format is {about.get('format')}, or it is no index for searches")
    if about["column"] != column:
        raise SearchError(anew % f"it was built of column {about['column']!r}, not of {column!r}")
    kept = [(one["name"], one["version"]) for one in about["files"]]
    now = _versions(urls, storage_options or {})
    if len(kept) != len(now):
        raise SearchError(anew % f"it was built of {len(kept)} files, the table has {len(now)}")
    changed = next((url for url, a, b in zip(urls, kept, now, strict=True) if a != b), None)
    if changed is not None:
        raise SearchError(anew % f"{changed} was written or changed after it was built")
    faiss = _faiss()
    return SearchIndex(str(path), about, faiss.read_index(str(path / "vectors.faiss"), faiss.IO_FLAG_MMAP))


# --- building -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Files whose vectors are numbered through."""

    urls: Sequence[str]
    counts: np.ndarray
    scan: RowScan
    options: Mapping[str, Any]

    @property
    def starts(self) -> np.ndarray:
        """Number of each file's first row."""
        return np.cumsum(self.counts) - self.counts

    def frame(self, number: int) -> Any:
        """Read the columns that are needed of a file."""
        spec = score.ScoreFiles("pandas", tuple(self.scan.columns), self.options)
        return score.read_score_file(self.urls[number], spec)

    def vectors(self, frame: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a file's vectors and, float32 and of unit length, the vectors themselves."""
        values, rows = compared(frame, self.scan)
        with np.errstate(invalid="ignore", divide="ignore"):
            x = values.numpy() / np.linalg.norm(values.numpy(), axis=1, keepdims=True)
        good = np.isfinite(x).all(1)
        return self.starts[number] + rows[good], np.ascontiguousarray(x[good])


def build_search_index(
    scores: collection.URLPath,
    folder: str | os.PathLike[str],
    *,
    column: str = "embedding",
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> SearchIndex:
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
    SearchIndex
        The index; ``about["recall"]`` says how many of the 20 rows most similar to a row of the table it finds.

    Raises
    ------
    FileExistsError
        If there is an index and `overwrite` is False.
    SearchError
        If the table has no vectors, vectors of several lengths, or vectors of several models.
    ModuleNotFoundError
        If FAISS is not installed.

    Notes
    -----
    It takes 2 bytes a number in memory while it is built, and on the disk: 1 GB for a million rows of 512. The files
    are read one after another, twice at most. Rows that are not ``ok`` are left out. There is one cell for up to 20,000
    rows, 2 √n from there on; a search looks into as many of them as it takes to find 98 % of the 20 rows that are most
    similar to 64 rows of the table. Texts lie farther from images than images do, so of a text's rows more are missed.
    """
    faiss, path = _faiss(), files.local_path(os.fspath(folder))
    if (path / "index.json").exists() and not overwrite:
        raise FileExistsError(f"{path} holds an index already: choose another folder, or overwrite it")
    options = dict(storage_options or {})
    urls = collection.score_urls(scores, options)
    made = table_provenance(urls, options)
    before = _versions(urls, options)
    table = _open(urls, column, options)
    sample, vectors = _sample(table)
    width = vectors.shape[1]
    cells = min(_cells(int(table.counts.sum())), max(1, len(vectors) // _PER_CELL))
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.spherical = True  # as FAISS's own factory does for inner products
    index.train(vectors)
    chosen = np.linspace(0, len(sample) - 1, min(_QUERIES, len(sample))).astype(np.int64)
    queries = sample[chosen], vectors[chosen].astype(np.float64)
    del vectors
    exact = _fill(index, table, queries)
    about = {
        "format": _FORMAT,
        "column": column,
        "width": width,
        "rows": index.ntotal,
        "cells": cells,
        "nprobe": 1,
        "encoder": made.get("encoder", {}),
        "files": [
            {"name": name, "version": version, "rows": int(rows)}
            for (name, version), rows in zip(before, table.counts, strict=True)
        ],
    }
    opened = SearchIndex(str(path), about, index)
    about["nprobe"], about["recall"] = _settle(opened, queries, exact)
    _save(opened, path)
    return opened


def _open(urls: Sequence[str], column: str, options: Mapping[str, Any]) -> _Table:
    names = score.file_schema(urls[0], options).names
    if column not in names:
        raise SearchError(f"{urls[0]} has no column {column!r} of embeddings (there are: {', '.join(names)})")
    counts = []
    for url in urls:
        with files.opened(url, options) as file:
            counts.append(pq.read_metadata(file).num_rows)
    return _Table(urls, np.array(counts), RowScan("pandas", column, (), "status" in names, _K + 1), options)


def _cells(rows: int) -> int:
    return 1 if rows <= BRUTE_FORCE_ROWS else round(2 * rows**0.5)


def _sample(table: _Table) -> tuple[np.ndarray, np.ndarray]:
    """Take vectors for k-means at random, from up to `_FILES` files: their ids, and they themselves."""
    rng = np.random.default_rng(0)
    wanted = min(int(table.counts.sum()), max(_PER_CELL * _cells(int(table.counts.sum())), _PER_CELL * _QUERIES))
    ids: list[np.ndarray] = []
    taken: list[np.ndarray] = []
    left = rng.permutation(len(table.urls)).tolist()
    each = -(-wanted // min(len(left), _FILES))
    while left and sum(len(some) for some in ids) < wanted:
        number = left.pop()
        found, vectors = table.vectors(table.frame(number), number)
        if not len(found):
            continue
        _check(vectors, (taken or [vectors])[0].shape[1], table, number)
        some = rng.permutation(len(found))[:each]
        ids.append(found[some])
        taken.append(vectors[some])
    if not ids:
        raise SearchError(f"no row of the table has a vector in column {table.scan.column!r}: there is nothing to find")
    return np.concatenate(ids), np.concatenate(taken)


def _check(vectors: np.ndarray, width: int, table: _Table, number: int) -> None:
    if vectors.shape[1] != width:
        raise SearchError(
            f"{table.urls[number]} holds vectors of {vectors.shape[1]} numbers in column {table.scan.column!r}, other "
            f"files of {width}: index what one model has embedded"
        )


def _fill(index: Any, table: _Table, queries: tuple[np.ndarray, np.ndarray]) -> list[set[int]]:
    """Add all vectors; returns for each query the ids that are most similar to it, itself left out."""
    own, asked = queries
    best = []
    for number in range(len(table.urls)):
        frame = table.frame(number)
        if len(frame) != table.counts[number]:
            raise SearchError(f"{table.urls[number]} changed while it was read: build the index again")
        ids, vectors = table.vectors(frame, number)
        if not len(ids):
            continue
        _check(vectors, index.d, table, number)
        index.add_with_ids(vectors, ids)
        best.append(best_partition(frame, number, table.scan, asked))
    found = keep_best(best, table.scan)
    ids = table.starts[found["part"]] + found["row"].to_numpy()
    queried = found["query"].to_numpy()
    return [set([int(i) for i in ids[queried == q] if i != own[q]][:_K]) for q in range(len(own))]


def _settle(index: SearchIndex, queries: tuple[np.ndarray, np.ndarray], exact: Sequence[set[int]]) -> tuple[int, float]:
    """Find how many cells it takes, and what recall they give."""
    nprobe = 1
    while True:
        found = 0
        for query, wanted in zip(queries[1], exact, strict=True):
            found += len(wanted & set(index.propose(query, _K + 1, nprobe=nprobe)[0].tolist()))
        recall = found / max(1, sum(map(len, exact)))
        if recall >= _RECALL or nprobe == index.about["cells"]:
            return nprobe, recall
        nprobe = min(2 * nprobe, index.about["cells"])


def _save(index: SearchIndex, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    files.remove(str(path / "index.json"))
    temporary = files.temporary_name(str(path / "vectors.faiss"))
    try:
        _faiss().write_index(index._vectors, temporary)
        Path(temporary).replace(path / "vectors.faiss")
    finally:
        files.remove(temporary)
    with files.write_whole(str(path / "index.json")) as file:
        file.write(json.dumps(index.about, indent=1).encode())
