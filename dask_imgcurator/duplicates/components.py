"""From pairs of similar rows to groups, and the kept row of each group: the decisions of `dedup`, in plain arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: Pairs of rows: numbers a and b, and how near they are (higher is nearer).
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]

NO_PAIRS: Pairs = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


def joined(found: Iterable[Pairs]) -> Pairs:
    """Concatenate pairs."""
    a, b, near = (np.concatenate(side) for side in zip(NO_PAIRS, *found, strict=True))
    return a, b, near


class Forest:
    """Collects similar pairs, and keeps only those needed to decide which rows are connected at any threshold.

    m copies of one picture make m²/2 pairs. A maximum spanning forest of the pairs has fewer than m, and two rows are
    connected by pairs of at least some similarity if and only if the forest connects them at it (the bottleneck
    property of minimum spanning trees). Pairs name rows 0 to n - 1; more than `limit` are thinned out, which bounds
    the memory.
    """

    def __init__(self, n: int, limit: int = 2_000_000) -> None:
        self._n, self._limit = n, max(limit, 4 * n)
        self._held: list[Pairs] = []
        self._size = 0

    def add(self, a: np.ndarray, b: np.ndarray, near: np.ndarray) -> None:
        """Add pairs."""
        if not len(a):  # many small arrays between large temporary blocks would keep the heap from shrinking
            return
        self._held.append((a, b, near))
        self._size += len(a)
        if self._size > self._limit:
            self._thin()

    def pairs(self) -> Pairs:
        """Return the remaining pairs."""
        if self._size >= max(1, self._n):
            self._thin()
        return joined(self._held)

    def _thin(self) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import minimum_spanning_tree

        a, b, near = joined(self._held)
        # A pair found in two cells must count once, but a sparse matrix adds duplicates up.
        a, b = np.minimum(a, b), np.maximum(a, b)
        order = np.lexsort((-near, b, a))
        first = np.r_[True, (np.diff(a[order]) != 0) | (np.diff(b[order]) != 0)]
        a, b, near = a[order][first], b[order][first], near[order][first]
        # A weight of 0 would mean no edge. 3 - s is exact in float64 for every float32 s from -64 to 1.
        graph = coo_array((3.0 - near.astype(np.float64), (a, b)), shape=(self._n, self._n))
        tree = minimum_spanning_tree(graph.tocsr()).tocoo()
        self._held, self._size = [(tree.row, tree.col, (3.0 - tree.data).astype(np.float32))], len(tree.row)


def order_rows(rows: pa.Table) -> np.ndarray:
    """Numbers of rows, sorted by preference for being kept.

    Those of the reference (``ref``) come first; then by descending ``rank``, missing ones last; then by ``shard``,
    ``key`` and ``sample_offset``. No two rows share the last three, so the order does not depend on partitions or
    workers.
    """
    by = {"ref": False, "rank": False, "shard": True, "key": True, "sample_offset": True}
    keys = [(name, "ascending" if up else "descending") for name, up in by.items()]
    return pc.sort_indices(rows.select(list(by)), sort_keys=keys).to_numpy().astype(np.int64)


def component_roots(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """For each of n rows, the lowest row number connected to it by pairs, possibly its own: (n,) int64."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
    count, labels = connected_components(graph, directed=False)
    lowest = np.full(count, n, np.int64)
    np.minimum.at(lowest, labels, np.arange(n))
    return lowest[labels]


def follow(parent: np.ndarray) -> np.ndarray:
    """Follow pointers to their ends: a kept row points to itself, and there are no other cycles."""
    while not np.array_equal(up := parent[parent], parent):
        parent = up
    return parent


def strongest(row: np.ndarray, partner: np.ndarray, near: np.ndarray) -> Pairs:
    """Keep for each row its most similar partner, among equals the one with the lowest number."""
    order = np.lexsort((partner, -near, row))
    _, first = np.unique(row[order], return_index=True)
    best = order[first]
    return row[best], partner[best], near[best]
