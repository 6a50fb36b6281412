"""Histograms of score columns, collected while streaming a table, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..schema import COLUMNS
from .render import number, share

# Fates of an image with a value; positions in `Histogram.counts`.
OTHER, OWN, KEPT = range(3)

_SHOWN = 40  # maximum number of bars
_TRIED = 120  # slider positions


# --- axes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Values to positions and back, and candidate tick values, preferred ones first."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[float], float]
    ticks: Callable[[float, float], list[float]]
    note: str = ""

    def position(self, value: float) -> float:
        """Return the position of one value."""
        return float(self.forward(np.array(value, np.float64)))


def _round_ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    return [round(k * step, 12) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-10, 1 - 1e-8)
    return np.log(p) - np.log1p(-p)


LINEAR = Scale(lambda x: np.clip(x, -1e30, 1e30), lambda y: y, _round_ticks)
LOG = Scale(
    lambda x: np.log10(np.clip(x, 0.5, 1e30)),
    lambda y: 10**y,
    lambda _low, _high: [factor * 10.0**e for factor in (1, 3) for e in range(13)],
    "Logarithmic axis.",
)
# A classifier's probabilities cluster near 0 and 1, where a linear axis would show one bar.
PROBABILITY = Scale(
    _logit,
    lambda y: 1 / (1 + float(np.exp(-y))),
    lambda _low, _high: [0.5, 0.01, 0.99, 1e-4, 1e-6, 1e-8, 1e-10, 0.9999, 0.1, 0.9, 1e-3, 0.999, 1e-5, 1e-7],
    "Logit axis.",
)
_SCALES = {"linear": LINEAR, "log": LOG, "probability": PROBABILITY}

# A cut on one of these keeps lower values.
LOWER_IS_BETTER = frozenset(column.name for column in COLUMNS.values() if column.lower_is_better)


def scale_of(column: str) -> Scale:
    """Return the scale of a column."""
    return _SCALES[COLUMNS[column].scale] if column in COLUMNS else LINEAR


@dataclass(frozen=True)
class Axis:
    """The positions from `low` to `high` of a scale, drawn `width` wide with a margin at either end."""

    scale: Scale
    low: float
    high: float
    width: int
    margin: int = 0

    def share(self, value: float) -> float:
        """Position of a value, 0 to 1."""
        return (self.scale.position(value) - self.low) / (self.high - self.low)

    def value(self, share: float) -> float:
        """Return the value at a share of the axis."""
        return self.scale.inverse(self.low + share * (self.high - self.low))

    def x(self, position: float) -> float:
        """Horizontal coordinate of a position."""
        return self.margin + (self.width - 2 * self.margin) * (position - self.low) / (self.high - self.low)

    def at(self, value: float) -> float:
        """Horizontal coordinate of a value."""
        return self.x(self.scale.position(value))

    def ticks(self) -> list[tuple[float, float]]:
        """Return positions and values of ticks, as many as have room for a number."""
        placed: list[tuple[float, float]] = []
        for value in self.scale.ticks(self.scale.inverse(self.low), self.scale.inverse(self.high)):
            x = self.at(value)
            if self.margin <= x <= self.width - self.margin and all(abs(x - other) >= 48 for other, _ in placed):
                placed.append((x, value))
        return placed

    def anchor(self, x: float) -> str:
        """Return the text anchor of a tick's number, to avoid clipping."""
        return "start" if x < 20 else "end" if x > self.width - 20 else "middle"


# --- counts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A condition that bounds one column, as written by the user; `part` is its position among the conditions."""

    column: str
    number: float
    text: str
    below: bool  # keeps lower values
    part: int


@dataclass
class Histogram:
    """Counts in fine bins of equal width, which doubles when a value is outside: one pass suffices."""

    # `counts` is (3, bins) int64: images dropped by a condition on something else, dropped only by conditions on this
    # column, and kept.

    scale: Scale
    counts: np.ndarray = field(default_factory=lambda: np.zeros((3, 4096), np.int64))
    low: float = 0.0
    step: float = 0.0
    extremes: tuple[float, float] = (np.inf, -np.inf)
    missing: int = 0

    @property
    def total(self) -> int:
        """Images with a value."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray, fates: np.ndarray) -> None:
        """Count values, (n,) float64, by the fate of their images, (n,) of 0, 1, 2 as in `counts`."""
        finite = np.isfinite(values)
        if not finite.all():
            values, fates = values[finite], fates[finite]
            self.missing += len(finite) - len(values)
        if not len(values):
            return
        ends = values.min(), values.max()
        self.extremes = (min(self.extremes[0], float(ends[0])), max(self.extremes[1], float(ends[1])))
        least, most = self.scale.forward(np.array(ends)).tolist()  # no scale falls
        x = self.scale.forward(values)
        bins = self.counts.shape[1]
        if not self.step:
            self.step = max(most - least, abs(least) * 1e-9, 1e-9) / (bins // 2)
            self.low = least - self.step * (bins // 4)
        while least < self.low or most >= self.low + self.step * bins:
            down = least < self.low
            pairs, empty = self.counts.reshape(3, -1, 2).sum(2), np.zeros((3, bins // 2), np.int64)
            self.counts = np.hstack([empty, pairs] if down else [pairs, empty])
            self.low -= self.step * bins * down
            self.step *= 2
        x = x - self.low
        x /= self.step
        place = np.clip(x, 0, bins - 1, out=x).astype(np.int64)
        place += np.multiply(fates, bins, dtype=np.int64)
        self.counts += np.bincount(place, minlength=3 * bins).reshape(3, bins)

    def median(self) -> float:
        """Return the median, up to the width of a bin."""
        where = np.searchsorted(np.cumsum(self.counts.sum(0)), (self.total + 1) // 2)
        return self.scale.inverse(self.low + (float(where) + 0.5) * self.step)

    def bars(self, cuts: Iterable[float], most: int = _SHOWN) -> tuple[np.ndarray, np.ndarray]:
        """Edges and counts (3, bars) of a view that shows all values and cuts."""
        shown = self.scale.forward(np.array([*self.extremes, *cuts], np.float64))
        first, last = (int(np.floor((x - self.low) / self.step)) for x in (shown.min(), shown.max()))
        group = -(-(last + 1 - first) // most)
        bars = -(-(last + 1 - first) // group)
        used = np.flatnonzero(self.counts.any(0))
        out = np.zeros((3, bars), np.int64)
        for fate in (OTHER, OWN, KEPT):
            np.add.at(out[fate], np.clip((used - first) // group, 0, bars - 1), self.counts[fate, used])
        return self.low + self.step * (first + group * np.arange(bars + 1)), out


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """The meaning of a colour: a position in `Histogram.counts`, and its text."""

    colour: str
    fate: int
    words: str


@dataclass(frozen=True)
class Bar:
    """A bar: its range of values, coordinates, and row in the figure's table."""

    span: str
    x: float
    width: float
    numbers: list[int]  # images, those of each kind, and those kept by a cut at the start (or end) of the range


@dataclass(frozen=True)
class Figure:
    """A histogram as shown by `figure.html.j2`."""

    # `kinds` are its colours, from the bottom up; none if nothing was selected. With `cuts`, it has a slider for other
    # cuts, and its table says what they keep.

    name: str
    histogram: Histogram
    marks: Sequence[Mark] = ()
    kinds: Sequence[Kind] = ()
    cuts: bool = True

    @cached_property
    def view(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges of the bars, and counts between them."""
        return self.histogram.bars([m.number for m in self.marks])

    @property
    def axis(self) -> Axis:
        """The axis under the bars."""
        edges, _ = self.view
        return Axis(self.histogram.scale, float(edges[0]), float(edges[-1]), 400, 4)

    @property
    def peak(self) -> int:
        """Number of images in the tallest bar."""
        return int(self.view[1].sum(0).max())

    @property
    def below(self) -> bool:
        """Whether a cut keeps lower values."""
        return self.marks[0].below if self.marks else self.name in LOWER_IS_BETTER

    def show(self, value: float, finer: int = 0) -> str:
        """Format a value with enough digits to distinguish adjacent edges; probabilities near 1 need the most."""
        digits, (edges, _) = 3 + finer, self.view
        if self.histogram.scale is LINEAR:
            step = (edges[1] - edges[0]) / 10**finer
            digits = max(1 + int(np.ceil(np.log10(max(abs(edges[0]), abs(edges[-1])) / step))), 3)
        return number(value, 9 if self.histogram.scale is PROBABILITY and value > 0.99 else digits)

    def bars(self) -> Iterator[Bar]:
        """Yield the non-empty bars."""
        (edges, counts), axis = self.view, self.axis
        shown = [self.show(self.histogram.scale.inverse(edge)) for edge in edges]
        columns = [counts.sum(0), *(counts[kind.fate] for kind in self.kinds)]
        if self.cuts:
            sums = [counts.sum(0), counts[OWN] + counts[KEPT]][: 2 if self.kinds else 1]
            columns += [np.cumsum(n) if self.below else np.cumsum(n[::-1])[::-1] for n in sums]
        for i in np.flatnonzero(counts.any(0)):
            x, width = axis.x(edges[i]), max(axis.x(edges[i + 1]) - axis.x(edges[i]) - 0.8, 0.8)
            yield Bar(f"{shown[i]} to {shown[i + 1]}", x, width, [int(column[i]) for column in columns])

    def tries(self) -> tuple[list[tuple[str, str, str, str]], int]:
        """The slider's texts at evenly spaced positions, and its initial position: the first condition."""
        scale, axis, total = self.histogram.scale, self.axis, self.histogram.total
        positions = np.linspace(axis.low, axis.high, _TRIED)
        start, words = 0 if not self.below else _TRIED - 1, {}
        if self.marks:
            cut = scale.position(self.marks[0].number)
            start = int(np.abs(positions - cut).argmin())
            positions[start], words[start] = cut, number(self.marks[0].number, 6)
        tries = [
            (
                words.get(i) or self.show(scale.inverse(float(x)), 1),
                f"{axis.x(x):.1f}",
                f"{alone:,} of {total:,} ({share(alone, total)})",
                f"with the other conditions {both:,}" if self.kinds else "",
            )
            for i, (x, (alone, both)) in enumerate(zip(positions, self._kept_by(positions), strict=True))
        ]
        return tries, start

    def _kept_by(self, positions: np.ndarray) -> list[list[int]]:
        """Images kept by a cut at each position, alone and with the other conditions, up to a fine bin's width."""
        counted = self.histogram
        sums = np.stack([counted.counts.sum(0), counted.counts[OWN] + counted.counts[KEPT]])
        kept = np.hstack([np.zeros((2, 1), np.int64), np.cumsum(sums, 1)])
        places = np.floor((positions - counted.low) / counted.step).astype(np.int64)
        out = kept[:, np.clip(places, 0, counted.counts.shape[1])]
        return (out if self.below else kept[:, -1:] - out).T.tolist()
