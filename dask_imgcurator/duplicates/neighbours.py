"""Which rows are near which: k-means cells, blocked cosine, Hamming distance. Pure numerics, without any frame.

A cell's rows are compared in tiles, so that memory does not grow with the square of anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .components import Forest

if TYPE_CHECKING:
    import torch

__all__ = [
    "BRUTE_FORCE_ROWS",
    "HOME",
    "REFERENCE",
    "TOLERANCE",
    "VISITOR",
    "CellPlan",
    "cosine_to",
    "default_cells",
    "earlier_maxima",
    "hamming_masks",
    "hamming_pairs",
    "nearest_cells",
    "plan_cells",
    "similar_pairs",
    "tiles_of",
]

#: Up to so many rows all pairs are compared: it takes seconds, and its recall is 1.
BRUTE_FORCE_ROWS = 20_000

#: Rounding of a cosine in float32: with eps = 0, rows of the same direction still count as duplicates.
TOLERANCE = 1e-6

#: What a row is in a cell: it lives there, it lives there and belongs to the reference, it looks for neighbours there.
HOME, REFERENCE, VISITOR = 0, 1, 2

_TILE = 2048


# --- cells ----------------------------------------------------------------------------------------


def default_cells(n: int) -> int:
    """Return the number of k-means cells for n rows: √n, which balances assigning (n·k) and comparing (n²/k).

    1, so brute force, up to `BRUTE_FORCE_ROWS`; at most 10,000, because larger cells are split anyway.
    """
    return 1 if n <= BRUTE_FORCE_ROWS else min(round(math.sqrt(n)), 10_000)


def nearest_cells(
    vectors: torch.Tensor, centroids: torch.Tensor, probe: int, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Find the cell where each row lives, and those where its neighbours may live.

    A neighbour y of x, ‖x - y‖ ≤ radius, can live in cell c only if x is no farther than the radius from the plane
    between c and its own cell h: (‖x - c‖² - ‖x - h‖²) / (2 ‖c - h‖) ≤ radius. Of the cells for which this holds, the
    nearest probe - 1 are visited.

    Parameters
    ----------
    vectors : torch.Tensor
        (n, d) float32.
    centroids : torch.Tensor
        (k, d) float32, on the same device.
    probe : int
        Cells a row, its own included.
    radius : float
        Euclidean distance; √(2 eps) for unit vectors.

    Returns
    -------
    row, cell : numpy.ndarray
        (m,) int64. The first n are the rows' own cells, row i at position i; then follow visits.
    """
    import torch

    probe = min(probe, len(centroids))
    squares = (centroids**2).sum(1)
    cells = [np.empty(0, np.int64)]
    visits: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(vectors), _TILE):
        block = vectors[start : start + _TILE]
        distances = squares - 2 * (block @ centroids.T)  # less ‖x‖², which is the same for all cells
        found, which = distances.topk(probe, largest=False)
        cells.append(which[:, 0].cpu().numpy())
        if probe == 1:
            continue
        gaps = (centroids[which[:, 1:]] - centroids[which[:, :1]]).norm(dim=2)
        near = (found[:, 1:] - found[:, :1]) <= 2 * radius * gaps
        row, column = torch.nonzero(near, as_tuple=True)
        visits.append(((row + start).cpu().numpy(), which[row, column + 1].cpu().numpy()))
    rows = [np.arange(len(vectors)), *(row for row, _ in visits)]
    return np.concatenate(rows), np.concatenate([*cells, *(cell for _, cell in visits)])


def cosine_to(vectors: torch.Tensor, centroids: torch.Tensor, cell: np.ndarray) -> np.ndarray:
    """Return the cosine of each (unit) row and the centroid of its cell: (n,) float32."""
    import torch

    own = torch.nn.functional.normalize(centroids, dim=1)[torch.as_tensor(cell, device=centroids.device)]
    return np.asarray((vectors * own).sum(1).cpu().numpy(), np.float32)


class CellPlan:
    """How cells become buckets (what is compared at once) and buckets become parts (what a task holds).

    A cell with more rows than a task should hold is split into s chunks, by the rows' ids, and each of the
    s (s + 1) / 2 pairs of chunks is a bucket. So no task holds a whole cell, however skewed the cells are; its rows
    travel s times.

    Parameters
    ----------
    expected : numpy.ndarray
        (k,) float: rows expected in each cell, visitors included.
    rows_per_task : int
        Rows that a task should hold; a bucket of a split cell holds up to twice as many.

    Attributes
    ----------
    splits : numpy.ndarray
        (k,) int64: chunks of each cell.
    first : numpy.ndarray
        (k,) int64: number of each cell's first bucket.
    part : numpy.ndarray
        (b,) int64: the part that each bucket belongs to.
    parts : int
        Number of parts.
    """

    def __init__(self, expected: np.ndarray, rows_per_task: int) -> None:
        self.splits = np.maximum(1, np.ceil(expected / rows_per_task)).astype(np.int64)
        buckets = self.splits * (self.splits + 1) // 2
        self.first = np.concatenate([[0], np.cumsum(buckets)[:-1]])
        # A bucket of one cell that is whole has all its rows; of a split cell, two chunks.
        size = np.repeat(np.where(self.splits > 1, 2, 1) * expected / self.splits, buckets)
        self.part = ((np.cumsum(size) - size) // rows_per_task).astype(np.int64)
        _, self.part = np.unique(self.part, return_inverse=True)
        self.parts = int(self.part[-1]) + 1

    def place(self, ids: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the buckets that rows go to.

        Parameters
        ----------
        ids : numpy.ndarray
            (m,) uint64.
        cells : numpy.ndarray
            (m,) int64.

        Returns
        -------
        which, bucket, chunk : numpy.ndarray
            (p,) int64: position in `ids`, bucket and chunk; p ≥ m, because rows of split cells go to several.
        """
        splits = self.splits[cells]
        chunk = (ids % splits.astype(np.uint64)).astype(np.int64)
        which = np.repeat(np.arange(len(ids)), splits)
        other = np.arange(len(which)) - np.repeat(np.cumsum(splits) - splits, splits)
        low, high = np.minimum(chunk[which], other), np.maximum(chunk[which], other)
        # Buckets of a cell: pairs (low, high), row by row of the upper triangle.
        bucket = self.first[cells[which]] + low * splits[which] - low * (low - 1) // 2 + high - low
        return which, bucket, chunk[which]


def plan_cells(home: np.ndarray, visits: np.ndarray, k: int, scale: float, rows_per_task: int) -> CellPlan:
    """Plan from the cells of a sample, each of whose rows stands for `scale` rows."""
    counts = np.bincount(home, minlength=k) + np.bincount(visits, minlength=k)
    return CellPlan(counts * scale, rows_per_task)


# --- cosine ---------------------------------------------------------------------------------------


def tiles_of(chunk: np.ndarray, kind: np.ndarray) -> list[tuple[slice, slice]]:
    """Say which stretches of a bucket's rows are compared with which.

    Parameters
    ----------
    chunk, kind : numpy.ndarray
        (n,) int: rows sorted by the two. `kind` is `HOME`, `REFERENCE` or `VISITOR`.

    Returns
    -------
    list of (slice, slice)
        Two rows are compared where at least one lives here and at least one is not of the reference. Two rows of a
        split cell that are in one chunk are compared only where that chunk is alone.
    """
    n = len(chunk)
    starts = np.flatnonzero(np.r_[True, (np.diff(chunk) != 0) | (np.diff(kind) != 0)]) if n else np.empty(0, np.int64)
    stretches = [slice(int(a), int(b)) for a, b in itertools.pairwise([*starts, n])]
    crossed = n > 0 and chunk[0] != chunk[-1]
    tiles = []
    for left, right in itertools.combinations_with_replacement(stretches, 2):
        kinds = {int(kind[left.start]), int(kind[right.start])}
        if kinds in ({REFERENCE}, {VISITOR}) or (crossed and chunk[left.start] == chunk[right.start]):
            continue
        tiles.append((left, right))
    return tiles


def similar_pairs(
    vectors: torch.Tensor, tiles: Iterable[tuple[slice, slice]], threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the pairs of a cosine of at least `threshold`, thinned to a spanning forest.

    Parameters
    ----------
    vectors : torch.Tensor
        (n, d) float32, unit rows; on the device that computes.
    tiles : iterable of (slice, slice)
        From `tiles_of`.
    threshold : float
        Cosine.

    Returns
    -------
    i, j, similarity : numpy.ndarray
        Fewer than n pairs, see `Forest`. Beside the vectors, memory is about 2048² float32 and the pairs.
    """
    forest = Forest(len(vectors))
    for left, right in tiles:
        same = left == right
        for a, b in itertools.product(_blocks(left), _blocks(right)):
            if same and b.start < a.start:
                continue
            similarity = vectors[a] @ vectors[b].T
            if same and a == b:
                similarity.masked_fill_(_upper(similarity), -2)  # each pair once, and no row with itself
            forest.add(*_above(similarity, threshold, a.start, b.start))
    return forest.pairs()


def _upper(square: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.ones_like(square, dtype=torch.bool).triu_()


def _blocks(stretch: slice) -> list[slice]:
    return [slice(s, min(s + _TILE, stretch.stop)) for s in range(stretch.start, stretch.stop, _TILE)]


def _above(
    similarity: torch.Tensor, threshold: float, row: int, column: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import torch

    i, j = torch.nonzero(similarity >= threshold, as_tuple=True)
    values = similarity[i, j]
    return (i + row).cpu().numpy(), (j + column).cpu().numpy(), values.cpu().numpy()


def earlier_maxima(
    vectors: torch.Tensor, reference: int, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find for each row the most similar one among those that stand before it.

    Parameters
    ----------
    vectors : torch.Tensor
        (n, d) float32, unit rows, in the order of who would rather stay.
    reference : int
        The first so many rows are of the reference: none is looked for them.
    threshold : float
        Cosine.

    Returns
    -------
    row, earlier, similarity : numpy.ndarray
        (m,): the rows for which that similarity is at least `threshold`.
    """
    import torch

    found = []
    for b in _blocks(slice(reference, len(vectors))):
        width = b.stop - b.start
        best = torch.full((width,), -2.0, device=vectors.device)
        where = torch.zeros(width, dtype=torch.int64, device=vectors.device)
        for a in [*_blocks(slice(0, b.start)), b]:
            similarity = vectors[a] @ vectors[b].T
            if a == b:
                similarity.masked_fill_(_upper(similarity).T, -2)
            value, index = similarity.max(dim=0)
            better = value > best
            best = torch.where(better, value, best)
            where = torch.where(better, index + a.start, where)
        hit = torch.nonzero(best >= threshold)[:, 0]
        found.append(((hit + b.start).cpu().numpy(), where[hit].cpu().numpy(), best[hit].cpu().numpy()))
    if not found:
        none = np.empty(0, np.int64)
        return none, none, np.empty(0, np.float32)
    rows, earlier, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, earlier, values


# --- Hamming --------------------------------------------------------------------------------------


def hamming_masks(n: int, distance: int) -> list[int]:
    """Choose the bits by which hashes are put in buckets, so that no pair within a distance is missed.

    The 64 bits are cut into b blocks. Two hashes that differ in at most k bits agree in at least b - k blocks, so each
    choice of b - k blocks gets a table whose buckets hold the hashes that agree there (Manku, Jain and Das Sarma 2007,
    "Detecting near-duplicates for web crawling"; b = k + 1 is the pigeonhole). There are C(b, k) tables, with about
    n / 2^(64 (b - k) / b) hashes a bucket; b is chosen by the sum of both costs.

    Parameters
    ----------
    n : int
        Number of hashes.
    distance : int
        Largest number of differing bits, k.

    Returns
    -------
    list of int
        64-bit masks, one a table.
    """
    best: tuple[float, list[int]] | None = None
    for blocks in range(distance + 1, distance + 4):
        edges = [round(i * 64 / blocks) for i in range(blocks + 1)]
        block = [((1 << b) - 1) ^ ((1 << a) - 1) for a, b in itertools.pairwise(edges)]
        masks = [sum(chosen) for chosen in itertools.combinations(block, blocks - distance)]
        bits = min(mask.bit_count() for mask in masks)
        # To sort a row into a table costs about as much as some hundred comparisons.
        cost = len(masks) * n * (200 + n / 2 / 2.0**bits)
        if best is None or cost < best[0]:
            best = cost, masks
    assert best is not None
    return best[1]


def hamming_pairs(
    hashes: np.ndarray, table: np.ndarray, masks: Sequence[int], distance: int, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the pairs of rows that share a bucket of a table and differ in at most `distance` bits.

    Parameters
    ----------
    hashes : numpy.ndarray
        (n,) uint64.
    table : numpy.ndarray
        (n,) int: the table that the row was copied into.
    masks : sequence of int
        Of all tables.
    distance : int
        Largest number of differing bits.
    reference : numpy.ndarray
        (n,) bool: two rows of the reference are no pair.

    Returns
    -------
    i, j : numpy.ndarray
        (m,) int64. A pair that shares buckets of several tables is found in the first of them only. Where there would
        be n pairs or more, they are thinned to a spanning forest, see `Forest`.
    distance : numpy.ndarray
        (m,) int64.
    """
    bits = np.array(masks, np.uint64)
    key = hashes & bits[table]
    order = np.lexsort((hashes, key, table))
    key, which, value, ours = key[order], table[order], hashes[order], ~reference[order]
    forest = Forest(len(order))
    left = np.arange(len(order))
    # Row r and row r + step, for step 1, 2, …, as long as any two of them share a bucket.
    for step in range(1, len(order)):
        left = left[left + step < len(order)]
        left = left[(key[left] == key[left + step]) & (which[left] == which[left + step])]
        if not len(left):
            break
        differing = value[left] ^ value[left + step]
        count = np.bitwise_count(differing)
        hit = (count <= distance) & (ours[left] | ours[left + step])
        at, differing = left[hit], differing[hit]
        first = np.ones(len(at), bool)
        for number, mask in enumerate(bits):
            first &= (which[at] <= number) | ((differing & mask) != 0)
        at = at[first]
        forest.add(order[at], order[at + step], -count[hit][first].astype(np.float32))
    i, j, negative = forest.pairs()
    return i, j, (-negative).astype(np.int64)
