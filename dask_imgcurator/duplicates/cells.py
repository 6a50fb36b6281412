"""k-means cells: rows that may be near each other meet in one, and how well that works is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.backend import Backend
from .neighbours import Cell, Take, blocks, most_similar, on_threads
from .rows import Rows

#: Up to so many rows all pairs are compared: it takes seconds, and its recall is 1.
BRUTE_FORCE_ROWS = 20_000

_SAMPLE_PER_CELL = 32  # rows that k-means sees for each cell
_ASKED, _K = 512, 20  # rows that are compared with all others to estimate recall, and how many next to them count


def default_cells(n: int) -> int:
    """Number of k-means cells for n rows: 2 √n, which balances assigning (n k) and comparing (3 n²/k)."""
    return 1 if n <= BRUTE_FORCE_ROWS else round(2 * math.sqrt(n))


def train(rows: Rows, there: np.ndarray, backend: Backend, n_cells: int | None, seed: int) -> np.ndarray:
    """Return the centroids of cells, (k, d) float32, of rows sorted by id, of which the first are a random sample."""
    import torch

    k = max(1, min(n_cells or default_cells(len(there)), len(there)))
    values = rows.unit(there[: max(_SAMPLE_PER_CELL * k, BRUTE_FORCE_ROWS)])
    if k == 1:
        return values.mean(0, keepdims=True) if len(values) else np.zeros((1, rows.width), np.float32)
    return backend.kmeans(torch.from_numpy(values).to(backend.device), k, seed)


def assign(rows: Rows, there: np.ndarray, centroids: np.ndarray, device: str, probe: int) -> tuple[Any, Any]:
    """Find the nearest cells of rows, (n, probe) int32, and the cosine to the centroid of the first: (n,) float32."""
    import torch

    centres = torch.from_numpy(centroids).to(device)
    squares, directions = (centres**2).sum(1), torch.nn.functional.normalize(centres, dim=1)
    probe = min(probe, len(centroids))

    def work(block: slice) -> tuple[np.ndarray, np.ndarray]:
        some = rows.tensor(device, there[block])
        # Squares of the distances, less that of the vector, which is the same for all cells.
        found = torch.addmm(squares, some, centres.T, alpha=-2).topk(probe, largest=False).indices
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
        Rows that live in a cell: the median, and the most.
    probe : int
        Cells in which a row looks for neighbours.
    recall : dict of float to (int, int)
        For each eps, of the near pairs among 512 rows and the 20 rows most similar to each: how many are compared, and
        how many there are.
    """

    cells: int
    median: int
    largest: int
    probe: int
    recall: dict[float, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cells:
    """Rows in k cells.

    `rows` are numbers of rows, sorted by id; `ours` says which are not of the reference; `cells` are the nearest of
    each, its home first, and `central` its cosine to the centroid there.
    """

    k: int
    rows: np.ndarray
    ours: np.ndarray
    cells: np.ndarray
    central: np.ndarray

    def __iter__(self) -> Iterator[Cell]:
        """Give out the cells; those who live there in the order of `rows`."""
        ours, theirs = np.flatnonzero(self.ours), np.flatnonzero(~self.ours)
        sides = [(self.cells[theirs, 0], theirs), *((self.cells[ours, i], ours) for i in range(self.cells.shape[1]))]
        cell, at = (np.concatenate(side) for side in zip(*sides, strict=True))
        kind = np.repeat([0, 1, 2], [len(theirs), len(ours), len(cell) - len(self.rows)])
        rows = self.rows[at[np.lexsort((at, kind, cell))]]
        ends = np.cumsum(np.bincount(cell, minlength=self.k))
        reference, homes = (np.bincount(cell[kind == which], minlength=self.k) for which in (0, 1))
        for number, start in enumerate(np.r_[0, ends[:-1]].tolist()):
            yield Cell(rows[start : ends[number]], int(reference[number]), int(homes[number]))

    def ordered(self, order: np.ndarray) -> Cells:
        """Put the rows into another order."""
        return Cells(self.k, self.rows[order], self.ours[order], self.cells[order], self.central[order])

    def check(self, take: Take, device: str, eps: Sequence[float]) -> CellCheck:
        """Measure the cells; the rows that are asked are those with the highest ids."""
        a, b, near = most_similar(self.rows[self.ours][-_ASKED:], self.rows, take, device, _K)
        place = np.zeros(self.rows.max() + 1, np.int64)
        place[self.rows] = np.arange(len(self.rows))
        a, b = place[a], place[b]
        looks = (self.cells[a] == self.cells[b, :1]).any(1)
        looks |= (self.cells[b] == self.cells[a, :1]).any(1) & self.ours[b]
        recall = {e: (int(looks[near >= 1 - e].sum()), int((near >= 1 - e).sum())) for e in eps}
        home = np.bincount(self.cells[:, 0], minlength=self.k)
        return CellCheck(self.k, int(np.median(home)), int(home.max()), self.cells.shape[1], recall)
