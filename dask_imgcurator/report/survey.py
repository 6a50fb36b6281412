"""One pass over a score table for the pages that show it: counts, histograms, and the few rows worth a picture.

Score files are streamed without their embeddings; what is kept of them is bounded, however many rows there are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..results import Counts
from ..schema import kind_of
from ..select.ranks import ValueOrder
from ..select.settle import Bound, Condition, Settled, counts_of
from ..select.where import Where
from ..storage import files
from . import render as page
from .histograms import KEPT, LINEAR, LOWER_IS_BETTER, OTHER, OWN, SCALES, Histogram, Mark

__all__ = ["FIRST", "Rank", "Survey", "Wall", "floats", "read_batches", "survey"]

_BATCH = 16_384  # rows of a score file in memory at a time
_WALL = 12  # pictures of a wall
_EDGE = 6  # of a wall beside a cut
_EDGES = 6  # cuts with such walls
_EXAMPLES = 5  # rows shown of each kind of error
_SEED = 0

#: Scores that come before others; by the first there is, images are ranked.
FIRST = ("aesthetic_score", "clip_score", "nsfw_score")

_MEASURES = ("brightness", "contrast", "blur", "entropy", "colourfulness")
_SIZES = ("width", "height")
_NAME = r"(?:`(?P<quoted>[^`]+)`|(?P<name>[^\W\d]\w*))"
_LITERAL = r"(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_BOUNDS = (
    re.compile(rf"{_NAME} ?(?P<sign>[<>])=? ?{_LITERAL}"),
    re.compile(rf"{_LITERAL} ?(?P<turned>[<>])=? ?{_NAME}"),
)


# --- conditions that are bounds -------------------------------------------------------------------


def _mark(condition: Condition, part: int) -> Mark | None:
    """The bound that a condition is, if it is one: ``column >= number``, or where a rank came to lie."""
    order = condition.order
    if isinstance(condition.step, Where):
        for pattern in _BOUNDS:
            if found := pattern.fullmatch(condition.text):
                below = (found["sign"] == "<") if "sign" in found.groupdict() else found["turned"] == ">"
                return Mark(found["quoted"] or found["name"], float(found["number"]), condition.text, below, part)
    elif isinstance(condition.bound, Bound) and isinstance(order, ValueOrder) and condition.bound.last >= 0:
        bound, below = float(order.value(condition.bound.last)), not order.largest
        text = f"{condition.text} ({'<=' if below else '>='} {page.number(bound, 5)})"
        return Mark(order.column, bound, text, below, part)
    return None


# --- rows worth a picture -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """The column by which images are the best and the worst.

    Attributes
    ----------
    column : str
        Name of the column.
    """

    column: str

    @property
    def best(self) -> str:
        """What the best have, in words."""
        return f"{'lowest' if self.column in LOWER_IS_BETTER else 'highest'} {self.column}"

    @property
    def worst(self) -> str:
        """What the worst have, in words."""
        return f"{'highest' if self.column in LOWER_IS_BETTER else 'lowest'} {self.column}"

    def order(self, values: np.ndarray) -> np.ndarray:
        """Values of the column, (n,) float64, so that the smallest is the best."""
        return values if self.column in LOWER_IS_BETTER else -values


@dataclass
class Wall:
    """The rows with the smallest order values.

    Attributes
    ----------
    title, note : str
        What they are.
    limit : int
        How many, at most.
    rows : list of (float, dict)
        Order value and row, in order.
    """

    title: str
    note: str
    limit: int = _WALL
    rows: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def offer(self, order: np.ndarray, among: np.ndarray, row: Callable[[int], dict[str, Any]]) -> None:
        """Take those of a batch in that belong on the wall: (n,) order values, (n,) bool, and a way to a row."""
        worst = self.rows[-1][0] if len(self.rows) == self.limit else np.inf
        with np.errstate(invalid="ignore"):
            found = np.flatnonzero(among & np.isfinite(order) & (order < worst))
        best = found[np.argsort(order[found], kind="stable")[: self.limit]]
        self.rows += [(float(order[i]), row(int(i))) for i in best]
        self.rows = sorted(self.rows, key=lambda r: r[0])[: self.limit]


# --- the pass -------------------------------------------------------------------------------------


class Survey:
    """Everything that a page takes from a score table, besides the pictures.

    Parameters
    ----------
    schema : pyarrow.Schema
        Of the score files.
    settled : Settled
        What keeps a row.

    Attributes
    ----------
    counts : Counts
        Rows in all, by status, readable, kept, and what each condition keeps.
    failed : Counter
        Readable rows by the set of conditions that they fail, as bits: bit i for condition i.
    marks : list of Mark
        Conditions that are bounds on a column.
    histograms : dict of Histogram
        By column.
    scores : list of str
        Columns that a picture is shown with.
    walls : dict of Wall
        Rows worth a picture.
    examples : dict of list
        The first failed rows of each status.
    """

    def __init__(self, schema: pa.Schema, settled: Settled) -> None:
        self.settled = settled
        self.conditions = list(settled.conditions)
        numbers = {f.name for f in schema if kind_of(f.type) == "number"}
        marks = [_mark(condition, i) for i, condition in enumerate(self.conditions)]
        self.marks = [m for m in marks if m is not None and m.column in numbers]
        scores = [*FIRST, *(n for n in schema.names if n.endswith("_score"))]
        names = [*scores, *_MEASURES, *_SIZES, *(m.column for m in self.marks)]
        self.histograms = {n: Histogram(SCALES.get(n, LINEAR)) for n in dict.fromkeys(names) if n in numbers}
        shown = {*scores, *(m.column for m in self.marks)} - set(_SIZES)
        self.scores = [n for n in self.histograms if n in shown]
        self.rank = Rank(self.scores[0]) if self.scores else None
        self.wanted = {*page.ROW, "sample_offset", *self.histograms}
        self.wanted |= {"status", *settled.columns}
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.counts = Counts()
        self.failed: Counter[int] = Counter()
        self._random = np.random.default_rng(_SEED)
        self.walls = self._empty_walls()

    def _empty_walls(self) -> dict[str, Wall]:
        walls = {}
        if self.rank is not None:
            walls["best"] = Wall("Best kept", f"The {self.rank.best} among the kept.")
        for mark in self.marks[:_EDGES]:
            inside = f"Closest to the cut {mark.text}, among the kept."
            outside = f"Closest to the cut {mark.text}; they meet every other condition."
            walls[f"inside {mark.part}"] = Wall(f"Just kept by {mark.text}", inside, _EDGE)
            walls[f"outside {mark.part}"] = Wall(f"Just dropped by {mark.text}", outside, _EDGE)
        if self.rank is not None:
            walls["worst"] = Wall("Worst", f"The {self.rank.worst} of all readable images.")
        walls["kept"] = Wall("Random kept", f"Drawn at random among the kept (seed {_SEED}).")
        dropped = f"Drawn at random among the readable images not kept (seed {_SEED})."
        walls["dropped"] = Wall("Random dropped", dropped)
        return walls

    def add(self, table: pa.Table) -> None:
        """Take in some rows of a score file."""
        n = table.num_rows
        verdict = self.settled.judge(table)
        ok, masks, kept_rows = verdict.ok, verdict.passed, verdict.kept
        self.counts = Counts.sum([self.counts, counts_of(self.settled, verdict, _statuses(table))])
        self._note_failures(ok, masks)
        values = {name: floats(table, name) for name in self.histograms}
        for name, histogram in self.histograms.items():
            own = [m.part for m in self.marks if m.column == name]
            others = np.logical_and.reduce([ok, *(m for i, m in enumerate(masks) if i not in own)])
            histogram.add(values[name], np.where(kept_rows, KEPT, np.where(others, OWN, OTHER)))

        def row(i: int) -> dict[str, Any]:
            names = [c for c in (*page.ROW, "sample_offset", *self.scores) if c in table.column_names]
            return {**{c: table[c][i].as_py() for c in names}, "kept": bool(kept_rows[i])}

        if self.rank is not None:
            order = self.rank.order(values[self.rank.column])
            self.walls["best"].offer(order, kept_rows, row)
            self.walls["worst"].offer(-order, ok, row)
        for mark in self.marks[:_EDGES]:
            away = np.abs(values[mark.column] - mark.number)
            others = np.logical_and.reduce([ok, *(m for i, m in enumerate(masks) if i != mark.part)])
            self.walls[f"inside {mark.part}"].offer(away, kept_rows, row)
            self.walls[f"outside {mark.part}"].offer(away, others & ~kept_rows, row)
        chance = self._random.random(n)
        self.walls["kept"].offer(chance, kept_rows, row)
        self.walls["dropped"].offer(chance, ok & ~kept_rows, row)
        for i in np.flatnonzero(~ok):
            shown = self.examples.setdefault(str(table["status"][int(i)]), [])
            if len(shown) < _EXAMPLES:
                shown.append(row(int(i)))

    def _note_failures(self, ok: np.ndarray, masks: Sequence[np.ndarray]) -> None:
        """Count the readable rows by what they fail."""
        bits = np.zeros(len(ok), np.int64)
        for i, mask in enumerate(masks):
            bits |= (~mask).astype(np.int64) << min(i, 62)  # those beyond the 63rd are told as one
        found, counts = np.unique(bits[ok], return_counts=True)
        self.failed.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _statuses(table: pa.Table) -> dict[str, int]:
    if "status" not in table.column_names:
        return {"ok": table.num_rows}
    return {str(item["values"]): item["counts"] for item in pc.value_counts(table["status"]).to_pylist()}


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A column as (n,) float64, NaN where it has no value; all NaN where the table lacks it."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table[name].cast(pa.float64(), safe=False).to_numpy(), np.float64)


def read_batches(
    urls: Sequence[str], columns: set[str], storage_options: Mapping[str, Any] | None = None
) -> Iterator[pa.Table]:
    """Stream score files.

    Parameters
    ----------
    urls : sequence of str
        The files.
    columns : set of str
        Columns to read, where a file has them.
    storage_options : mapping, optional
        For fsspec.

    Yields
    ------
    pyarrow.Table
        Up to 16,384 rows.
    """
    for url in urls:
        with files.opened(url, storage_options or {}) as file:
            parquet = pq.ParquetFile(file)
            names = [n for n in parquet.schema_arrow.names if n in columns]
            for batch in parquet.iter_batches(_BATCH, columns=names):
                yield pa.Table.from_batches([batch])


def survey(
    urls: Sequence[str],
    schema: pa.Schema,
    settled: Settled,
    storage_options: Mapping[str, Any] | None = None,
) -> Survey:
    """Go once through a score table.

    Parameters
    ----------
    urls : sequence of str
        Its files.
    schema : pyarrow.Schema
        Of the first of them; columns that another one lacks count as missing there.
    settled : Settled
        What keeps a row.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    Survey

    Raises
    ------
    OSError, pyarrow.ArrowException
        If a file cannot be read.
    """
    found = Survey(schema, settled)
    for table in read_batches(urls, found.wanted, storage_options):
        found.add(table)
    return found
