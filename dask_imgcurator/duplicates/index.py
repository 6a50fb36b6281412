"""An index: the rows of a set, saved by cell, for ``dedup(against=...)`` and for `search`.

A folder: ``index.json``, written last; ``centroids.npy``, (k, d) float32; and for each addition of rows
``part-*.rows.arrow`` (`rows.SCHEMA`), ``part-*.vectors.npy`` and ``part-*.starts.npy``. Rows are sorted by cell and id:
cell c has rows starts[c] to starts[c + 1] - 1, and the vectors with the same numbers; rows without a vector come last.
The files are memory-mapped, so only the needed parts are read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import Backend, backend_of
from ..engine.pandas import from_arrow
from ..select.ranks import IDENTITY
from ..storage import files
from .cells import assign, blocks, most_similar, train
from .rows import SCHEMA, DedupError, Rows, Source, gather

FORMAT = 2

_BLOCK = 65_536

#: To decide how many cells to search: query rows, and how many rows most similar to each count.
_ASKED, _K, _RECALL = 64, 20, 0.98


@dataclass(frozen=True)
class Part:
    """Rows from one addition, memory-mapped."""

    rows: pa.Table
    vectors: np.ndarray
    starts: np.ndarray

    @property
    def cells(self) -> np.ndarray:
        """Home cell of each row with a vector."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), np.diff(self.starts))


class Index:
    """A saved index, opened.

    Attributes
    ----------
    path : str
        The folder.
    about : dict
        The content of ``index.json``: ``width``, ``rows``, ``vectors``, ``dtype``, ``cells``, ``seed``, ``columns``,
        ``provenance``; ``nprobe`` (cells per search), ``recall`` (of the 20 rows most similar to a row); from
        `build_search_index`, also ``column`` and ``files``.
    centroids : numpy.ndarray
        (k, d) float32.
    """

    def __init__(self, path: str, about: dict[str, Any], centroids: np.ndarray, parts: Sequence[Part]) -> None:
        self.path = path
        self.about = about
        self.centroids = centroids
        self.parts = parts

    def frame(self) -> pd.DataFrame:
        """``shard``, ``key`` and ``sample_offset`` of its rows."""
        return from_arrow(pa.concat_tables([part.rows.select(list(IDENTITY)) for part in self.parts]))

    def check(self, width: int, provenance: Mapping[str, Any] | None) -> None:
        """Raise DedupError if vectors of this width or origin cannot be compared with the index's."""
        if width and self.about["width"] and width != self.about["width"]:
            raise DedupError(
                f"the index {self.path} holds embeddings of {self.about['width']} numbers, the rows have {width}: "
                "embed them with the same model, or rebuild the index"
            )
        known = self.about["provenance"]
        for name, ours in (provenance or {}).items():
            if known.get(name, ours) != ours:
                raise DedupError(
                    f"the index {self.path} was built with {name} {known[name]!r}, the rows were made with {ours!r}"
                )


# --- opening --------------------------------------------------------------------------------------


def open_index(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Index:
    """Open an index made by `build_index` or `build_search_index`; a remote one is copied to this machine first."""
    folder, options = os.fspath(path), dict(storage_options or {})
    text = files.read_text(files.join(folder, "index.json"), options)
    if text is None:
        raise FileNotFoundError(f"no index at {folder}: it has no index.json. Make one with build_index")
    about = json.loads(text)
    if about.get("format") != FORMAT:
        raise DedupError(
            f"the index {folder} has format {about.get('format')}; this version reads {FORMAT}: rebuild it"
        )
    local = files.local_path(folder)
    if not files.is_local(folder):
        local = Path(tempfile.mkdtemp(prefix="imgcurator-", dir=dask.config.get("temporary-directory", None)))
        for url in files.list_files(folder, "", options):
            with files.opened(url, options) as source, (local / url.rpartition("/")[2]).open("wb") as file:
                shutil.copyfileobj(source, file, 16 << 20)
    parts = []
    for name in (str(local / f"part-{number:05d}") for number in range(about["parts"])):
        rows = pa.ipc.open_file(pa.memory_map(f"{name}.rows.arrow")).read_all()
        parts.append(Part(rows, np.load(f"{name}.vectors.npy", "r"), np.load(f"{name}.starts.npy")))
    index = Index(folder, about, np.load(local / "centroids.npy"), parts)
    if not files.is_local(folder):
        weakref.finalize(index, shutil.rmtree, local, ignore_errors=True)
    return index


# --- building -------------------------------------------------------------------------------------


def build_index(
    df: Any,
    path: str | os.PathLike[str],
    *,
    append: bool = False,
    dtype: str = "float32",
    n_cells: int | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    embedding: str = "embedding",
    sha256: str = "sha256",
    phash: str = "phash",
    storage_options: Mapping[str, Any] | None = None,
) -> Index:
    """Save the hashes and embeddings of a set's images, to compare later images with.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With ``key`` and, if available, ``shard``, ``sample_offset``, ``status`` and the three columns named below. Rows
        whose status is not ``ok`` are left out.
    path : str or path
        Folder.
    append : bool
        Add to an existing index, keeping its cells. Rows already in it are not detected: append the rows left by
        `dedup` with ``against=path``.
    dtype : {"float32", "float16"}
        Type of the saved embeddings. float16 halves the index and changes a cosine by less than 0.001.
    n_cells, seed
        k-means, see `find_duplicates`.
    provenance : mapping, optional
        How the embeddings were made (``{"model": ..., "pretrained": ...}``); `dedup` compares it with its own.
    embedding, sha256, phash : str
        Names of the columns. Those that the frame lacks stay empty, and their tiers are unavailable later.
    storage_options : mapping, optional
        For the fsspec file system.

    Returns
    -------
    Index
        The index.

    Raises
    ------
    FileExistsError
        If the index exists and `append` is False.
    DedupError
        If the width or provenance differs from that of the existing index, widths differ between rows, or two rows are
        indistinguishable.
    ValueError
        If there is no column to index, or the dtype is unknown.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r}: use float32 or float16")
    folder, options = os.fspath(path), dict(storage_options or {})
    before = open_index(folder, options) if append else None
    if before is None and files.exists(files.join(folder, "index.json"), options):
        raise FileExistsError(f"{folder} already holds an index: choose another folder, or pass append=True")
    columns = {"sha256": sha256, "phash": phash, "embedding": embedding}
    columns = {name: column for name, column in columns.items() if column in df.columns}
    rows, backend = gather([Source(df, columns)]), backend_of(df)
    if before is not None:
        before.check(rows.width, provenance)
        return write_part(rows, folder, before.about, before.centroids, backend, options)
    made = json.loads(json.dumps(dict(provenance or {})))
    about = {"dtype": dtype, "seed": seed, "columns": list(columns), "provenance": made}
    centroids = train(rows, rows.with_vector, backend, n_cells, seed)
    return write_part(rows, folder, about, centroids, backend, options)


def write_part(
    rows: Rows,
    folder: str,
    about: Mapping[str, Any],
    centroids: np.ndarray,
    backend: Backend,
    options: Mapping[str, Any],
) -> Index:
    """Add rows to an index, sorted by cell and id; `about` is the content of ``index.json`` so far."""
    there, half = rows.with_vector, about["dtype"] == "float16"
    cells = assign(rows, there, centroids, backend.device, 1)[0][:, 0]
    order = there[np.argsort(cells, kind="stable")]
    table = rows.table.take(np.r_[order, np.flatnonzero(rows.slots < 0)])
    about = {
        "format": FORMAT,
        "width": rows.width,
        **(_searched(rows, cells, centroids, backend.device) if "nprobe" not in about else {}),
        **about,
        "rows": about.get("rows", 0) + len(table),
        "vectors": about.get("vectors", 0) + len(order),
        "cells": len(centroids),
        "parts": about.get("parts", 0) + 1,
    }
    name = files.join(folder, f"part-{about['parts'] - 1:05d}")
    files.make_folder(folder)
    with files.write_whole(f"{name}.rows.arrow", options) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=_BLOCK)
    with files.write_whole(f"{name}.vectors.npy", options) as file:
        shape = {"descr": "<f2" if half else "<f4", "fortran_order": False, "shape": (len(order), rows.width)}
        np.lib.format.write_array_header_1_0(file, shape)
        for some in blocks(0, len(order), _BLOCK):
            # float16 vectors have unit length because of their range; others are unchanged, for exact searches.
            values = rows.unit(order[some]).astype(np.float16) if half else rows.raw(order[some])
            file.write(values.data)
    starts = np.r_[0, np.cumsum(np.bincount(cells, minlength=len(centroids)))]
    for target, array in ((f"{name}.starts.npy", starts), (files.join(folder, "centroids.npy"), centroids)):
        with files.write_whole(target, options) as file:
            np.save(file, array)
    with files.write_whole(files.join(folder, "index.json"), options) as file:
        file.write(json.dumps(about, indent=1).encode())
    return open_index(folder, options)


def cell_order(centroids: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cells, those nearest to a unit vector first."""
    return np.argsort((centroids**2).sum(1) - centroids @ (2 * query.astype(np.float32)), kind="stable")


def _searched(rows: Rows, cells: np.ndarray, centroids: np.ndarray, device: str) -> dict[str, Any]:
    """Decide how many cells to search, and measure the resulting recall."""
    there, asked = rows.with_vector, rows.with_vector[-_ASKED:]
    if len(there) < 2:
        return {"nprobe": 1, "recall": 1.0}
    b = most_similar(asked, there, partial(rows.tensor, device), device, _K)[1]
    # Rank of each row's cell in the order in which a query searches cells.
    place = np.stack([np.argsort(cell_order(centroids, query)) for query in rows.unit(asked)])
    home = np.zeros(len(rows), np.int64)
    home[there] = cells
    found = place[np.repeat(np.arange(len(asked)), len(b) // len(asked)), home[b]]
    nprobe = int(np.quantile(found, _RECALL, method="inverted_cdf")) + 1
    return {"nprobe": nprobe, "recall": float((found < nprobe).mean())}
