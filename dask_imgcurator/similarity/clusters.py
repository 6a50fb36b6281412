"""Clusters of embeddings as columns, for N images per cluster, balance, and DataComp's image-based filter."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..duplicates.cells import nearest
from ..engine.backend import backend_of, is_dask
from ..engine.device import full_float32
from ..engine.frames import apply_step, refuse_text, require_columns
from ..engine.run import reduce
from ..select.selection import sample

if TYPE_CHECKING:
    import torch

#: Training rows of k-means per cluster: more hardly improve the centroids.
_PER_CLUSTER = 64

_BLOCK, _TRIES = 4096, 3


@dataclass(frozen=True)
class ClusterUse:
    """The clusters to assign a partition's rows to; `reference` counts the rows of another frame by cluster."""

    column: str
    centroids: np.ndarray = field(repr=False)  # (k, d) float32
    reference: np.ndarray | None = None  # (k,) int32

    @property
    def schema(self) -> pa.Schema:
        """The added columns."""
        more = [("cluster_reference", pa.int32())] if self.reference is not None else []
        return pa.schema([("cluster", pa.int32()), ("cluster_distance", pa.float32()), *more])


def assign_clusters(df: Any, k: int, *, reference: Any = None, seed: int = 0, column: str = "embedding") -> Any:
    """Add each row's cluster by k-means on the embeddings.

    Training reads a sample of the embeddings now (64 per cluster); the new columns are lazy if `df` is.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With a column of vectors, and ``shard`` and ``sample_offset`` (or ``key``) for drawing the sample.
    k : int
        How many clusters.
    reference : dask, pandas or cuDF DataFrame, optional
        Rows of another dataset with vectors from the same model, such as a benchmark's training set.
    seed : int
        Seed of the sample and of k-means.
    column : str
        The column of vectors; only their direction matters.

    Returns
    -------
    the frame's type
        With ``cluster`` (int32, 0 to k - 1), ``cluster_distance`` (float32, 0 to 2: Euclidean distance from the unit
        vector to the centroid) and, with a `reference`, ``cluster_reference`` (int32: number of reference rows in this
        cluster); null without a vector. ``cluster_reference > 0`` is DataComp's image-based filter.

    Raises
    ------
    ValueError
        If there are fewer than k vectors, or the reference's vectors have another length.
    ModuleNotFoundError
        Without FAISS (``pip install "dask-imgcurator[search]"``), or cuVS on a GPU.

    References
    ----------
    .. [1] Gadre et al., "DataComp: In search of the next generation of multimodal datasets", 2023, section 3.4 and
       appendix D: keep images that share a cluster with an image of ImageNet.

    Examples
    --------
    >>> df = assign_clusters(df, 1000)  # doctest: +SKIP
    >>> df = dic.sample(df, 100, by="cluster")  # doctest: +SKIP
    """
    if k < 1:
        raise ValueError(f"k={k}: give the number of clusters, 1 or more")
    require_columns(df, [column], "assign_clusters", "embed adds it")
    refuse_text(df, column)
    use = ClusterUse(column, _centroids(df, k, seed, column))
    if reference is not None:
        require_columns(reference, [column], "the reference of assign_clusters", "embed adds it")
        hits = reduce(reference[[column]], _hits, partial(np.sum, axis=0), use)
        use = ClusterUse(column, use.centroids, np.minimum(hits, 2**31 - 1).astype(np.int32))
    return apply_step(df, cluster_partition, use, use.schema, [column])


def _centroids(df: Any, k: int, seed: int, column: str) -> np.ndarray:
    """Train k-means on a random sample of the vectors at unit length."""
    import torch

    some = sample(df, _PER_CLUSTER * k, seed=seed, where=f"`{column}` is not null")[[column]]
    frame = some.compute() if is_dask(some) else some
    backend = backend_of(frame)
    values, rows = backend.matrix(frame[column])
    if len(rows) < k:
        raise ValueError(f"k={k}: there are only {len(rows)} vectors in {column!r}")
    unit = torch.nn.functional.normalize(values)
    # k-means finds a local optimum: keep the best of a few runs.
    tried = [backend.kmeans(unit, k, seed * _TRIES + i) for i in range(_TRIES)]
    return min(tried, key=lambda centroids: float(_distances(unit, centroids)[1].square().sum()))


def _distances(unit: torch.Tensor, centroids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid of each vector, and the distance to it: (m,) each."""
    import torch

    centres = torch.from_numpy(centroids).to(unit.device)
    squares = (centres**2).sum(1)
    with full_float32(True):
        found = [nearest(part, centres, squares, 1) for part in unit.split(_BLOCK)]
    at, away = (torch.cat([pair[i] for pair in found])[:, 0] for i in (1, 0))
    return at, (1 + away).clamp(min=0).sqrt()


def _nearest(frame: Any, use: ClusterUse) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with a vector, their clusters, and their distances from the centroids: (m,) each."""
    import torch

    values, rows = backend_of(frame).matrix(frame[use.column])
    if not len(rows):
        return rows, np.empty(0, np.int64), np.empty(0, np.float32)
    if values.shape[1] != use.centroids.shape[1]:
        raise ValueError(
            f"vectors of {use.column!r} have {values.shape[1]} numbers, the clustered ones "
            f"{use.centroids.shape[1]}: embed both with the same model"
        )
    found, away = _distances(torch.nn.functional.normalize(values), use.centroids)
    return rows, found.cpu().numpy(), away.cpu().numpy()


def _hits(frame: Any, use: ClusterUse) -> np.ndarray:
    return np.bincount(_nearest(frame, use)[1], minlength=len(use.centroids))


def cluster_partition(frame: Any, use: ClusterUse) -> Any:
    """Add the columns to a partition."""
    rows, clusters, distances = _nearest(frame, use)
    missing = np.ones(len(frame), bool)
    missing[rows] = False
    columns = {"cluster": np.zeros(len(frame), np.int32), "cluster_distance": np.zeros(len(frame), np.float32)}
    columns["cluster"][rows], columns["cluster_distance"][rows] = clusters, distances
    if use.reference is not None:
        columns["cluster_reference"] = np.zeros(len(frame), np.int32)
        columns["cluster_reference"][rows] = use.reference[clusters]
    arrays = [pa.array(values, mask=missing) for values in columns.values()]
    new = backend_of(frame).from_arrow(pa.Table.from_arrays(arrays, schema=use.schema))
    new.index = frame.index
    return frame.assign(**{name: new[name] for name in columns})
