"""k-means cells: rows that may be near each other share a cell and are compared there; recall is measured.

Matrix products are computed in blocks, so memory never grows quadratically, and each on one thread, with rows in the
order of their ids: their last digits depend neither on the number of threads nor on partitions. Threads share the
cells.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from dask.system import CPU_COUNT

from ..engine.backend import Backend
from ..engine.device import full_float32
from .components import NO_PAIRS, Forest, Pairs, joined, strongest
from .rows import Rows

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

#: Up to this many rows, all pairs are compared: it takes seconds, and recall is 1.
BRUTE_FORCE_ROWS = 20_000

_SAMPLE_PER_CELL = 32  # training rows of k-means per cell
_TOO_LARGE = 4.0  # times the mean: larger cells are split
_ASKED, _K = 512, 20  # to estimate recall: rows compared with all others, and how many neighbours of each count

#: Rounding of a cosine in float32: with eps = 0, rows of the same direction still count as duplicates.
TOLERANCE = 1e-6

#: Maximum number of rows on each side of a product.
BLOCK = 2048

#: Returns the unit vectors of rows, on the computing device.
Take: TypeAlias = "Callable[[np.ndarray], torch.Tensor]"


def on_threads(function: Callable[[T], R], items: Iterable[T], device: str) -> Iterator[R]:
    """Apply a function to items, each on one thread, and yield the results in order; on a GPU one after another."""
    import torch

    if device != "cpu":
        with full_float32(True):
            yield from map(function, items)
        return
    before, running = torch.get_num_threads(), deque[Future[R]]()
    with ThreadPoolExecutor(CPU_COUNT, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 4 * CPU_COUNT:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    torch.set_num_threads(before)  # threads that start later inherit the last setting


def blocks(start: int, stop: int, size: int = 0) -> list[slice]:
    """Cut a range of rows into blocks."""
    return [slice(s, min(s + (size or BLOCK), stop)) for s in range(start, stop, size or BLOCK)]


@dataclass(frozen=True)
class Cell:
    """Numbers of the rows in a cell: first the reference's, then those that live there, then visitors.

    Two rows are compared if at least one lives there and at least one is not of the reference, or if one is of the
    reference and the other visits. The rows that live there are in the order of comparison.
    """

    rows: np.ndarray
    reference: int
    homes: int

    def tasks(self) -> Iterator[tuple[Cell, slice, list[slice]]]:
        """Blocks of rows, each with the blocks to compare it with."""
        apart, n = self.reference + self.homes, len(self.rows)
        for left in blocks(self.reference, apart):
            yield self, left, blocks(0, self.reference) + blocks(left.start, n)
        for left in blocks(apart, n) if self.reference else []:
            yield self, left, blocks(0, self.reference)


def near_pairs(
    cell: Cell, left: slice, right: Sequence[slice], take: Take, threshold: float, sequential: bool
) -> Pairs:
    """Find the pairs in a block of a cell with a cosine of at least `threshold`.

    A `Forest` thins them out; or, if `sequential`, only the most similar row b before each row a is kept.
    """
    import torch

    forest, best = Forest(len(cell.rows)), NO_PAIRS
    mine = take(cell.rows[left])
    for other in right:
        cosine = mine @ take(cell.rows[other]).T
        if other.start >= left.start and other.start < left.stop:  # each pair once, and no row with itself
            cosine.masked_fill_(torch.ones_like(cosine, dtype=torch.bool).tril_(), -2)
        i, j = torch.nonzero(cosine >= threshold, as_tuple=True)
        near = cosine[i, j].cpu().numpy()
        a, b = (i + left.start).cpu().numpy(), (j + other.start).cpu().numpy()
        if sequential:
            best = strongest(*joined([best, (np.maximum(a, b), np.minimum(a, b), near)]))
        else:
            forest.add(a, b, near)
    a, b, near = best if sequential else forest.pairs()
    return cell.rows[a], cell.rows[b], near


def most_similar(asked: np.ndarray, rows: np.ndarray, take: Take, device: str, k: int) -> Pairs:
    """Find the k rows most similar to each query row, by comparing all."""
    import torch

    queries = take(asked)

    def work(block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        cosine = queries @ take(rows[block]).T
        cosine[torch.from_numpy(asked[:, None] == rows[block]).to(cosine.device)] = -2
        value, at = cosine.topk(min(k, cosine.shape[1]))
        return value.cpu(), at.cpu() + block.start

    found = on_threads(work, blocks(0, len(rows), 16_384), device)
    value, at = (torch.cat(side, dim=1) for side in zip(*found, strict=True))
    near, which = value.topk(min(k, len(rows) - 1))
    partner = rows[at.gather(1, which).numpy()]
    return np.repeat(asked, near.shape[1]), partner.ravel(), near.numpy().ravel()


# --- cells ----------------------------------------------------------------------------------------


def default_cells(n: int) -> int:
    """Number of k-means cells for n rows: 2 √n, which balances assigning (n k) and comparing (3 n²/k)."""
    return 1 if n <= BRUTE_FORCE_ROWS else round(2 * math.sqrt(n))


def train(rows: Rows, there: np.ndarray, backend: Backend, n_cells: int | None, seed: int) -> np.ndarray:
    """Return the centroids of cells, (k, d) float32, of rows sorted by id, of which the first are a random sample.

    There are more than `n_cells` if some cells are far too large: a centroid between several dense groups without their
    own centroids also attracts rows from everywhere else.
    """
    import torch

    k = max(1, min(n_cells or default_cells(len(there)), len(there)))
    sample = there[: max(_SAMPLE_PER_CELL * k, BRUTE_FORCE_ROWS)]
    values = rows.unit(sample)
    if k == 1:
        return values.mean(0, keepdims=True) if len(values) else np.zeros((1, rows.width), np.float32)

    def kmeans(some: np.ndarray, n: int) -> np.ndarray:
        return backend.kmeans(torch.from_numpy(some).to(backend.device), n, seed)

    centroids = kmeans(values, k)
    home = assign(rows, sample, centroids, backend.device, 1)[0][:, 0]
    share = np.bincount(home, minlength=k) * k / len(sample)
    large = share > _TOO_LARGE
    split = [kmeans(values[home == cell], round(share[cell])) for cell in np.flatnonzero(large)]
    return np.concatenate([centroids[~large], *split])


def nearest(vectors: torch.Tensor, centres: torch.Tensor, squares: torch.Tensor, n: int) -> Any:
    """The n nearest centroids of each vector, by squared distance minus the vector's squared norm: (m, n) each."""
    import torch

    return torch.addmm(squares, vectors, centres.T, alpha=-2).topk(n, largest=False)


def assign(rows: Rows, there: np.ndarray, centroids: np.ndarray, device: str, probe: int) -> tuple[Any, Any]:
    """Find the nearest cells of rows, (n, probe) int32, and the cosine to the centroid of the first: (n,) float32."""
    import torch

    centres = torch.from_numpy(centroids).to(device)
    squares, directions = (centres**2).sum(1), torch.nn.functional.normalize(centres, dim=1)
    probe = min(probe, len(centroids))

    def work(block: slice) -> tuple[np.ndarray, np.ndarray]:
        some = rows.tensor(device, there[block])
        found = nearest(some, centres, squares, probe)[1]
        return found.cpu().numpy().astype(np.int32), (some * directions[found[:, 0]]).sum(1).cpu().numpy()

    cells, central = np.empty((len(there), probe), np.int32), np.empty(len(there), np.float32)
    parts = blocks(0, len(there))
    for part, found in zip(parts, on_threads(work, parts, device), strict=True):
        cells[part], central[part] = found
    return cells, central


@dataclass(frozen=True)
class CellCheck:
    """How rows are spread over cells, and how many near pairs meet in one.

    Attributes
    ----------
    cells : int
        Number of cells.
    median, largest : int
        Rows that live in a cell: the median and the maximum.
    probe : int
        Cells in which a row looks for neighbours.
    recall : dict of float to (int, int)
        For each eps, of the near pairs between 512 rows and the 20 rows most similar to each: how many are compared,
        and how many exist.
    """

    cells: int
    median: int
    largest: int
    probe: int
    recall: dict[float, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cells:
    """Rows in k cells.

    `rows` are numbers of rows, sorted by id; `ours` marks those not of the reference; `cells` are the nearest cells of
    each, its home first, and `central` is its cosine to the home's centroid.
    """

    k: int
    rows: np.ndarray
    ours: np.ndarray
    cells: np.ndarray
    central: np.ndarray

    def __iter__(self) -> Iterator[Cell]:
        """Yield the cells; rows that live in a cell are in the order of `rows`."""
        ours, theirs = np.flatnonzero(self.ours), np.flatnonzero(~self.ours)
        sides = [(self.cells[theirs, 0], theirs), *((self.cells[ours, i], ours) for i in range(self.cells.shape[1]))]
        cell, at = (np.concatenate(side) for side in zip(*sides, strict=True))
        kind = np.repeat([0, 1, 2], [len(theirs), len(ours), len(cell) - len(self.rows)])
        rows = self.rows[at[np.lexsort((at, kind, cell))]]
        ends = np.cumsum(np.bincount(cell, minlength=self.k))
        reference, homes = (np.bincount(cell[kind == which], minlength=self.k) for which in (0, 1))
        for number, start in enumerate(np.r_[0, ends[:-1]].tolist()):
            yield Cell(rows[start : ends[number]], int(reference[number]), int(homes[number]))

    def check(self, take: Take, device: str, eps: Sequence[float]) -> CellCheck:
        """Measure the cells; the query rows are those with the highest ids."""
        a, b, near = most_similar(self.rows[self.ours][-_ASKED:], self.rows, take, device, _K)
        place = np.zeros(self.rows.max() + 1, np.int64)
        place[self.rows] = np.arange(len(self.rows))
        a, b = place[a], place[b]
        looks = (self.cells[a] == self.cells[b, :1]).any(1)
        looks |= (self.cells[b] == self.cells[a, :1]).any(1) & self.ours[b]
        recall = {e: (int(looks[near >= 1 - e].sum()), int((near >= 1 - e).sum())) for e in eps}
        home = np.bincount(self.cells[:, 0], minlength=self.k)
        return CellCheck(self.k, int(np.median(home)), int(home.max()), self.cells.shape[1], recall)
