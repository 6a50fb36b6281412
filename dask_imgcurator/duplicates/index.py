"""An index: the rows of a set, saved by cell, for ``dedup(against=...)`` and for `search`.

A folder: ``index.json``, written last; ``centroids.npy``, (k, d) float32; and for each time that rows were added
``part-*.rows.arrow`` (`rows.SCHEMA`), ``part-*.vectors.npy`` and ``part-*.starts.npy``. Rows are sorted by cell and id:
those of cell c are rows starts[c] to starts[c + 1] - 1, and have the vectors of these numbers; rows without a vector
stand behind all others. The files are mapped into memory, so only what is needed of them is read.
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import Backend, backend_of, local_backend
from ..engine.pandas import from_arrow
from ..select.ranks import IDENTITY
from ..storage import files
from .cells import assign, default_cells, train
from .rows import SCHEMA, DedupError, Rows, RowSpec, Source, gather, scratch

FORMAT = 2

_BLOCK = 65_536


@dataclass(frozen=True)
class Part:
    """Rows that were added at one time, mapped into memory."""

    rows: pa.Table
    vectors: np.ndarray
    starts: np.ndarray


class Index:
    """A saved index, opened.

    Attributes
    ----------
    path : str
        The folder.
    about : dict
        What ``index.json`` says: ``width``, ``rows``, ``vectors``, ``dtype``, ``cells``, ``seed``, ``columns``, ``provenance``; of
        one for searches also ``column``, ``files``, ``nprobe`` (cells that a search looks into) and ``recall`` (of the
        20 rows most similar to a row of the table).
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

    def check_width(self, width: int) -> None:
        """Raise DedupError where vectors of that width cannot be compared with the index's."""
        if width and self.about["width"] and width != self.about["width"]:
            raise DedupError(
                f"the index {self.path} holds embeddings of {self.about['width']} numbers, the rows have {width}: "
                "embed them with the same model, or build the index anew"
            )

    def check_origin(self, provenance: Mapping[str, Any] | None) -> None:
        """Raise DedupError where vectors of that origin cannot be compared with the index's."""
        known = self.about["provenance"]
        wrong = {n: (known[n], v) for n, v in (provenance or {}).items() if n in known and known[n] != v}
        if wrong:
            name, (saved, ours) = next(iter(wrong.items()))
            raise DedupError(f"the index {self.path} was built with {name} {saved!r}, the rows were made with {ours!r}")


# --- opening --------------------------------------------------------------------------------------


def open_index(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Index:
    """Open an index that `build_index` or `build_search_index` left; a remote one is copied to this machine first.

    Raises
    ------
    FileNotFoundError
        If there is none.
    DedupError
        If it was written by another version of this library.
    """
    folder, options = os.fspath(path), dict(storage_options or {})
    text = files.read_text(files.join(folder, "index.json"), options)
    if text is None:
        raise FileNotFoundError(f"no index at {folder}: it has no index.json. Make one with build_index")
    about = json.loads(text)
    if about.get("format") != FORMAT:
        raise DedupError(
            f"the index {folder} has format {about.get('format')}; this version reads {FORMAT}: build it anew"
        )
    local = files.local_path(folder) if files.is_local(folder) else _copy(folder, options)
    load = partial(np.load, mmap_mode="r")
    parts = [
        Part(
            pa.ipc.open_file(pa.memory_map(str(local / f"{name}.rows.arrow"))).read_all(),
            load(local / f"{name}.vectors.npy"),
            load(local / f"{name}.starts.npy"),
        )
        for name in map(_part_name, range(about["parts"]))
    ]
    index = Index(folder, about, np.load(local / "centroids.npy"), parts)
    if not files.is_local(folder):
        weakref.finalize(index, shutil.rmtree, local, ignore_errors=True)
    return index


def _copy(folder: str, options: Mapping[str, Any]) -> Path:
    target = scratch()
    for url in files.list_files(folder, "", options):
        with files.opened(url, options) as source, (target / url.rpartition("/")[2]).open("wb") as file:
            shutil.copyfileobj(source, file, 16 << 20)
    return target


def _part_name(number: int) -> str:
    return f"part-{number:05d}"


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
        With ``key``, and what there is of ``shard``, ``sample_offset``, ``status`` and the three columns named below.
        Rows whose status is not ``ok`` are left out.
    path : str or path
        Folder.
    append : bool
        Add to the index that is there, keeping its cells. Rows that it has already are not looked for: append what
        `dedup` with ``against=path`` left.
    dtype : {"float32", "float16"}
        Of the saved embeddings. float16 halves the index and changes a cosine by less than 0.001.
    n_cells, seed
        k-means, see `find_duplicates`.
    provenance : mapping, optional
        How the embeddings were made (``{"model": ..., "pretrained": ...}``); `dedup` compares it with its own.
    embedding, sha256, phash : str
        Names of the columns. Those that the frame lacks stay empty, and their tiers cannot be asked for later.
    storage_options : mapping, optional
        For the fsspec file system.

    Returns
    -------
    Index
        The index.

    Raises
    ------
    FileExistsError
        If there is an index and `append` is False.
    DedupError
        If the width or the provenance differs from that of the index appended to, widths differ between rows, or two
        rows cannot be told apart.
    ValueError
        If there is no column to index by, or no such dtype.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r}: use float32 or float16")
    folder, options = os.fspath(path), dict(storage_options or {})
    before = open_index(folder, options) if append else None
    if before is None and files.exists(files.join(folder, "index.json"), options):
        raise FileExistsError(f"{folder} holds an index already: choose another folder, or pass append=True")
    names = {"sha256": sha256, "phash": phash, "embedding": embedding}
    source = source_of(df, {tier: name for tier, name in names.items() if name in df.columns})
    rows, backend = gather([source]), local_backend(backend_of(df))
    if before is not None:
        before.check_width(rows.vectors.width)
        before.check_origin(provenance)
        return write_part(rows, folder, before.about, before.centroids, backend.device, options)
    about = {
        "format": FORMAT,
        "width": rows.vectors.width,
        "dtype": dtype,
        "seed": seed,
        "columns": [name for name in names if getattr(source.spec, name) is not None],
        "provenance": json.loads(json.dumps(dict(provenance or {}))),
    }
    return write_part(rows, folder, about, centroids_of(rows, n_cells, seed, backend), backend.device, options)


def source_of(
    df: Any, columns: Mapping[str, str], keep: str | None = None, lowest: bool = False, by_file: bool = False
) -> Source:
    """Settle how rows are taken from a frame; `columns` names those of the tiers."""
    backend_of(df)  # raises for what is no frame
    there = ", ".join(map(str, df.columns))
    if "key" not in df.columns:
        raise ValueError(f"dedup needs the column key (there are: {there})")
    if not columns:
        raise ValueError(
            f"there is no column to find duplicates by: embed adds sha256 and embedding (there are: {there})"
        )
    identity = tuple(name for name in IDENTITY if name in df.columns)
    spec = RowSpec(identity, "status" in df.columns, **columns, keep=keep, lowest=lowest)
    return Source(df, spec, range(df.npartitions) if by_file else None)


def by_id(rows: Rows) -> np.ndarray:
    """Numbers of the rows that have a vector, sorted by id."""
    there = np.flatnonzero(rows.vectors.slots >= 0)
    return there[np.argsort(rows.ids[there], kind="stable")]


def centroids_of(rows: Rows, n_cells: int | None, seed: int, backend: Backend) -> np.ndarray:
    """Centroids of the cells of an index."""
    there = by_id(rows)
    if not len(there):
        return np.zeros((1, rows.vectors.width), np.float32)
    k = min(n_cells or default_cells(len(there)), len(there))
    return train(there, rows.vectors, backend, k, seed)


def write_part(
    rows: Rows,
    folder: str,
    about: Mapping[str, Any],
    centroids: np.ndarray,
    device: str,
    options: Mapping[str, Any],
) -> Index:
    """Add rows to an index, sorted by cell and id; `about` is what ``index.json`` says so far."""
    there = by_id(rows)
    cells = assign(there, rows.vectors, centroids, device, 1)[0][:, 0]
    order = there[np.argsort(cells, kind="stable")]
    starts = np.r_[0, np.cumsum(np.bincount(cells, minlength=len(centroids)))]
    without = np.flatnonzero(rows.vectors.slots < 0)
    table = rows.table.take(np.r_[order, without])
    number = about.get("parts", 0)
    name = files.join(folder, _part_name(number))
    files.make_folder(folder)
    with files.write_whole(f"{name}.rows.arrow", options) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=_BLOCK)
    half = about["dtype"] == "float16"
    with files.write_whole(f"{name}.vectors.npy", options) as file:
        shape = {"descr": "<f2" if half else "<f4", "fortran_order": False, "shape": (len(order), rows.vectors.width)}
        np.lib.format.write_array_header_1_0(file, shape)
        for start in range(0, len(order), _BLOCK):
            some = order[start : start + _BLOCK]
            # Halves are of unit length, for the sake of their range; others as they are, for the last bit of a search.
            file.write(rows.vectors.take(some).astype(np.float16) if half else rows.vectors.raw(some))
    for target, array in ((f"{name}.starts.npy", starts), (files.join(folder, "centroids.npy"), centroids)):
        with files.write_whole(target, options) as file:
            np.save(file, array)
    about = {
        **about,
        "rows": about.get("rows", 0) + len(table),
        "vectors": about.get("vectors", 0) + len(order),
        "cells": len(centroids),
        "parts": number + 1,
    }
    save_about(folder, about, options)
    return open_index(folder, options)


def save_about(folder: str, about: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Write ``index.json``."""
    with files.write_whole(files.join(folder, "index.json"), options) as file:
        file.write(json.dumps(about, indent=1).encode())
