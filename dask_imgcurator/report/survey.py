"""One pass over a score table for its pages: counts, histograms, and the few rows to show as pictures.

Score files are streamed without their embeddings; memory is bounded, whatever the number of rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..results import Counts
from ..schema import MEASURES, kind_of
from ..select.ranks import ValueOrder
from ..select.settle import Bound, Condition, Settled, counts_of
from ..select.where import Where
from ..steps.score_table import PLACE, ScoreTable
from .histograms import KEPT, LOWER_IS_BETTER, OWN, Histogram, Mark, scale_of
from .render import ROW, number

_WALL = 12  # pictures per wall
_EDGE = 6  # pictures on a wall beside a cut
_EDGES = 6  # maximum number of cuts with such walls
_EXAMPLES = 5  # rows shown per kind of error
_TEXTS = 30  # maximum number of distinct texts of a column whose texts are counted
_SEED = 0

#: Scores that come before others; the first one available ranks the images.
FIRST = ("aesthetic_score", "clip_score", "nsfw_score")

SIZES = ("width", "height")

_NAME = r"(?:`(?P<quoted>[^`]+)`|(?P<name>[^\W\d]\w*))"
_LITERAL = r"(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_BOUNDS = (
    re.compile(rf"{_NAME} ?(?P<sign>[<>])=? ?{_LITERAL}"),
    re.compile(rf"{_LITERAL} ?(?P<turned>[<>])=? ?{_NAME}"),
)


def _mark(condition: Condition, part: int) -> Mark | None:
    """The bound that a condition sets, if any: ``column >= number``, or the bound of a rank."""
    order = condition.order
    if isinstance(condition.step, Where):
        for pattern in _BOUNDS:
            if found := pattern.fullmatch(condition.text):
                below = (found["sign"] == "<") if "sign" in found.groupdict() else found["turned"] == ">"
                return Mark(found["quoted"] or found["name"], float(found["number"]), condition.text, below, part)
    elif isinstance(condition.bound, Bound) and isinstance(order, ValueOrder) and condition.bound.last >= 0:
        bound, below = float(order.value(condition.bound.last)), not order.largest
        text = f"{condition.text} ({'<=' if below else '>='} {number(bound, 5)})"
        return Mark(order.column, bound, text, below, part)
    return None


# --- rows to show ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """The column by which images are best and worst."""

    column: str

    def ends(self) -> tuple[str, str]:
        """Descriptions of the best and the worst."""
        words = f"lowest {self.column}", f"highest {self.column}"
        return words if self.column in LOWER_IS_BETTER else words[::-1]

    def order(self, values: np.ndarray) -> np.ndarray:
        """Values of the column as (n,) float64, negated if necessary: the smallest is the best."""
        return values if self.column in LOWER_IS_BETTER else -values


@dataclass
class Wall:
    """The rows with the smallest order values, at most `limit`: pairs of value and row, in order."""

    # `unselected` is its title on a page without a selection; None: not shown there.

    title: str
    note: str
    unselected: str | None = None
    limit: int = _WALL
    rows: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The rows alone."""
        return [row for _, row in self.rows]

    def offer(self, order: np.ndarray, among: np.ndarray, row: Callable[[int], dict[str, Any]]) -> None:
        """Add the rows of a batch that belong on the wall: (n,) order values, (n,) bool, and a getter for a row."""
        worst = self.rows[-1][0] if len(self.rows) == self.limit else np.inf
        with np.errstate(invalid="ignore"):
            found = np.flatnonzero(among & np.isfinite(order) & (order < worst))
        best = found[np.argsort(order[found], kind="stable")[: self.limit]]
        self.rows += [(float(order[i]), row(int(i))) for i in best]
        self.rows = sorted(self.rows, key=lambda r: r[0])[: self.limit]


def histograms_of(columns: Iterable[str], numbers: Iterable[str]) -> dict[str, Histogram]:
    """Return empty histograms of the numeric columns."""
    among = set(numbers)
    return {name: Histogram(scale_of(name)) for name in dict.fromkeys(columns) if name in among}


def numbers_of(schema: pa.Schema) -> list[str]:
    """Names of the numeric columns."""
    return [f.name for f in schema if kind_of(f.type) == "number"]


# --- texts that repeat ----------------------------------------------------------------------------

# Texts that name or describe a single image.
_UNIQUE = {"key", "shard", "source_shard", "caption", "status", "error_message", "note", "sha256", "phash"}


def texts_of(table: ScoreTable) -> list[str]:
    """Text columns that may have few distinct values: those with few in the first rows."""
    names = {f.name for f in table.schema if kind_of(f.type) == "string"} - _UNIQUE
    first = next(iter(table.batches(names)), None) if names else None
    if first is None:
        return []
    return [name for name in first.column_names if pc.count_distinct(first[name]).as_py() <= _TEXTS]


def _add_texts(counts: Counter[tuple[str | None, bool]], texts: pa.ChunkedArray, kept: np.ndarray) -> None:
    """Count texts by whether their rows are kept."""
    coded = texts if pa.types.is_dictionary(texts.type) else texts.cast(pa.string()).dictionary_encode()
    coded = coded.unify_dictionaries().combine_chunks()
    values = [*coded.dictionary.to_pylist(), None]
    codes = 2 * coded.indices.fill_null(len(values) - 1).to_numpy().astype(np.int64) + kept
    found = np.bincount(codes, minlength=2 * len(values)).tolist()
    counts.update({(values[code // 2], bool(code % 2)): n for code, n in enumerate(found) if n})


# --- the pass -------------------------------------------------------------------------------------


class Survey:
    """Everything that a page takes from a score table, except pictures."""

    def __init__(self, schema: pa.Schema, settled: Settled, texts: Sequence[str] = ()) -> None:
        self.settled = settled
        self._texts: dict[str, Counter[tuple[str | None, bool]]] = {name: Counter() for name in texts}
        numbers = numbers_of(schema)
        marks = [_mark(condition, i) for i, condition in enumerate(settled.conditions)]
        self.marks = [m for m in marks if m is not None and m.column in numbers]
        bounded = [m.column for m in self.marks]
        scores = [*FIRST, *(n for n in schema.names if n.endswith("_score"))]
        self.histograms = histograms_of([*scores, *MEASURES, *SIZES, *bounded], numbers)
        self.scores = [n for n in self.histograms if n in {*scores, *bounded} - set(SIZES)]  # shown with each picture
        self.rank = Rank(self.scores[0]) if self.scores else None
        self.wanted = {PLACE, *self.histograms, "status", *settled.columns, *texts}
        self.counts = Counts()
        self.failed: Counter[int] = Counter()  # readable rows by what they fail: bit i for condition i
        self.examples: dict[str, list[dict[str, Any]]] = {}  # the first failed rows of each status
        self.walls = self._empty_walls()
        self._random = np.random.default_rng(_SEED)

    def _empty_walls(self) -> dict[str, Wall]:
        walls = {}
        best, worst = self.rank.ends() if self.rank is not None else ("", "")
        if self.rank is not None:
            walls["best"] = Wall("Best kept", f"The {best} among the kept.", "Best")
        for mark in self.marks[:_EDGES]:
            inside = f"Closest to the cut {mark.text}, among the kept."
            outside = f"Closest to the cut {mark.text}; they meet every other condition."
            walls[f"inside {mark.part}"] = Wall(f"Just kept by {mark.text}", inside, limit=_EDGE)
            walls[f"outside {mark.part}"] = Wall(f"Just dropped by {mark.text}", outside, limit=_EDGE)
        if self.rank is not None:
            walls["worst"] = Wall("Worst", f"The {worst} of all readable images.", "Worst")
        walls["kept"] = Wall("Random kept", f"Drawn at random among the kept (seed {_SEED}).", "Random")
        walls["dropped"] = Wall("Random dropped", f"Drawn at random among the readable images not kept (seed {_SEED}).")
        return walls

    def add(self, table: pa.Table) -> None:
        """Add some rows of a score file."""
        verdict = self.settled.judge(table)
        ok, kept = verdict.ok, verdict.kept
        self.counts = Counts.sum([self.counts, counts_of(self.settled, verdict, table)])
        self._note_failures(ok, verdict.passed)

        def others(parts: Sequence[int]) -> np.ndarray:
            """Readable rows that meet all conditions except some."""
            return np.logical_and.reduce([ok, *(m for i, m in enumerate(verdict.passed) if i not in parts)])

        def row(i: int) -> dict[str, Any]:
            return {PLACE: table[PLACE][i].as_py(), "kept": bool(kept[i])}

        values = {name: floats(table, name) for name in self.histograms}
        for name, histogram in self.histograms.items():
            own = others([m.part for m in self.marks if m.column == name])
            histogram.add(values[name], own.astype(np.int8) * OWN + kept * (KEPT - OWN))  # the kept are among the own
        if self.rank is not None:
            order = self.rank.order(values[self.rank.column])
            self.walls["best"].offer(order, kept, row)
            self.walls["worst"].offer(-order, ok, row)
        for mark in self.marks[:_EDGES]:
            away = np.abs(values[mark.column] - mark.number)
            self.walls[f"inside {mark.part}"].offer(away, kept, row)
            self.walls[f"outside {mark.part}"].offer(away, others([mark.part]) & ~kept, row)
        for name, texts in list(self._texts.items()):
            _add_texts(texts, table[name].filter(pa.array(ok)), kept[ok])
            if len({text for text, _ in texts}) > _TEXTS:
                del self._texts[name]
        chance = self._random.random(table.num_rows)
        self.walls["kept"].offer(chance, kept, row)
        self.walls["dropped"].offer(chance, ok & ~kept, row)
        if not ok.all():
            failed = np.flatnonzero(~ok)
            statuses = table["status"].take(pa.array(failed)).cast(pa.string())
            for status in statuses.unique().to_pylist():
                shown = self.examples.setdefault(str(status), [])
                if len(shown) < _EXAMPLES:
                    same = failed[np.asarray(pc.equal(statuses, status).fill_null(status is None))]
                    shown.extend(row(int(i)) for i in same[: _EXAMPLES - len(shown)])

    def _note_failures(self, ok: np.ndarray, passed: Sequence[np.ndarray]) -> None:
        """Count the readable rows by the conditions they fail."""
        bits = np.zeros(len(ok), np.int64)
        for i, mask in enumerate(passed):
            bits |= (~mask).astype(np.int64) << min(i, 62)  # those from the 63rd on count as one
        found = pa.array(bits[ok]).value_counts().to_pylist()
        self.failed.update({item["values"]: item["counts"] for item in found})

    def texts(self) -> dict[str, dict[str | None, tuple[int, int]]]:
        """Return readable rows and kept rows by text, for each column with few distinct texts."""
        out = {}
        for name, counts in self._texts.items():
            total = Counter[str | None]()
            for (text, _), n in counts.items():
                total[text] += n
            if len(total) > 1:
                out[name] = {text: (n, counts[text, True]) for text, n in total.most_common()}
        return out

    def failures(self) -> dict[tuple[str, ...], int]:
        """Return the number of dropped rows by the conditions they fail, most frequent first."""
        texts = [condition.text for condition in self.settled.conditions]
        return {
            tuple(text for i, text in enumerate(texts) if bits >> i & 1): n
            for bits, n in self.failed.most_common()
            if bits
        }


def row_of(table: pa.Table, i: int, columns: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a row for a card, and a few more."""
    return {name: table[name][i].as_py() for name in (*ROW, *columns) if name in table.column_names}


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A column as (n,) float64, NaN where missing; all NaN if the table lacks it."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table[name].cast(pa.float64(), safe=False).to_numpy(), np.float64)


def survey(table: ScoreTable, settled: Settled) -> Survey:
    """Stream a score table once, and read the columns of the few rows to show."""
    texts = texts_of(table)
    found = Survey(table.schema, settled, texts)
    for batch in table.batches(found.wanted, texts):
        found.add(batch)
    shown = [*chain.from_iterable(wall.shown for wall in found.walls.values()), *chain(*found.examples.values())]
    rows = table.fetch((row[PLACE] for row in shown), {*ROW, "sample_offset", *found.scores})
    for row in shown:
        row.update(rows[row.pop(PLACE)])
    return found
