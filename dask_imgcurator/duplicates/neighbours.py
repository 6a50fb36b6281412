"""Which rows of a cell are near which: products of matrices in blocks, so that memory grows with no square of anything.

Every product is made on one thread, of rows in the order of their ids, so what it comes to in its last digit depends
neither on how many threads there are nor on partitions; cells are what is shared out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from dask.system import CPU_COUNT

from ..engine.device import full_float32
from .components import NO_PAIRS, Forest, Pairs, joined, strongest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

#: Rounding of a cosine in float32: with eps = 0, rows of the same direction still count as duplicates.
TOLERANCE = 1e-6

#: Rows on a side of a product, at most.
BLOCK = 2048

#: Gives the unit vectors of rows, on the device that computes.
Take: TypeAlias = "Callable[[np.ndarray], torch.Tensor]"


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


@dataclass(frozen=True)
class Cell:
    """Numbers of the rows that meet in a cell: first the reference's, then those that live there, then visitors.

    Two of them are compared where at least one lives there and at least one is not of the reference, or one is of the
    reference and the other visits. The rows that live there stand in the order in which they are compared.
    """

    rows: np.ndarray
    reference: int
    homes: int

    def tasks(self) -> Iterator[tuple[Cell, slice, list[slice]]]:
        """Blocks of rows, each with the blocks of rows that it is compared with."""
        apart, n = self.reference + self.homes, len(self.rows)
        for left in blocks(self.reference, apart):
            yield self, left, blocks(0, self.reference) + blocks(left.start, n)
        for left in blocks(apart, n) if self.reference else []:
            yield self, left, blocks(0, self.reference)


def near_pairs(
    cell: Cell, left: slice, right: Sequence[slice], take: Take, threshold: float, sequential: bool
) -> Pairs:
    """Find the pairs of a cosine of at least `threshold` that a block of a cell has.

    They are thinned out by a `Forest`; or, if `sequential`, to the most similar row b before each row a.
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
    """Find the k rows most similar to each row asked, by comparing all."""
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
