"""The page comparing two selections: what only one of them keeps, with pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..duplicates.rows import is_in, row_ids
from ..images.thumbnails import PAGE_SIDE, make_thumbnails
from ..select.settle import Settled
from ..steps.score_table import ScoreTable
from .histograms import KEPT, OTHER, OWN, Figure, Histogram, Kind
from .render import ROW, page
from .survey import FIRST, SIZES, Rank, Wall, floats, histograms_of, numbers_of, row_of

_IDENTITY = ("shard", "key", "sample_offset")
_SEED = 0
_KINDS = (Kind("in", KEPT, "in both"), Kind("own", OWN, "only in A"), Kind("out", OTHER, "only in B"))


@dataclass(frozen=True)
class Side:
    """One of two selections, under the user's name for it: a folder or an expression."""

    name: str
    table: ScoreTable
    settled: Settled = field(default_factory=Settled)
    made_by: Sequence[str] = ()  # steps that selected the table itself, if recorded

    def kept(self, columns: set[str]) -> Iterator[pa.Table]:
        """Stream its rows, with `columns` and those that identify rows."""
        wanted = {*columns, *_IDENTITY, "status", *self.settled.columns}
        for batch in self.table.batches(wanted):
            yield batch.filter(pa.array(self.settled.judge(batch).kept))


@dataclass
class Compared:
    """The comparison of two selections.

    Attributes
    ----------
    both, only_a, only_b : int
        Numbers of rows.
    histograms : dict of Histogram
        By column; `Histogram.counts` are rows only in B, only in A, and in both.
    walls : dict of Wall
        Rows to show as pictures.
    scores : list of str
        Columns to show with each picture.
    """

    both: int = 0
    only_a: int = 0
    only_b: int = 0
    histograms: dict[str, Histogram] = field(default_factory=dict)
    walls: dict[str, Wall] = field(default_factory=dict)
    scores: list[str] = field(default_factory=list)


def _walls(rank: Rank | None) -> dict[str, Wall]:
    walls = {}
    for side in "AB":
        if rank is not None:
            best, worst = rank.ends()
            walls[f"best {side}"] = Wall(f"Only in {side}: best", f"The {best}.")
            walls[f"worst {side}"] = Wall(f"Only in {side}: worst", f"The {worst}.")
        walls[f"random {side}"] = Wall(f"Only in {side}: random", f"Drawn at random (seed {_SEED}).")
    walls["both"] = Wall("In both: random", f"Drawn at random (seed {_SEED}).")
    return walls


def compare_sides(a: Side, b: Side) -> Compared:
    """Compare two selections; a row in both counts with the scores of `a`."""
    # Each table is streamed twice, without embeddings; memory holds 8 bytes per kept row.
    ids = [np.sort(np.concatenate([np.zeros(0, np.uint64), *map(row_ids, s.kept(set()))])) for s in (a, b)]
    numbers = [name for s in (a, b) for name in numbers_of(s.table.schema)]
    names = [*FIRST, *(n for n in numbers if n.endswith("_score")), *SIZES]
    names += [n for s in (a, b) for n in sorted(s.settled.columns)]
    out = Compared(histograms=histograms_of(names, numbers))
    out.scores = [n for n in out.histograms if n not in SIZES]
    rank = Rank(out.scores[0]) if out.scores else None
    out.walls = _walls(rank)
    random = np.random.default_rng(_SEED)
    wanted = {*ROW, *out.histograms}
    for table in a.kept(wanted):
        both = is_in(row_ids(table), ids[1])
        out.both, out.only_a = out.both + int(both.sum()), out.only_a + int((~both).sum())
        _take(out, table, np.where(both, KEPT, OWN), rank, random)
    for table in b.kept(wanted):
        alone = ~is_in(row_ids(table), ids[0])
        out.only_b += int(alone.sum())
        _take(out, table.filter(pa.array(alone)), np.full(alone.sum(), OTHER), rank, random)
    return out


def _take(out: Compared, table: pa.Table, fates: np.ndarray, rank: Rank | None, random: np.random.Generator) -> None:
    def row(i: int) -> dict[str, Any]:
        return row_of(table, i, out.scores)

    for name, histogram in out.histograms.items():
        histogram.add(floats(table, name), fates)
    chance = random.random(table.num_rows)
    for side, fate in (("A", OWN), ("B", OTHER)):
        if rank is not None:
            order = rank.order(floats(table, rank.column))
            out.walls[f"best {side}"].offer(order, fates == fate, row)
            out.walls[f"worst {side}"].offer(-order, fates == fate, row)
        out.walls[f"random {side}"].offer(chance, fates == fate, row)
    out.walls["both"].offer(chance, fates == KEPT, row)


def render_comparison(
    a: Side, b: Side, found: Compared, source_options: Mapping[str, Any] | None = None, notes: Sequence[str] = ()
) -> str:
    """Make the page; `source_options` are for the source shards, which thumbnails are made from."""
    walls = [wall for wall in found.walls.values() if wall.rows]
    return page(
        "comparison.html.j2",
        "Comparison of two selections",
        " and ".join(re.sub(r"\?.*", "", side.name).rstrip("/").rpartition("/")[2] for side in (a, b)),
        notes,
        a=a,
        b=b,
        found=found,
        figures=[Figure(name, h, kinds=_KINDS, cuts=False) for name, h in found.histograms.items()],
        walls=walls,
        images=make_thumbnails((row for w in walls for row in w.shown), side=PAGE_SIDE, storage_options=source_options),
    )
