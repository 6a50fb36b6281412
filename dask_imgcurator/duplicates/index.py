"""What is in a set already, saved: the hashes and vectors of its images, for `dedup(against=...)`.

An index is a folder: ``index.json``, ``centroids.npy`` (k, d) float32, and ``part-*.parquet`` with ``key``, ``shard``,
``sample_offset``, ``sha256``, ``phash`` (16 hexadecimal digits), ``embedding`` (unit length) and ``cell``, its k-means
cell. Its name is written last: a folder without ``index.json`` is no index.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.backend import backend_of
from ..steps.score_table import ScoreFiles
from ..storage import files
from . import neighbours
from .graphs import Source, cells_of
from .rows import DedupError, RowSpec, signatures, unpack, vectors_of

__all__ = ["Index", "build_index", "open_index"]

_FORMAT = 1
_NO_IDS = np.empty(0, np.uint64)


class Index:
    """A saved index, opened.

    Attributes
    ----------
    path : str
        The folder.
    about : dict
        What ``index.json`` says: ``width``, ``rows``, ``dtype``, ``n_cells``, ``seed``, ``columns``, ``provenance``.
    centroids : numpy.ndarray
        (k, d) float32.
    """

    def __init__(self, path: str, about: dict[str, Any], centroids: np.ndarray, storage_options: Mapping[str, Any]):
        self.path = path
        self.about = about
        self.centroids = centroids
        self._options = dict(storage_options)

    def frame(self) -> Any:
        """Its rows, as a Dask DataFrame (of pandas): one partition a file."""
        import dask.dataframe as dd

        from ..engine.pandas import from_arrow

        schema = _schema(self.about["dtype"])
        urls = files.list_files(self.path, ".parquet", self._options)
        read = ScoreFiles("pandas", tuple(schema.names), self._options)
        meta = from_arrow(schema.empty_table())
        return dd.from_map(read_score_file, urls, spec=read, meta=meta, enforce_metadata=False)

    def check(self, width: int, provenance: Mapping[str, Any] | None) -> None:
        """Raise DedupError where vectors of that width, or of that origin, cannot be compared with the index's."""
        if width and self.about["width"] and width != self.about["width"]:
            raise DedupError(
                f"the index {self.path} holds embeddings of {self.about['width']} numbers, the rows have {width}: "
                "embed them with the same model, or build the index anew"
            )
        known = self.about["provenance"]
        wrong = {n: (known[n], v) for n, v in (provenance or {}).items() if n in known and known[n] != v}
        if wrong:
            name, (there, here) = next(iter(wrong.items()))
            raise DedupError(f"the index {self.path} was built with {name} {there!r}, the rows were made with {here!r}")


def _schema(dtype: str) -> pa.Schema:
    number = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("shard", pa.string(), nullable=False),
            pa.field("sample_offset", pa.int64(), nullable=False),
            pa.field("sha256", pa.string()),
            pa.field("phash", pa.string()),
            pa.field("embedding", pa.list_(number)),
            pa.field("cell", pa.int64(), nullable=False),
        ]
    )


def open_index(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Index:
    """Open an index that `build_index` left.

    Raises
    ------
    FileNotFoundError
        If there is none.
    DedupError
        If it was written by a later version of this library.
    """
    folder, options = os.fspath(path), dict(storage_options or {})
    text = files.read_text(files.join(folder, "index.json"), options)
    if text is None:
        raise FileNotFoundError(f"no index at {folder}: it has no index.json. Make one with build_index")
    about = json.loads(text)
    if about["format"] != _FORMAT:
        raise DedupError(f"the index {folder} has format {about['format']}; this version reads {_FORMAT}")
    import fsspec

    with fsspec.open(files.join(folder, "centroids.npy"), "rb", **options) as file:
        return Index(folder, about, np.load(io.BytesIO(file.read())), options)


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
        If the width or the provenance differs from that of the index appended to, or widths differ between rows.
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
    n, width = _count(source)
    if before is not None:
        before.check(width, provenance)
    about = before.about if before else _about(source, n_cells, seed, dtype, width, provenance)
    if before is None:
        cells = cells_of(
            [source], n, width, n_cells=n_cells, probe=1, radius=0.0, seed=seed, without=_NO_IDS, central=True
        )
        centroids = cells.centroids if width else np.zeros((1, 0), np.float32)
    else:
        centroids = before.centroids
    files.make_folder(folder)
    start = len(files.list_files(folder, ".parquet", options)) if before else 0
    schema = _schema(about["dtype"])
    tasks = [
        dask.delayed(_write_part)(
            part, source.spec, centroids, files.join(folder, f"part-{start + i:05d}.parquet"), schema, options
        )
        for i, part in enumerate(source.parts())
    ]
    about = {**about, "rows": about["rows"] + sum(dask.compute(*tasks))}
    buffer = io.BytesIO()
    np.save(buffer, centroids)
    with files.write_whole(files.join(folder, "centroids.npy"), options) as file:
        file.write(buffer.getvalue())
    with files.write_whole(files.join(folder, "index.json"), options) as file:
        file.write(json.dumps(about, indent=1).encode())
    return Index(folder, about, centroids, options)


def source_of(
    df: Any, columns: Mapping[str, str], keep: str | None = None, lowest: bool = False, ref: bool = False
) -> Source:
    """Settle how rows are taken from a frame; `columns` names those of the tiers."""
    backend = backend_of(df).name
    if "key" not in df.columns:
        raise ValueError(f"dedup needs the column key (there are: {', '.join(map(str, df.columns))})")
    if not columns:
        raise ValueError(
            "there is no column to find duplicates by: embed adds sha256 and embedding "
            f"(there are: {', '.join(map(str, df.columns))})"
        )
    identity = tuple(name for name in ("shard", "key", "sample_offset") if name in df.columns)
    sha256, phash, embedding = (columns.get(name) for name in ("sha256", "phash", "embedding"))
    spec = RowSpec(backend, identity, "status" in df.columns, keep, lowest, sha256, phash, embedding, ref)
    return Source(df, spec)


def _count(source: Source) -> tuple[int, int]:
    """Number of rows with a vector, and its width."""
    counts = source.map(signatures).groupby("width")["id"].count().compute()
    widths = {int(width): int(n) for width, n in counts.items() if width}
    if len(widths) > 1:
        raise DedupError(f"column {source.spec.embedding!r} holds vectors of different lengths: {sorted(widths)}")
    return next(((n, width) for width, n in widths.items()), (0, 0))


def _about(
    source: Source, n_cells: int | None, seed: int, dtype: str, width: int, provenance: Mapping[str, Any] | None
) -> dict[str, Any]:
    columns = [name for name in ("sha256", "phash", "embedding") if getattr(source.spec, name) is not None]
    return {
        "format": _FORMAT,
        "width": width,
        "dtype": dtype,
        "n_cells": n_cells,
        "seed": seed,
        "rows": 0,
        "columns": columns,
        "provenance": json.loads(json.dumps(dict(provenance or {}))),
    }


def _write_part(
    frame: Any, spec: RowSpec, centroids: np.ndarray, url: str, schema: pa.Schema, options: Mapping[str, Any]
) -> int:
    import torch

    rows = signatures(frame, spec)
    width = centroids.shape[1]
    vectors: list[Any] = [None] * len(rows)
    rows["cell"] = np.int64(0)
    if spec.embedding is not None and width:
        with_vector = vectors_of(frame, spec, _NO_IDS)
        values = unpack(with_vector["vector"], width).copy()
        _, cells = neighbours.nearest_cells(torch.from_numpy(values), torch.from_numpy(centroids), 1, 0.0)
        at = pd.Series(np.arange(len(rows)), rows["id"]).loc[with_vector["id"]].to_numpy()
        rows.loc[at, "cell"] = cells
        for row, vector in zip(
            at, values.astype(schema.field("embedding").type.value_type.to_pandas_dtype()), strict=True
        ):
            vectors[row] = vector
    hashes = [f"{h:016x}" if there else None for h, there in zip(rows["phash"], rows["hashed"], strict=True)]
    columns = [*(pa.array(rows[n]) for n in ("key", "shard", "sample_offset", "sha256")), hashes, vectors, rows["cell"]]
    arrays = [
        pa.array(c, field.type) if isinstance(c, list) else pa.array(c).cast(field.type)
        for c, field in zip(columns, schema, strict=True)
    ]
    with files.write_whole(url, options) as file:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, compression="zstd")
    return len(rows)
