"""The Dask side of `dedup`: partitions to rows, rows to the tasks that compare them, pairs back to the client.

What moves between workers are rows, shuffled by what they must share to be compared: the bytes' hash, a part of the
perceptual hash, a k-means cell. What comes to the client are pairs and the names of the rows in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd

from ..engine.backend import get_backend, is_dask
from . import neighbours
from .rows import (
    RECORD,
    Comparison,
    Found,
    RowSpec,
    compare_buckets,
    exact_pairs,
    is_in,
    perceptual_pairs,
    same_hash_pairs,
    signatures,
    table_copies,
    unpack,
    vectors_of,
)

__all__ = [
    "ROWS_PER_TASK",
    "Cells",
    "LightPass",
    "Source",
    "cells_of",
    "light_pairs",
    "pair_cosines",
    "semantic_pairs",
]

#: Rows that one comparing task should hold; it holds up to twice as many where a cell had to be split.
ROWS_PER_TASK = 25_000

_SAMPLE_PER_CELL = 64
_SAMPLE_ROWS = 500_000


@dataclass(frozen=True)
class LightPass:
    """What the first pass finds.

    Attributes
    ----------
    pairs : dict of str to (edges, records)
        By tier.
    counts : dict of (bool, int) to int
        Rows, by whether they are of the reference and the width of their vector (0: none).
    """

    pairs: dict[str, Found]
    counts: dict[tuple[bool, int], int]


@dataclass(frozen=True)
class Source:
    """A Dask, pandas or cuDF DataFrame, and how rows are taken from it."""

    frame: Any
    spec: RowSpec

    def map(self, function: Any, *args: Any) -> Any:
        """Apply a function of rows, ``function(partition, spec, *args)``, to each partition: a Dask DataFrame."""
        meta = function(self.empty(), self.spec, *[_NO_IDS if dask.is_dask_collection(a) else a for a in args])
        if is_dask(self.frame):
            return self.frame.map_partitions(function, self.spec, *args, meta=meta, enforce_metadata=False)
        # Not by way of a Dask DataFrame of the frame itself: Dask would make text of vectors in an object column.
        args = dask.compute(*args)
        return dd.from_map(function, [self.frame], args=(self.spec, *args), meta=meta, enforce_metadata=False)

    def empty(self) -> Any:
        """Return the frame without its rows."""
        return _empty(self.frame) if is_dask(self.frame) else self.frame.iloc[:0]

    def parts(self) -> list[Any]:
        """Return the partitions."""
        return list(self.frame.to_delayed()) if is_dask(self.frame) else [self.frame]


_NO_IDS = np.empty(0, np.uint64)


def _empty(frame: Any) -> Any:
    from dask.dataframe.utils import make_meta

    return make_meta(frame)


def _gather(parts: Sequence[Any]) -> Found:
    """Bring pairs and records to the client."""
    return _concat(dask.compute(*parts))


def _tasks(frame: Any, function: Any, *args: Any) -> list[Any]:
    return [dask.delayed(function)(part, *args) for part in frame.to_delayed()]


def _exchange(frame: Any, column: str, parts: int) -> Any:
    """Bring rows to the partition that a column of 0 to parts - 1 names."""
    return frame.set_index(column, divisions=list(range(parts + 1)), sorted=False)


# --- light tiers ----------------------------------------------------------------------------------


def light_pairs(sources: Sequence[Source], tiers: Sequence[str], max_distance: int) -> LightPass:
    """Find the pairs of the exact and the perceptual tier, and count rows and vectors, in one pass over the data.

    What that pass takes out of the rows, about 200 bytes each, is kept in memory (on the workers, where there are any)
    until this is done.
    """
    rows = dd.concat([source.map(signatures) for source in sources]).persist()
    tasks: dict[str, list[Any]] = {}
    if "exact" in tiers:
        tasks["exact"] = _tasks(rows[rows["sha256"].notnull()].shuffle("sha256"), exact_pairs)
    hashed = rows[rows["hashed"]][RECORD]
    if "perceptual" in tiers:
        tasks["perceptual"] = _tasks(hashed.shuffle("phash"), same_hash_pairs)
    counted, *found = dask.compute(_tasks(rows[["ref", "width"]], _count), *tasks.values())
    counts = pd.concat(counted).groupby(level=["ref", "width"]).sum()
    pairs = {name: _concat(parts) for name, parts in zip(tasks, found, strict=True)}
    if "perceptual" in tiers and max_distance > 0:
        pairs["perceptual"] = _concat([pairs["perceptual"], _near_hashes(hashed, max_distance)])
    return LightPass(pairs, {(bool(ref), int(width)): int(n) for (ref, width), n in counts.items()})


def _count(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby(["ref", "width"]).size()


def _concat(found: Sequence[Found]) -> Found:
    edges, records = (pd.concat(part, ignore_index=True) for part in zip(*found, strict=True))
    return edges, records


def _near_hashes(hashed: Any, distance: int) -> Found:
    """Find hashes that differ in a few bits: one row of each hash goes into a bucket of each table."""
    masks = tuple(neighbours.hamming_masks(max(1, len(hashed)), distance))
    copies = hashed.shuffle("phash").map_partitions(
        table_copies, masks, meta=table_copies(_empty(hashed), masks), enforce_metadata=False
    )
    buckets = copies.shuffle(["table", "bucket"])
    return _gather(_tasks(buckets, perceptual_pairs, masks, distance))


# --- cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """The k-means cells of a set of vectors.

    Attributes
    ----------
    centroids : numpy.ndarray
        (k, d) float32.
    plan : CellPlan
        Buckets and parts.
    probe : int
        Cells a row is brought to, its own included.
    radius : float
        Euclidean distance up to which neighbours are looked for.
    """

    centroids: np.ndarray
    plan: neighbours.CellPlan
    probe: int
    radius: float


def cells_of(
    sources: Sequence[Source],
    n: int,
    width: int,
    *,
    n_cells: int | None,
    probe: int,
    radius: float,
    seed: int,
    without: np.ndarray,
    centroids: np.ndarray | None = None,
    central: bool = False,
    rows_per_task: int = ROWS_PER_TASK,
) -> Cells:
    """Train k-means on a sample, unless there are centroids already, and plan where rows go.

    The sample is that of the rows with the lowest ids, and ids are hashes: it is random, but the same whatever the
    partitions. It has 64 rows a cell and at most 500,000; it is all that lies on one worker.

    Parameters
    ----------
    sources : sequence of Source
        The rows.
    n, width : int
        Number of rows with a vector, and its width.
    n_cells : int or None
        None: `neighbours.default_cells`.
    probe, radius
        See `neighbours.nearest_cells`.
    seed : int
        Of k-means.
    without : numpy.ndarray
        Ids of rows that have gone.
    centroids : numpy.ndarray, optional
        (k, width): of a saved index.
    central : bool
        Whether the centroid of a single cell is asked for.
    rows_per_task : int
        See `CellPlan`.
    """
    k = len(centroids) if centroids is not None else min(n_cells or neighbours.default_cells(n), max(1, n))
    if k == 1 and not central and centroids is None:
        plan = neighbours.CellPlan(np.array([float(n)]), rows_per_task)
        return Cells(np.zeros((1, width), np.float32), plan, 1, radius)
    size = min(n, _SAMPLE_ROWS, max(_SAMPLE_PER_CELL * k, 10_000))
    # As ids below a limit: 2**64 itself is not one of them.
    below = None if size == n else min(int(2.0**64 * size / n), 2**64 - 1)
    rows = dd.concat([source.map(vectors_of, without, below) for source in sources])
    backend = sources[0].spec.backend
    train = dask.delayed(_train)(rows.to_delayed(), backend, width, k, seed, centroids, probe, radius)
    centroids, home, visits = train.compute()
    scale = n / max(1, len(home))
    return Cells(centroids, neighbours.plan_cells(home, visits, len(centroids), scale, rows_per_task), probe, radius)


def _train(
    parts: list[pd.DataFrame],
    backend: str,
    width: int,
    k: int,
    seed: int,
    centroids: np.ndarray | None,
    probe: int,
    radius: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import torch

    rows = pd.concat(parts, ignore_index=True)
    order = np.argsort(rows["id"].to_numpy(), kind="stable")
    half = get_backend(backend)
    vectors = torch.from_numpy(unpack(rows["vector"], width)[order]).to(half.device)
    if centroids is None:
        k = min(k, max(1, len(vectors)))
        centroids = half.kmeans(vectors, k, seed) if k > 1 else vectors.mean(0, keepdim=True).cpu().numpy()
    _, cells = neighbours.nearest_cells(vectors, torch.from_numpy(centroids).to(half.device), probe, radius)
    return centroids, cells[: len(vectors)], cells[len(vectors) :]


def place(rows: pd.DataFrame, cells: Cells, width: int, device: str, central: bool) -> pd.DataFrame:
    """Copy rows into the buckets where they are compared.

    Adds ``bucket``, ``chunk``, ``kind``, ``central`` and ``part``.
    """
    import torch

    vectors = torch.from_numpy(unpack(rows["vector"], width).copy()).to(device)
    centroids = torch.from_numpy(cells.centroids).to(device)
    n, ref, saved = len(rows), rows["ref"].to_numpy(), rows["cell"].to_numpy()
    if len(cells.centroids) == 1:
        row, cell = np.arange(n), np.zeros(n, np.int64)
    else:
        row, cell = neighbours.nearest_cells(vectors, centroids, cells.probe, cells.radius)
    cell[:n] = np.where(saved >= 0, saved, cell[:n])
    near = neighbours.cosine_to(vectors, centroids, cell[:n]) if central else np.zeros(n, np.float32)
    kind = np.full(len(row), neighbours.VISITOR)
    kind[:n] = np.where(ref, neighbours.REFERENCE, neighbours.HOME)
    # The new rows come to where the reference's live; the reference visits nobody.
    use = ~((kind == neighbours.VISITOR) & ref[row])
    row, cell, kind = row[use], cell[use], kind[use]
    which, bucket, chunk = cells.plan.place(rows["id"].to_numpy()[row], cell)
    placed = rows.drop(columns="cell").iloc[row[which]].reset_index(drop=True)
    return placed.assign(
        bucket=bucket, chunk=chunk, kind=kind[which], central=near[row[which]], part=cells.plan.part[bucket]
    )


def semantic_pairs(sources: Sequence[Source], cells: Cells, how: Comparison, without: np.ndarray) -> Found:
    """Find the pairs of near vectors."""
    central = how.central is not None
    rows = dd.concat([source.map(vectors_of, without) for source in sources])
    meta = place(_empty(rows), cells, how.width, "cpu", central)
    placed = rows.map_partitions(
        place, dask.delayed(cells), how.width, how.device, central, meta=meta, enforce_metadata=False
    )
    return _gather(_tasks(_exchange(placed, "part", cells.plan.parts), compare_buckets, how))


# --- cosines of given pairs -----------------------------------------------------------------------


def pair_cosines(sources: Sequence[Source], a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    """Compute the cosine of given pairs of rows.

    Parameters
    ----------
    sources : sequence of Source
        The rows.
    a, b : numpy.ndarray
        (m,) uint64: ids.
    width : int
        Of the vectors.

    Returns
    -------
    numpy.ndarray
        (m,) float32; NaN where a row has no vector.
    """
    out = np.full(len(a), np.nan, np.float32)
    if not len(a) or not width:
        return out
    order = np.argsort(b, kind="stable")
    part = np.empty(len(a), np.int64)
    part[order] = np.arange(len(a)) // ROWS_PER_TASK
    # The parts that each row is needed in; a row kept for many others is needed in several.
    wanted = pd.DataFrame({"id": np.r_[a, b], "part": np.r_[part, part]}).drop_duplicates().sort_values(["id", "part"])
    rows = dd.concat([source.map(_wanted_vectors, dask.delayed(wanted)) for source in sources])
    parts = int(part.max()) + 1
    chosen = [np.flatnonzero(part == p) for p in range(parts)]
    sent = _exchange(rows, "part", parts).to_delayed()
    dots = dask.compute(*[dask.delayed(_dots)(f, a[c], b[c], width) for f, c in zip(sent, chosen, strict=True)])
    for c, values in zip(chosen, dots, strict=True):
        out[c] = values
    return out


def _wanted_vectors(frame: Any, spec: RowSpec, wanted: Any) -> pd.DataFrame:
    rows = vectors_of(frame, replace(spec, keep=None, phash=None), _NO_IDS)[["id", "vector"]]
    if not isinstance(wanted, pd.DataFrame):  # for the meta
        return rows.assign(part=np.int64(0))
    rows = rows[is_in(rows["id"].to_numpy(), wanted["id"].to_numpy())]
    return rows.merge(wanted, on="id")


def _dots(rows: pd.DataFrame, a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    rows = rows.drop_duplicates("id").sort_values("id")
    ids, vectors = rows["id"].to_numpy(), unpack(rows["vector"], width)
    out = np.full(len(a), np.nan, np.float32)
    known = np.flatnonzero(is_in(a, ids) & is_in(b, ids))
    for some in np.array_split(known, 1 + len(known) // 4096):
        left, right = vectors[np.searchsorted(ids, a[some])], vectors[np.searchsorted(ids, b[some])]
        out[some] = np.einsum("ij,ij->i", left, right)
    return out
