"""From pairs of similar rows to groups, and which row of a group stays: the decisions of `dedup`, in plain arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: Pairs of rows: numbers a and b, and how near they are, the higher the nearer.
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]

NO_PAIRS: Pairs = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


def joined(found: Iterable[Pairs]) -> Pairs:
    """Put pairs into one list."""
    a, b, near = (np.concatenate(side) for side in zip(NO_PAIRS, *found, strict=True))
    return a, b, near


class Forest:
    """Collects similar pairs and keeps no more of them than decide who is connected to whom, at any threshold.

    m copies of one picture make m²/2 pairs. A maximum spanning forest of the pairs has fewer than m, and two rows are
    connected by pairs of at least some similarity if and only if they are so in the forest (the bottleneck property of
    minimum spanning trees). Pairs name rows 0 to n - 1; more than `limit` are thinned out, which bounds the memory.
    """

    def __init__(self, n: int, limit: int = 2_000_000) -> None:
        self._n, self._limit = n, max(limit, 4 * n)
        self._held: list[Pairs] = []
        self._size = 0

    def add(self, a: np.ndarray, b: np.ndarray, near: np.ndarray) -> None:
        """Add pairs."""
        if not len(a):  # to hold many of these between large blocks that come and go would keep the heap from shrinking
            return
        self._held.append((a, b, near))
        self._size += len(a)
        if self._size > self._limit:
            self._thin()

    def pairs(self) -> Pairs:
        """Return what is left of the pairs."""
        if self._size >= max(1, self._n):
            self._thin()
        return joined(self._held)

    def _thin(self) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import minimum_spanning_tree

        a, b, near = joined(self._held)
        # A pair that was found twice, in two cells, must count once: a sparse matrix adds up.
        a, b = np.minimum(a, b), np.maximum(a, b)
        order = np.lexsort((-near, b, a))
        first = np.r_[True, (np.diff(a[order]) != 0) | (np.diff(b[order]) != 0)]
        a, b, near = a[order][first], b[order][first], near[order][first]
        # A weight of 0 would be no edge. 3 - s is exact in float64 for every float32 s of -64 to 1.
        graph = coo_array((3.0 - near.astype(np.float64), (a, b)), shape=(self._n, self._n))
        tree = minimum_spanning_tree(graph.tocsr()).tocoo()
        self._held, self._size = [(tree.row, tree.col, (3.0 - tree.data).astype(np.float32))], len(tree.row)


def order_rows(rows: pa.Table) -> np.ndarray:
    """Numbers of rows, sorted by who would rather stay.

    Those of the reference (``ref``) stand first; then the higher ``rank``, missing ones last; then ``shard``, ``key``
    and ``sample_offset``. No two rows share the last three, so the order depends on neither partitions nor workers.
    """
    by = {"ref": False, "rank": False, "shard": True, "key": True, "sample_offset": True}
    keys = [(name, "ascending" if up else "descending") for name, up in by.items()]
    return pc.sort_indices(rows.select(list(by)), sort_keys=keys).to_numpy().astype(np.int64)


def component_roots(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """For each of n rows the lowest row number that pairs connect it to, which may be its own: (n,) int64."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
    count, labels = connected_components(graph, directed=False)
    lowest = np.full(count, n, np.int64)
    np.minimum.at(lowest, labels, np.arange(n))
    return lowest[labels]


def follow(parent: np.ndarray) -> np.ndarray:
    """Follow pointers to their ends: a row that stays points to itself, and there is no other cycle."""
    while not np.array_equal(up := parent[parent], parent):
        parent = up
    return parent


def strongest(row: np.ndarray, partner: np.ndarray, near: np.ndarray) -> Pairs:
    """Keep for each row its most similar partner; of equally similar ones the lowest number."""
    order = np.lexsort((partner, -near, row))
    _, first = np.unique(row[order], return_index=True)
    best = order[first]
    return row[best], partner[best], near[best]
