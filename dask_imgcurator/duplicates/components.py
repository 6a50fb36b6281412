"""From pairs of similar rows to groups, and which row of a group stays: the decisions of `dedup`, in plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

__all__ = ["Forest", "component_roots", "follow", "order_rows", "strongest"]


class Forest:
    """Collects similar pairs and keeps no more of them than decide who is connected to whom, at any threshold.

    n copies of one picture make n²/2 pairs. A maximum spanning forest of the pairs has fewer than n, and two rows are
    connected by pairs of at least some similarity if and only if they are so in the forest (the bottleneck property of
    minimum spanning trees). So many values of eps are answered from one small list.

    Parameters
    ----------
    n : int
        Number of rows; pairs name them 0 to n - 1.
    limit : int, optional
        Pairs that are held before they are thinned out: this bounds the memory, at about 16 bytes a pair.
    """

    def __init__(self, n: int, limit: int = 2_000_000) -> None:
        self._n = n
        self._limit = max(limit, 4 * n)
        self._held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._size = 0

    def add(self, i: np.ndarray, j: np.ndarray, similarity: np.ndarray) -> None:
        """Add pairs; each pair may be added once only."""
        if not len(i):
            return
        self._held.append((i, j, similarity))
        self._size += len(i)
        if self._size > self._limit:
            self._thin()

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what is left of the pairs: row numbers i and j (int64) and their similarity (float32)."""
        if self._held and self._size >= self._n:
            self._thin()
        if not self._held:
            none = np.empty(0, np.int64)
            return none, none, np.empty(0, np.float32)
        i, j, similarity = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        return i.astype(np.int64), j.astype(np.int64), similarity.astype(np.float32)

    def _thin(self) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import minimum_spanning_tree

        i, j, similarity = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        # A weight of 0 would be no edge to scipy. 3 - s is exact in float64 for every float32 s of -1 to 1.
        weights = 3.0 - similarity.astype(np.float64)
        tree = minimum_spanning_tree(coo_array((weights, (i, j)), shape=(self._n, self._n)).tocsr()).tocoo()
        self._held = [(tree.row, tree.col, (3.0 - tree.data).astype(np.float32))]
        self._size = len(tree.row)


def order_rows(frame: pd.DataFrame, central: str | None = None) -> np.ndarray:
    """Sort rows by who would rather stay.

    Reference rows stand first; then the higher ``rank``, missing ones last; then ``shard``, ``key`` and
    ``sample_offset``, ascending. No two rows share the last three, so the order is total: it depends on neither
    partitions nor workers.

    Parameters
    ----------
    frame : pandas.DataFrame
        With ``ref``, ``rank``, ``shard``, ``key`` and ``sample_offset``.
    central : {"hard", "easy"}, optional
        Sort by ``central`` (similarity to the centroid of the row's cell) before ``rank``: lowest first, or highest.

    Returns
    -------
    numpy.ndarray
        (n,) int64: row numbers, in that order.
    """
    by = {"ref": False, "rank": False, "shard": True, "key": True, "sample_offset": True}
    if central is not None:
        by = {"ref": False, "central": central == "hard", **by}
    plain = frame[list(by)].reset_index(drop=True)
    order = plain.sort_values(list(by), ascending=list(by.values()), na_position="last", kind="stable")
    return order.index.to_numpy(np.int64)


def component_roots(i: np.ndarray, j: np.ndarray, n: int) -> np.ndarray:
    """Find connected components, each named by its lowest row number.

    Parameters
    ----------
    i, j : numpy.ndarray
        (m,) int64: the pairs.
    n : int
        Number of rows.

    Returns
    -------
    numpy.ndarray
        (n,) int64: for each row the lowest row number that it is connected to, which may be its own.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(i), np.int8), (i, j)), shape=(n, n))
    count, labels = connected_components(graph, directed=False)
    lowest = np.full(count, n, np.int64)
    np.minimum.at(lowest, labels, np.arange(n))
    return lowest[labels]


def follow(parent: np.ndarray) -> np.ndarray:
    """Follow pointers (a row that stays points to itself) to their ends.

    Parameters
    ----------
    parent : numpy.ndarray
        (n,) int64, without cycles other than a row's pointer to itself.

    Returns
    -------
    numpy.ndarray
        (n,) int64: the row in which each row's chain of pointers ends.
    """
    while not np.array_equal(up := parent[parent], parent):
        parent = up
    return parent


def strongest(row: np.ndarray, partner: np.ndarray, similarity: np.ndarray) -> tuple[Any, Any, Any]:
    """Keep for each row its most similar partner; of equally similar ones the lowest number."""
    order = np.lexsort((partner, -similarity, row))
    _, first = np.unique(row[order], return_index=True)
    best = order[first]
    return row[best], partner[best], similarity[best]
