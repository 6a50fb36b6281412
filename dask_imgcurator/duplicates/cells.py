"""k-means cells: rows that may be near each other meet in one, and how well that works is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engine.backend import Backend
from .neighbours import Cell, near_all, nearest, on_threads
from .rows import Vectors

#: Up to so many rows all pairs are compared: it takes seconds, and its recall is 1.
BRUTE_FORCE_ROWS = 20_000

_SAMPLE_PER_CELL = 32  # rows that k-means sees for each cell
_BLOCK = 4096
_ASKED = 512  # rows that are compared with all others, to estimate recall


def default_cells(n: int) -> int:
    """Number of k-means cells for n rows: 2 √n, which balances assigning (n k) and comparing (3 n²/k)."""
    return 1 if n <= BRUTE_FORCE_ROWS else round(2 * math.sqrt(n))


def train(rows: np.ndarray, vectors: Vectors, backend: Backend, k: int, seed: int) -> np.ndarray:
    """Return the centroids of k cells, (k, d) float32; of rows sorted by id the first are a random sample."""
    import torch

    values = vectors.take(rows[: max(_SAMPLE_PER_CELL * k, BRUTE_FORCE_ROWS)])
    if k == 1:
        return values.mean(0, keepdims=True)
    return backend.kmeans(torch.from_numpy(values).to(backend.device), k, seed)


def assign(
    rows: np.ndarray, vectors: Vectors, centroids: np.ndarray, device: str, probe: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest cells of rows, (n, probe) int32, and the cosine to the centroid of the first: (n,) float32."""
    import torch

    centres = torch.from_numpy(centroids).to(device)
    directions = torch.nn.functional.normalize(centres, dim=1)

    def work(start: int) -> tuple[np.ndarray, np.ndarray]:
        some = torch.from_numpy(vectors.take(rows[start : start + _BLOCK])).to(device)
        found = nearest(some, centres, probe)
        central = (some * directions[found[:, 0]]).sum(1)
        return found.cpu().numpy().astype(np.int32), central.cpu().numpy()

    starts = range(0, len(rows), _BLOCK)
    found, central = [np.empty((0, min(probe, len(centroids))), np.int32)], [np.empty(0, np.float32)]
    for cells, near in on_threads(work, starts, device):
        found.append(cells)
        central.append(near)
    return np.concatenate(found), np.concatenate(central)


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
        For each eps, of the pairs that 512 rows have among all rows, how many are compared, and how many there are.
    """

    cells: int
    median: int
    largest: int
    probe: int
    recall: dict[float, tuple[int, int]] = field(default_factory=dict)

    def share(self, eps: float) -> float | None:
        """Estimate of recall at an eps; None where the 512 rows have no near pair."""
        found, pairs = self.recall[eps]
        return found / pairs if pairs else None


class Cells:
    """Rows in cells.

    `rows` are numbers of rows sorted by id, `ours` says which of them are not of the reference, `cells` are the nearest
    cells of each, its home first, and `central` its cosine to the centroid there.
    """

    def __init__(self, k: int, rows: np.ndarray, ours: np.ndarray, cells: np.ndarray, central: np.ndarray) -> None:
        self.k, self.rows, self.ours, self.cells, self.central = k, rows, ours, cells, central

    def __iter__(self) -> Iterator[Cell]:
        """Give out the cells in which anyone lives; those who live there in the order of `rows`."""
        probe = self.cells.shape[1]
        home, visited = self.cells[:, 0], self.cells[self.ours, 1:].ravel()
        ours = np.flatnonzero(self.ours)
        cell = np.concatenate([home[ours], visited, home[~self.ours]])
        at = np.concatenate([ours, np.repeat(ours, probe - 1), np.flatnonzero(~self.ours)])
        kind = np.repeat([0, 1, 2], [len(ours), len(visited), len(self.rows) - len(ours)])
        order = np.lexsort((at, kind, cell))
        ends = np.cumsum(np.bincount(cell, minlength=self.k))
        sizes = [np.bincount(cell[kind == which], minlength=self.k) for which in (0, 1)]
        for number, end in enumerate(ends.tolist()):
            start = ends[number - 1] if number else 0
            yield Cell(self.rows[at[order[start:end]]], int(sizes[0][number]), int(sizes[1][number]))

    def sorted_by(self, position: np.ndarray, central: str | None) -> Cells:
        """Let those who live in a cell stand in another order: by `position`, if asked by `central` before it."""
        sign = {"hard": 1.0, "easy": -1.0, None: 0.0}[central]
        order = np.lexsort((position[self.rows], sign * self.central))
        return Cells(self.k, self.rows[order], self.ours[order], self.cells[order], self.central[order])

    def check(self, vectors: Vectors, eps: Sequence[float], device: str) -> CellCheck:
        """Measure the cells; the rows that are asked are those with the highest ids."""
        home = np.bincount(self.cells[:, 0], minlength=self.k)
        place = np.full(len(vectors.slots), -1)
        place[self.rows] = np.arange(len(self.rows))
        a, b, near = near_all(self.rows[self.ours][-_ASKED:], self.rows, vectors.take, device, 1 - max(eps))
        a, b = place[a], place[b]
        looks = (self.cells[a] == self.cells[b, :1]).any(1)
        looks |= (self.cells[b] == self.cells[a, :1]).any(1) & self.ours[b]
        recall = {e: (int(looks[near >= 1 - e].sum()), int((near >= 1 - e).sum())) for e in eps}
        return CellCheck(self.k, int(np.median(home)), int(home.max()), self.cells.shape[1], recall)
