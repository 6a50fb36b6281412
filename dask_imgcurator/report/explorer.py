"""A slider on a score column in a notebook: what a cut keeps, and the pictures on both sides of it.

    cut = dic.explore(scores, "aesthetic_score")
    cut                                  # in a separate cell: slider, histogram, pictures
    dic.filter_frame(scores, cut.where)  # the same text works for ``--where``

The table is read once, when the explorer is created; moves of the slider need no further pass.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..engine.backend import backend_of, is_dask
from ..engine.run import reduce
from ..select.ranks import arrow_type, value_order
from .gallery import Pictures, require_locators, widgets_of
from .histograms import LOWER_IS_BETTER, Axis, scale_of
from .render import CREDITS, NSFW, frame, number, render

Keep = Literal[">=", "<"]

#: Maximum number of distinct values to count exactly; 16 bytes each.
_EXACT = 1 << 22
#: Number of rows with pictures to show, spread evenly over the ranks of the column.
_ROWS = 8192
_BARS = 80
_WIDTH, _HEIGHT = 900, 136  # of the histogram; of its tallest bar
_STEP = 0.001  # of the slider, in shares of the axis
_QUIET = 0.25  # seconds without a move, before pictures are read


# --- one pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The distribution of a column's values, and rows to show."""

    values: np.ndarray  # (m,) float64, ascending: distinct values
    counts: np.ndarray  # (m,) int64: rows with each value
    missing: int  # rows where it is null or NaN
    exact: bool  # whether `values` are complete; otherwise, values with equal leading bits are counted as one
    near: np.ndarray  # (k,) float64, ascending: the column in `rows`
    rows: pa.Table  # with locators: all rows with a value, or some, evenly by rank

    @property
    def total(self) -> int:
        """All rows."""
        return int(self.counts.sum()) + self.missing

    def below(self, value: float) -> int:
        """Count the rows whose value is below a given one."""
        return int(self.counts[: np.searchsorted(self.values, value, side="left")].sum())

    def beside(self, value: float, n: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the n rows just below a value, and the n rows at or above it, nearest first."""
        at = int(np.searchsorted(self.near, value, side="left"))
        low = self.rows.slice(max(0, at - n), min(n, at)).to_pylist()[::-1]
        return low, self.rows.slice(at, n).to_pylist()

    def middle(self) -> float:
        """Return the median."""
        ends = np.cumsum(self.counts)
        return float(self.values[np.searchsorted(ends, (ends[-1] + 1) // 2)])


def spread(df: Any, column: str, shown: Sequence[str] = (), *, values: int = _EXACT, rows: int = _ROWS) -> Spread:
    """Read the spread of a numeric column in one pass; SelectionError if it is missing or not numeric."""
    # Counts at most `values` distinct values exactly, and keeps at most `rows` rows to show.
    value_order(df, column)  # raises
    columns = list(dict.fromkeys((column, *shown)))
    quota = max(64, 4 * rows // df.npartitions) if is_dask(df) else rows
    merge = partial(_merge, values=values, rows=rows)
    found: Spread = reduce(df[columns], _spread_of, merge, column, columns, values, quota)
    return found


def _spread_of(part: Any, column: str, columns: list[str], values: int, rows: int) -> Spread:
    seam = backend_of(part)
    array = seam.to_host(part, [column])[column]
    known = array.is_valid().to_numpy()
    x = np.asarray(array.cast(pa.float64(), safe=False).fill_null(0).to_numpy(), np.float64)
    place = np.flatnonzero(known & ~np.isnan(x))
    by = place[np.argsort(x[place], kind="stable")]
    near = by[_even(len(by), rows)]
    different, counts = np.unique(x[place], return_counts=True)
    table = seam.to_host(part.iloc[near], columns)
    return _coarsened(Spread(different, counts, len(x) - len(place), True, x[near], table), values)


def _merge(found: Sequence[Spread], values: int, rows: int) -> Spread:
    """Merge the spreads of partitions, within the same limits."""
    different, at = np.unique(np.concatenate([part.values for part in found]), return_inverse=True)
    counts = np.zeros(len(different), np.int64)
    np.add.at(counts, at, np.concatenate([part.counts for part in found]))
    near = np.concatenate([part.near for part in found])
    by = np.argsort(near, kind="stable")
    by = by[_even(len(by), rows)]
    table = pa.concat_tables([part.rows for part in found], promote_options="permissive").take(by)
    missing, exact = sum(part.missing for part in found), all(part.exact for part in found)
    return _coarsened(Spread(different, counts, missing, exact, near[by], table), values)


def _even(n: int, most: int) -> np.ndarray:
    """At most `most` of n positions, evenly spaced, including the first and last."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(np.int64)


def _coarsened(found: Spread, most: int) -> Spread:
    """Round values towards 0, dropping more and more low bits until few enough remain."""
    values, counts, exact, bits = found.values, found.counts, found.exact, 0
    while len(values) > most:
        bits += 1
        rounded = (values.view(np.uint64) >> np.uint64(bits) << np.uint64(bits)).view(np.float64)
        first = np.flatnonzero(np.r_[True, rounded[1:] != rounded[:-1]])
        exact = exact and len(first) == len(values)
        values, counts = rounded[first], np.add.reduceat(counts, first)
    return Spread(values, counts, found.missing, exact, found.near, found.rows)


# --- the explorer ---------------------------------------------------------------------------------


def explore(
    df: Any,
    column: str = "aesthetic_score",
    threshold: float | None = None,
    *,
    keep: Keep | None = None,
    n: int = 6,
    upright: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Explorer:
    """Find a cut on a score with a slider: kept rows, histogram, and the pictures on both sides of the cut.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With the column, ``shard``, ``offset`` and ``nbytes``; preferably a score table (`read_scores`), read once.
    column : str
        A column of numbers.
    threshold : float, optional
        Initial cut; by default the median, for ``nsfw_score`` 0.5.
    keep : {">=", "<"}, optional
        Which side of the cut to keep; by default ``<`` for ``nsfw_score`` and ``blur``, else ``>=``.
    n : int
        Pictures shown on each side of the cut.
    upright : bool
        Whether to apply the orientation in a photograph's EXIF data.
    storage_options : mapping, optional
        For the fsspec file systems of the shards.

    Returns
    -------
    Explorer
        Displays itself in a notebook. ``value`` (which can be set), ``where`` and ``kept`` hold the choice.

    Raises
    ------
    ModuleNotFoundError
        If ipywidgets is not installed.
    ValueError, SelectionError
        If the column is missing or unsuitable, or `keep` or `n` is invalid.

    Notes ----- Counts are exact up to 4,194,304 distinct values. Beyond that, values are rounded in their last bits
    until few enough remain; a count may then be off by the rows that share the threshold's leading bits, and is marked
    "about". Pictures come from up to 8,192 rows, spread evenly over the ranks.
    """
    widgets_of("explore")
    require_locators(df, "explore")
    if keep not in (None, ">=", "<"):
        raise ValueError(f"keep={keep!r}: use '>=' or '<'")
    if n < 1:
        raise ValueError(f"n={n}: show at least 1 picture")
    shown = [c for c in ("key", "shard", "offset", "nbytes", "nsfw_score", *CREDITS) if c in df.columns]
    found = spread(df, column, shown)
    type_ = arrow_type(df, column)
    dtype = type_.to_pandas_dtype() if pa.types.is_floating(type_) else np.float64
    direction: Keep = keep or ("<" if column in LOWER_IS_BETTER else ">=")
    return Explorer(found, column, direction, threshold, n, np.dtype(dtype), Pictures(upright, storage_options))


class Explorer:
    """A movable cut on a column, created by `explore`.

    Attributes
    ----------
    column, keep : str
        The column, and which side of the cut is kept (``>=`` or ``<``).
    spread : Spread
        The distribution for counting.
    widget : ipywidgets.VBox
        The display in a notebook.
    """

    def __init__(
        self,
        spread: Spread,
        column: str,
        keep: Keep,
        threshold: float | None,
        n: int,
        dtype: np.dtype[Any],
        pictures: Pictures,
    ) -> None:
        self.spread, self.column, self.keep = spread, column, keep
        self._n, self._dtype, self._pictures = n, dtype, pictures
        self._axis, self._bars = _drawn(spread, column)
        if threshold is None:
            threshold = NSFW if column == "nsfw_score" else self._round(self._axis.share(spread.middle()))
        self._value = _finite(threshold)
        self._telling = False  # ignores change events while controls are being set
        self._later: asyncio.TimerHandle | None = None
        self._build()
        self._tell()
        self._show_pictures()

    @property
    def value(self) -> float:
        """The threshold; setting it moves the slider."""
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        self._value = _finite(value)
        self._tell()
        self._schedule()

    @property
    def where(self) -> str:
        """The cut as an expression, for `filter_frame`, `show` and ``--where``."""
        name = self.column if re.fullmatch(r"[^\W\d]\w*", self.column) else f"`{self.column}`"
        return f"{name} {self.keep} {repr(self._value).removesuffix('.0')}"

    @property
    def _bound(self) -> float:
        """The value as compared: an expression rounds it to float32 for a float32 column."""
        return float(self._dtype.type(self._value))

    @property
    def kept(self) -> int:
        """Rows that the cut keeps."""
        below = self.spread.below(self._bound)
        return below if self.keep == "<" else int(self.spread.counts.sum()) - below

    # --- display

    def _build(self) -> None:
        widgets = widgets_of("explore")
        wide = widgets.Layout(width="100%", max_width="60rem")
        self._words, self._walls = widgets.HTML(layout=wide), widgets.HTML(layout=wide)
        self._slider = widgets.FloatSlider(min=0.0, max=1.0, step=_STEP, readout=False, layout=wide)
        self._number = widgets.FloatText(description=f"keep {self.keep}", layout=widgets.Layout(width="15rem"))
        self._slider.observe(self._moved, "value")
        self._number.observe(self._typed, "value")
        self.widget = widgets.VBox([self._words, self._slider, self._number, self._walls])

    def _moved(self, change: Mapping[str, Any]) -> None:
        if not self._telling:
            self.value = self._round(change["new"])

    def _typed(self, change: Mapping[str, Any]) -> None:
        if not self._telling and math.isfinite(change["new"]):
            self.value = change["new"]

    def _round(self, share: float) -> float:
        """Return the value at a share of the axis, with no more digits than a slider step resolves."""
        exact, beside = self._axis.value(share), self._axis.value(share + _STEP)
        step = abs(beside - exact)
        return round(exact, 1 - math.floor(math.log10(step))) if step else exact

    def _tell(self) -> None:
        share = min(max(self._axis.share(self._value), 0.0), 1.0)
        self._telling = True
        self._slider.value, self._number.value = share, self._value
        self._telling = False
        words = render(
            "explorer_words.html.j2",
            where=self.where,
            kept=self.kept,
            value=self._value,
            spread=self.spread,
            axis=self._axis,
            cut=share * _WIDTH,
            bars=list(self._coloured(share * _WIDTH)),
            show=partial(number, digits=4),
        )
        self._words.value = frame(words)

    def _coloured(self, cut: float) -> Iterator[tuple[str, float, float, float]]:
        """Yield the bars, split at the cut: colour, place, width and height."""
        width, peak = _WIDTH / _BARS, self._bars.max()
        for i in np.flatnonzero(self._bars):
            left, right, height = i * width, (i + 1) * width - 0.8, max(self._bars[i] / peak * _HEIGHT, 0.6)
            for begin, end, above in ((left, min(right, cut), False), (max(left, cut), right, True)):
                if end > begin:
                    yield "in" if above == (self.keep == ">=") else "out", begin, end - begin, height

    def _schedule(self) -> None:
        """Show pictures once the slider rests, if there is an event loop to wait in; otherwise now."""
        if self._later is not None:
            self._later.cancel()
        try:
            self._later = asyncio.get_running_loop().call_later(_QUIET, self._show_pictures)
        except RuntimeError:
            self._show_pictures()

    def _show_pictures(self) -> None:
        low, high = map(self._pictures.beside, self.spread.beside(self._bound, self._n))
        kept, dropped = (low, high) if self.keep == "<" else (high, low)
        walls = render(
            "explorer_walls.html.j2",
            sides=[("Just kept", kept), ("Just dropped", dropped)],
            column=self.column,
            scored="nsfw_score" in self.spread.rows.column_names,
        )
        self._walls.value = frame(walls)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        # The HTML is for viewers without widgets, such as repository pages.
        still = {"text/html": self._words.value + self._walls.value, "text/plain": repr(self)}
        return {**(self.widget._repr_mimebundle_(**kwargs) or {}), **still}

    def __repr__(self) -> str:
        about = "" if self.spread.exact else "about "
        return f"{self.where} keeps {about}{self.kept:,} of {self.spread.total:,} rows"


def _finite(value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"value={value}: a threshold is a finite number")
    return value


def _drawn(found: Spread, column: str) -> tuple[Axis, np.ndarray]:
    """The axis that histogram and slider share, and the rows of each bar."""
    finite = np.isfinite(found.values)
    if not finite.any():
        raise ValueError(f"column {column!r} has no finite value in {found.total:,} rows: nothing to cut")
    scale = scale_of(column)
    x = scale.forward(found.values[finite])
    # A little wider than the data, so that the cut can be below or above all values.
    margin = max((x[-1] - x[0]) * 0.01, abs(x[0]) * 1e-6, 1e-9)
    axis = Axis(scale, float(x[0] - margin), float(x[-1] + margin), _WIDTH)
    bars, _ = np.histogram(x, _BARS, (axis.low, axis.high), weights=found.counts[finite].astype(np.float64))
    return axis, bars
