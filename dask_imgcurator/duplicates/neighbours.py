"""Which rows of a cell are near which: products of matrices in blocks, so that memory grows with no square of anything.

Every product is made on one thread, of rows in the order of their ids, so what it comes to in its last digit depends
neither on how many threads there are nor on partitions; cells are what is shared out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from dask.system import CPU_COUNT

from ..engine.device import full_float32
from .components import NO_PAIRS, Forest, Pairs

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

#: Rounding of a cosine in float32: with eps = 0, rows of the same direction still count as duplicates.
TOLERANCE = 1e-6

#: Rows on a side of a product, at most.
BLOCK = 2048

#: Gives the vectors of rows, of unit length.
Take = Callable[[np.ndarray], np.ndarray]


def on_threads(function: Callable[[T], R], items: Iterable[T], device: str) -> Iterator[R]:
    """Apply a function to items, each on one thread, and yield the results in order; on a card one after another."""
    import torch

    if device != "cpu":
        with full_float32(True):
            yield from map(function, items)
        return
    before, running = torch.get_num_threads(), deque[Future[R]]()
    with ThreadPoolExecutor(CPU_COUNT, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 4 * CPU_COUNT:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
    torch.set_num_threads(before)  # threads that start later have as many as were set last


def blocks(start: int, stop: int) -> list[slice]:
    """Cut a stretch of rows into blocks."""
    return [slice(s, min(s + BLOCK, stop)) for s in range(start, stop, BLOCK)]


def nearest(vectors: torch.Tensor, centroids: torch.Tensor, probe: int) -> torch.Tensor:
    """Return the nearest cells of vectors, the nearest first: (n, probe) int64."""
    import torch

    # Squares of the distances, less that of the vector, which is the same for all cells.
    distances = torch.addmm((centroids**2).sum(1), vectors, centroids.T, alpha=-2)
    return distances.topk(min(probe, len(centroids)), largest=False).indices


# --- a cell ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Numbers of the rows that meet in a cell: first those that live there, then visitors, then the reference's.

    Two of them are compared where at least one lives there and at least one is not of the reference. The rows that live
    there stand in the order in which they are compared.
    """

    rows: np.ndarray
    homes: int
    visitors: int

    def left(self) -> list[slice]:
        """Blocks of rows whose partners are looked for: those that live there, and visitors among the reference."""
        apart = self.homes + self.visitors
        visiting = blocks(self.homes, apart) if apart < len(self.rows) else []
        return blocks(0, self.homes) + visiting


def near_pairs(cell: Cell, left: slice, take: Take, device: str, threshold: float) -> Pairs:
    """Find the pairs of a cosine of at least `threshold` that a block of a cell has, thinned out by a `Forest`."""
    import torch

    def tensor(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(take(rows)).to(device)

    forest = Forest(len(cell.rows))
    beside = left.start < cell.homes
    mine = None if beside else tensor(cell.rows[left])
    for right in blocks(left.start if beside else cell.homes + cell.visitors, len(cell.rows)):
        theirs = tensor(cell.rows[right])
        mine = theirs[: left.stop - left.start] if mine is None else mine
        cosine = mine @ theirs.T
        if right.start < left.stop:  # each pair once, and no row with itself
            cosine.masked_fill_(torch.ones_like(cosine, dtype=torch.bool).tril_(left.start - right.start), -2)
        i, j = torch.nonzero(cosine >= threshold, as_tuple=True)
        forest.add((i + left.start).cpu().numpy(), (j + right.start).cpu().numpy(), cosine[i, j].cpu().numpy())
    a, b, near = forest.pairs()
    return cell.rows[a], cell.rows[b], near


def earlier_pairs(cell: Cell, block: slice, take: Take, device: str, threshold: float) -> Pairs:
    """Find for each row of a block the most similar one before it, where that cosine is at least `threshold`.

    The reference stands before all others.
    """
    import torch

    order = np.r_[cell.rows[cell.homes + cell.visitors :], cell.rows[: cell.homes]]
    shift = len(order) - cell.homes
    own = slice(block.start + shift, block.stop + shift)
    mine = torch.from_numpy(take(order[own])).to(device)
    best = torch.full((len(mine),), -2.0, device=device)
    where = torch.zeros(len(mine), dtype=torch.int64, device=device)
    for before in [*blocks(0, own.start), own]:
        cosine = torch.from_numpy(take(order[before])).to(device) @ mine.T
        if before == own:
            cosine.masked_fill_(torch.ones_like(cosine, dtype=torch.bool).tril_(), -2)
        value, index = cosine.max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        where = torch.where(better, index + before.start, where)
    hit = torch.nonzero(best >= threshold)[:, 0]
    return order[own][hit.cpu().numpy()], order[where[hit].cpu().numpy()], best[hit].cpu().numpy()


def compare_cells(
    cells: Iterable[Cell],
    compare: Callable[[Cell, slice, Take, str, float], Pairs],
    take: Take,
    device: str,
    threshold: float,
) -> Iterator[Pairs]:
    """Yield the pairs of all cells, a block at a time."""
    earlier = compare is earlier_pairs
    tasks = ((cell, left) for cell in cells for left in (blocks(0, cell.homes) if earlier else cell.left()))

    def work(task: tuple[Cell, slice]) -> Pairs:
        return compare(*task, take, device, threshold) if len(task[0].rows) > 1 else NO_PAIRS

    return on_threads(work, tasks, device)


def cosines(a: np.ndarray, b: np.ndarray, take: Take) -> np.ndarray:
    """Cosine of row a[i] and row b[i]: (m,) float32."""
    out = np.empty(len(a), np.float32)
    for some in blocks(0, len(a)):
        out[some] = np.einsum("ij,ij->i", take(a[some]), take(b[some]))
    return out


def near_all(asked: np.ndarray, rows: np.ndarray, take: Take, device: str, threshold: float) -> Pairs:
    """Find all pairs of a row asked and another, of a cosine of at least `threshold`."""
    import torch

    queries = torch.from_numpy(take(asked)).to(device)

    def work(block: slice) -> Any:
        cosine = queries @ torch.from_numpy(take(rows[block])).to(device).T
        i, j = torch.nonzero(cosine >= threshold, as_tuple=True)
        return asked[i.cpu().numpy()], rows[block][j.cpu().numpy()], cosine[i, j].cpu().numpy()

    found = [NO_PAIRS, *on_threads(work, blocks(0, len(rows)), device)]
    a, b, near = (np.concatenate(parts) for parts in zip(*found, strict=True))
    other = a != b
    return a[other], b[other], near[other]
