"""Which rows of a cell are near which: products of matrices in blocks, so that memory grows with no square of anything.

Every product is made on one thread, of rows in the order of their ids, so what it comes to in its last digit depends
neither on how many threads there are nor on partitions; cells are what is shared out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from dask.system import CPU_COUNT

from ..engine.device import full_float32
from .components import Forest, Pairs

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

#: Rounding of a cosine in float32: with eps = 0, rows of the same direction still count as duplicates.
TOLERANCE = 1e-6

#: Rows on a side of a product, at most.
BLOCK = 2048


def on_threads(function: Callable[[T], R], items: Iterable[T], device: str) -> Iterator[R]:
    """Apply a function to items, each on one thread, and yield the results in order; on a card one after another."""
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
    torch.set_num_threads(before)  # threads that start later have as many as were set last


def blocks(start: int, stop: int, size: int = 0) -> list[slice]:
    """Cut a stretch of rows into blocks."""
    return [slice(s, min(s + (size or BLOCK), stop)) for s in range(start, stop, size or BLOCK)]


class Vectors:
    """Unit vectors of rows, as tensors on a device."""

    def __init__(self, unit: Callable[[np.ndarray], np.ndarray], device: str) -> None:
        self._unit, self.device = unit, device

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._unit(rows)).to(self.device)


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
        return blocks(0, self.homes) + (blocks(self.homes, apart) if apart < len(self.rows) else [])


def near_pairs(cell: Cell, left: slice, vectors: Vectors, threshold: float) -> Pairs:
    """Find the pairs of a cosine of at least `threshold` that a block of a cell has, thinned out by a `Forest`."""
    import torch

    forest, live = Forest(len(cell.rows)), left.start < cell.homes
    mine = None if live else vectors[cell.rows[left]]
    for right in blocks(left.start if live else cell.homes + cell.visitors, len(cell.rows)):
        theirs = vectors[cell.rows[right]]
        mine = theirs[: left.stop - left.start] if mine is None else mine
        cosine = mine @ theirs.T
        if right.start < left.stop:  # each pair once, and no row with itself
            cosine.masked_fill_(torch.ones_like(cosine, dtype=torch.bool).tril_(left.start - right.start), -2)
        i, j = torch.nonzero(cosine >= threshold, as_tuple=True)
        forest.add((i + left.start).cpu().numpy(), (j + right.start).cpu().numpy(), cosine[i, j].cpu().numpy())
    a, b, near = forest.pairs()
    return cell.rows[a], cell.rows[b], near


def earlier_pairs(cell: Cell, block: slice, vectors: Vectors, threshold: float) -> Pairs:
    """Find for each row that lives there the most similar one before it, where that cosine is at least `threshold`.

    The reference stands before all others.
    """
    import torch

    order = np.r_[cell.rows[cell.homes + cell.visitors :], cell.rows[: cell.homes]]
    shift = len(order) - cell.homes
    own = slice(block.start + shift, block.stop + shift)
    mine = vectors[order[own]]
    best = torch.full((len(mine),), -2.0, device=mine.device)
    where = torch.zeros(len(mine), dtype=torch.int64, device=mine.device)
    for before in [*blocks(0, own.start), own]:
        cosine = vectors[order[before]] @ mine.T
        if before == own:
            cosine.masked_fill_(torch.ones_like(cosine, dtype=torch.bool).tril_(), -2)
        value, index = cosine.max(dim=0)
        where = torch.where(value > best, index + before.start, where)
        best = torch.maximum(best, value)
    hit = torch.nonzero(best >= threshold)[:, 0]
    return order[own][hit.cpu().numpy()], order[where[hit].cpu().numpy()], best[hit].cpu().numpy()


def cosines(a: np.ndarray, b: np.ndarray, unit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Cosine of row a[i] and row b[i]: (m,) float32."""
    out = np.empty(len(a), np.float32)
    for some in blocks(0, len(a)):
        out[some] = np.einsum("ij,ij->i", unit(a[some]), unit(b[some]))
    return out


def most_similar(asked: np.ndarray, rows: np.ndarray, vectors: Vectors, k: int) -> Pairs:
    """Find the k rows most similar to each row asked, by comparing all."""
    import torch

    queries = vectors[asked]

    def work(block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        cosine = queries @ vectors[rows[block]].T
        cosine[torch.from_numpy(asked[:, None] == rows[block]).to(cosine.device)] = -2
        value, at = cosine.topk(min(k, cosine.shape[1]))
        return value.cpu(), at.cpu() + block.start

    found = on_threads(work, blocks(0, len(rows), 16_384), vectors.device)
    value, at = (torch.cat(side, dim=1) for side in zip(*found, strict=True))
    near, which = value.topk(min(k, len(rows) - 1))
    partner = rows[at.gather(1, which).numpy()]
    return np.repeat(asked, near.shape[1]), partner.ravel(), near.numpy().ravel()
