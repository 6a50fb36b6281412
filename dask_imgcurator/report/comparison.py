"""The self-contained page about two selections: what only one of them keeps, with pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..duplicates.rows import row_ids
from ..engine.pandas import from_arrow
from ..images.thumbnails import make_thumbnails
from ..schema import kind_of
from ..select.settle import Settled
from . import histograms
from . import render as page
from .histograms import KEPT, LINEAR, OTHER, OWN, SCALES, Histogram
from .survey import FIRST, Rank, Wall, floats, read_batches

__all__ = ["Compared", "Side", "compare_sides", "render_comparison"]

_IDENTITY = ("shard", "key", "sample_offset")
_SEED = 0


@dataclass(frozen=True)
class Side:
    """One of two selections.

    Attributes
    ----------
    name : str
        As the user gave it: a folder, or an expression.
    urls : sequence of str
        Files of its score table.
    schema : pyarrow.Schema
        Of the first of them.
    settled : Settled
        What keeps a row of the table.
    made_by : sequence of str
        Steps by which the table itself was selected, as far as it says.
    """

    name: str
    urls: Sequence[str]
    schema: pa.Schema
    settled: Settled = field(default_factory=Settled)
    made_by: Sequence[str] = ()

    def kept(self, columns: set[str], storage_options: Mapping[str, Any]) -> Iterator[pa.Table]:
        """Stream the rows that it keeps, with `columns` and those that tell rows apart."""
        wanted = {*columns, *_IDENTITY, "status", *self.settled.columns}
        for table in read_batches(self.urls, wanted, storage_options):
            yield table.filter(pa.array(self.settled.judge(table).kept))


def _ids(table: pa.Table) -> np.ndarray:
    """Hash what tells rows apart: (n,) uint64, the same for the same row in any table."""
    empty = pa.nulls(table.num_rows, pa.string())
    columns = {
        "shard": (table["shard"] if "shard" in table.column_names else empty).cast(pa.string()),
        "key": (table["key"] if "key" in table.column_names else empty).cast(pa.string()),
    }
    frame = from_arrow(pa.table(columns))
    offsets = table["sample_offset"].to_numpy() if "sample_offset" in table.column_names else 0
    frame["sample_offset"] = np.broadcast_to(np.asarray(offsets, np.int64), len(frame))
    return row_ids(frame)


def _found(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which ids are among others, which are sorted: (n,) bool."""
    if not len(among):
        return np.zeros(len(ids), bool)
    return among[np.minimum(np.searchsorted(among, ids), len(among) - 1)] == ids


@dataclass
class Compared:
    """What two selections have in common, and what not.

    Attributes
    ----------
    both, only_a, only_b : int
        Rows.
    histograms : dict of Histogram
        By column; `Histogram.counts` are rows of B alone, of A alone, and of both.
    walls : dict of Wall
        Rows worth a picture.
    scores : list of str
        Columns that a picture is shown with.
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
            walls[f"best {side}"] = Wall(f"Only in {side}: best", f"The {rank.best}.")
            walls[f"worst {side}"] = Wall(f"Only in {side}: worst", f"The {rank.worst}.")
        walls[f"random {side}"] = Wall(f"Only in {side}: random", f"Drawn at random (seed {_SEED}).")
    walls["both"] = Wall("In both: random", f"Drawn at random (seed {_SEED}).")
    return walls


def compare_sides(a: Side, b: Side, storage_options: Mapping[str, Any] | None = None) -> Compared:
    """Find what two selections have in common, and what not.

    Parameters
    ----------
    a, b : Side
        The selections. Rows are the same if shard, key and sample_offset are; of a row in both, the scores that `a` has
        count.
    storage_options : mapping, optional
        For the fsspec file system of the tables.

    Returns
    -------
    Compared

    Raises
    ------
    OSError, pyarrow.ArrowException
        If a score file cannot be read.

    Notes
    -----
    Each table is streamed twice, without embeddings; in memory are 8 bytes a row that is kept.
    """
    options = storage_options or {}
    ids = [np.sort(np.concatenate([np.zeros(0, np.uint64), *map(_ids, s.kept(set(), options))])) for s in (a, b)]
    numbers = [f.name for s in (a, b) for f in s.schema if kind_of(f.type) == "number"]
    names = [*FIRST, *(n for n in numbers if n.endswith("_score")), "width", "height"]
    names += [n for s in (a, b) for n in sorted(s.settled.columns)]
    shown = [n for n in dict.fromkeys(names) if n in numbers]
    out = Compared(histograms={n: Histogram(SCALES.get(n, LINEAR)) for n in shown})
    out.scores = [n for n in shown if n not in ("width", "height")]
    rank = Rank(out.scores[0]) if out.scores else None
    out.walls = _walls(rank)
    random = np.random.default_rng(_SEED)
    wanted = {*page.ROW, *shown}
    for table in a.kept(wanted, options):
        both = _found(_ids(table), ids[1])
        out.both, out.only_a = out.both + int(both.sum()), out.only_a + int((~both).sum())
        _take(out, table, np.where(both, KEPT, OWN), rank, random)
    for table in b.kept(wanted, options):
        alone = ~_found(_ids(table), ids[0])
        out.only_b += int(alone.sum())
        _take(out, table.filter(pa.array(alone)), np.full(alone.sum(), OTHER), rank, random)
    return out


def _take(out: Compared, table: pa.Table, fates: np.ndarray, rank: Rank | None, random: np.random.Generator) -> None:
    def row(i: int) -> dict[str, Any]:
        names = [c for c in (*page.ROW, *out.scores) if c in table.column_names]
        return {c: table[c][i].as_py() for c in names}

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


# --- the page -------------------------------------------------------------------------------------


def _sides(a: Side, b: Side, found: Compared) -> str:
    union = found.both + found.only_a + found.only_b
    rows = []
    for letter, side, alone in (("A", a, found.only_a), ("B", b, found.only_b)):
        n = found.both + alone
        words = "; ".join(f"<code>{page.text(s)}</code>" for s in side.made_by)
        name = f"{letter}: <code>{page.url(side.name, 500)}</code>{f' (selected by {words})' if words else ''}"
        rows.append((name, f"{n:,}", f"{alone:,}", page.share(alone, n) + page.bar(alone, n)))
    counts = {"in both": found.both, "only in A": found.only_a, "only in B": found.only_b}
    cards = "".join(
        f"<div><dt>{name}</dt><dd>{n:,} <small>{page.share(n, union)}</small></dd></div>" for name, n in counts.items()
    )
    head = ("Selection", "Rows", "Only in it", "Share of it")
    return f'<dl class="cards">{cards}</dl>{page.table("The two selections", head, rows)}'


def render_comparison(
    a: Side, b: Side, found: Compared, source_options: Mapping[str, Any] | None = None, notes: Sequence[str] = ()
) -> str:
    """Make the page.

    Parameters
    ----------
    a, b : Side
        The selections.
    found : Compared
        What they have in common, and what not.
    source_options : mapping, optional
        For the fsspec file systems of the source shards, from which thumbnails are made.
    notes : sequence of str
        What stands first.

    Returns
    -------
    str
        HTML: one file that loads nothing from outside, of a few MB at most, however many rows there are.
    """
    rows = (row for wall in found.walls.values() for _, row in wall.rows)
    images = make_thumbnails(rows, storage_options=source_options)
    names = ("in both", "only in A", "only in B")
    legend = "".join(f'<span class="{c}"></span> {n} ' for c, n in zip(("in", "own", "out"), names, strict=True))
    figures = [histograms.figure(name, h, names=names) for name, h in found.histograms.items()]
    walls = [
        page.wall([(row, "") for _, row in wall.rows], images, found.scores, wall.title, wall.note)
        for wall in found.walls.values()
        if wall.rows
    ]
    veils = f"<p>{page.veils_note('nsfw_score' in found.histograms)}</p>\n"
    return page.document(
        "Comparison of two selections",
        " and ".join(re.sub(r"\?.*", "", side.name).rstrip("/").rpartition("/")[2] for side in (a, b)),
        notes,
        [
            page.section("Counts", _sides(a, b, found)),
            page.section("Scores", f'<p class="legend">{legend}</p><div class="figures">{"".join(figures)}</div>\n'),
            page.section("Pictures", veils + "".join(walls) if walls else "<p>Neither keeps an image.</p>\n"),
        ],
    )
