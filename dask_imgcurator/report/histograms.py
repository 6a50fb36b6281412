"""Histograms of score columns, gathered while a table streams by, and drawn as inline SVG."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import render as page

__all__ = [
    "KEPT",
    "LINEAR",
    "LOG",
    "LOWER_IS_BETTER",
    "OTHER",
    "OWN",
    "PROBABILITY",
    "SCALES",
    "SCRIPT",
    "Histogram",
    "Mark",
    "figure",
]

# What becomes of an image that has a value; places in `Histogram.counts`.
OTHER, OWN, KEPT = range(3)

_SHOWN = 40  # bars, at most
_TRIED = 120  # cuts that the slider offers, at most


# --- axes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """An axis: values to positions and back, and values where a tick may stand, the preferred ones first."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[float], float]
    ticks: Callable[[float, float], list[float]]


def _round_ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    return [round(k * step, 12) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _decades(_low: float, _high: float) -> list[float]:
    return [factor * 10.0**e for factor in (1, 3) for e in range(13)]


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-10, 1 - 1e-8)
    return np.log(p) - np.log1p(-p)


LINEAR = Scale(lambda x: np.clip(x, -1e30, 1e30), lambda y: y, _round_ticks)
LOG = Scale(lambda x: np.log10(np.clip(x, 0.5, 1e30)), lambda y: 10**y, _decades)
# A classifier's probabilities bunch near 0 and 1, where a linear axis shows one bar.
PROBABILITY = Scale(
    _logit,
    lambda y: 1 / (1 + float(np.exp(-y))),
    lambda _l, _h: [0.5, 0.01, 0.99, 1e-4, 1e-6, 1e-8, 1e-10, 0.9999, 0.1, 0.9, 1e-3, 0.999, 1e-5, 1e-7],
)
SCALES = {"nsfw_score": PROBABILITY, "width": LOG, "height": LOG, "nbytes": LOG}

# Columns where a lower value is better, so that a cut keeps what lies below it.
LOWER_IS_BETTER = frozenset(["nsfw_score", "blur"])


# --- counts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A condition on one column that is a bound: ``column >= number``, or what a rank came to.

    Attributes
    ----------
    column : str
        Name of the column.
    number : float
        The bound.
    text : str
        The condition as the user wrote it.
    below : bool
        Whether what lies below is kept.
    part : int
        Its place among the conditions.
    """

    column: str
    number: float
    text: str
    below: bool
    part: int


@dataclass
class Histogram:
    """Counts in fine bins of one width; the width doubles when a value lies outside, so one pass is enough.

    Attributes
    ----------
    scale : Scale
        Of the axis.
    counts : numpy.ndarray
        (3, bins) int64: images dropped by a condition on something else, dropped by conditions on this column alone,
        and kept.
    """

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
        """Count values, (n,) float64, and what becomes of their images, (n,) of 0, 1, 2 as in `counts`."""
        finite = np.isfinite(values)
        self.missing += int((~finite).sum())
        if not finite.any():
            return
        values, fates = values[finite], fates[finite]
        self.extremes = (min(self.extremes[0], float(values.min())), max(self.extremes[1], float(values.max())))
        x = self.scale.forward(values)
        bins = self.counts.shape[1]
        least, most = float(x.min()), float(x.max())
        if not self.step:
            self.step = max(most - least, abs(least) * 1e-9, 1e-9) / (bins // 2)
            self.low = least - self.step * (bins // 4)
        while least < self.low or most >= self.low + self.step * bins:
            down = least < self.low
            pairs, empty = self.counts.reshape(3, -1, 2).sum(2), np.zeros((3, bins // 2), np.int64)
            self.counts = np.hstack([empty, pairs] if down else [pairs, empty])
            self.low -= self.step * bins * down
            self.step *= 2
        place = np.clip((x - self.low) / self.step, 0, bins - 1).astype(np.int64)
        self.counts += np.bincount(fates * bins + place, minlength=3 * bins).reshape(3, bins)

    def median(self) -> float:
        """The value in the middle, to the width of a bin."""
        where = np.searchsorted(np.cumsum(self.counts.sum(0)), (self.total + 1) // 2)
        return self.scale.inverse(self.low + (float(where) + 0.5) * self.step)

    def bars(self, cuts: Iterable[float], most: int = _SHOWN) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the edges, and counts (3, bars) between them, of a view that shows all values and cuts."""
        shown = self.scale.forward(np.array([*self.extremes, *cuts], np.float64))
        first, last = (int(np.floor((x - self.low) / self.step)) for x in (shown.min(), shown.max()))
        group = -(-(last + 1 - first) // most)
        bars = -(-(last + 1 - first) // group)
        used = np.flatnonzero(self.counts.any(0))
        out = np.zeros((3, bars), np.int64)
        for fate in (OTHER, OWN, KEPT):
            np.add.at(out[fate], np.clip((used - first) // group, 0, bars - 1), self.counts[fate, used])
        return self.low + self.step * (first + group * np.arange(bars + 1)), out

    def tries(self, below: bool, cuts: Iterable[float], most: int = _TRIED) -> tuple[np.ndarray, np.ndarray]:
        """What other cuts would keep.

        Parameters
        ----------
        below : bool
            Whether a cut keeps what lies below it.
        cuts : iterable of float
            Values that the view shows anyway.
        most : int
            Number of cuts, at most.

        Returns
        -------
        positions : numpy.ndarray
            (m,) on the axis.
        kept : numpy.ndarray
            (2, m) int64: images that such a cut keeps by itself, and with the conditions on everything else.
        """
        edges, counts = self.bars(cuts, most)
        sums = np.stack([counts.sum(0), counts[OWN] + counts[KEPT]])
        before = np.hstack([np.zeros((2, 1), np.int64), np.cumsum(sums, 1)])
        return edges, before if below else before[:, -1:] - before


# --- drawing --------------------------------------------------------------------------------------

_WIDE, _TOP, _FLOOR = 400.0, 26.0, 150.0

#: Lets a cut be tried on a figure's slider. Without it the figures are whole: their tables hold the same numbers.
SCRIPT = """
for (const box of document.querySelectorAll(".try")) {
  const [input, output] = [box.querySelector("input"), box.querySelector("output")];
  const tries = JSON.parse(box.dataset.tries), line = box.closest("figure").querySelector(".moved");
  const show = () => {
    const [value, x, alone, all] = tries[input.value];
    const text = box.dataset.words.replace("{}", value) + " " + alone + (all ? "; " + all : "");
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
    line.setAttribute("d", "M" + x + " 18V150");
    line.removeAttribute("visibility");
  };
  input.addEventListener("input", show);
  output.textContent = box.dataset.hint;
  box.hidden = false;
}
"""


# A colour, places in `Histogram.counts`, and what is counted there.
_Kind = tuple[str, tuple[int, ...], str]


def _span(low: float, high: float, position: float) -> float:
    return 4 + (_WIDE - 8) * (position - low) / (high - low)


@dataclass(frozen=True)
class _View:
    """A histogram as it is shown: edges of its bars, their counts, and how its numbers are written."""

    histogram: Histogram
    edges: np.ndarray
    bars: np.ndarray

    @property
    def low(self) -> float:
        return float(self.edges[0])

    @property
    def high(self) -> float:
        return float(self.edges[-1])

    def at(self, value: float) -> float:
        """Where a value stands in the drawing."""
        return _span(self.low, self.high, float(self.histogram.scale.forward(np.array(value, np.float64))))

    def show(self, value: float, finer: int = 0) -> str:
        """Write a value with enough digits to tell one edge from the next; probabilities near 1 need them most."""
        digits = 3 + finer
        if self.histogram.scale is LINEAR:
            step = (self.edges[1] - self.low) / 10**finer
            digits = max(1 + int(np.ceil(np.log10(max(abs(self.low), abs(self.high)) / step))), 3)
        return page.number(value, 9 if self.histogram.scale is PROBABILITY and value > 0.99 else digits)


def _kinds(selected: bool, names: Sequence[str] | None) -> list[_Kind]:
    if names is None and not selected:
        return [("in", (OTHER, OWN, KEPT), "images")]
    kept, own, other = names or ("kept", "dropped by a condition on it alone", "dropped by another")
    return [("in", (KEPT,), kept), ("own", (OWN,), own), ("out", (OTHER,), other)]


def _bars(view: _View, kinds: Sequence[_Kind]) -> str:
    """The bars, each with its numbers as a tip."""
    shapes, peak = [], int(view.bars.sum(0).max())
    inverse = view.histogram.scale.inverse
    for i, (left, right) in enumerate(zip(view.edges[:-1], view.edges[1:], strict=True)):
        counts = view.bars[:, i]
        if not counts.any():
            continue
        tip = f"{view.show(inverse(left))} to {view.show(inverse(right))}: {counts.sum():,} images"
        base, rects = _FLOOR, ""
        for kind, fates, words in kinds:
            count = int(counts[list(fates)].sum())
            tall = (_FLOOR - _TOP) * count / peak
            base -= tall
            if count:
                x, end = _span(view.low, view.high, left), _span(view.low, view.high, right)
                rects += f'<rect class="{kind}" data-count="{count}" x="{x:.1f}" y="{base:.1f}" '
                rects += f'width="{max(end - x - 0.8, 0.8):.1f}" height="{tall:.1f}"/>'
                tip += f", {count:,} {words}" if len(kinds) > 1 else ""
        shapes.append(f"<g><title>{tip}</title>{rects}</g>")
    return "".join(shapes)


def _ticks(view: _View) -> str:
    shapes, placed = [], list[float]()
    scale = view.histogram.scale
    for value in scale.ticks(scale.inverse(view.low), scale.inverse(view.high)):
        at = view.at(value)
        if 4 <= at <= _WIDE - 4 and all(abs(at - other) >= 48 for other in placed):
            placed.append(at)
            anchor = "start" if at < 20 else "end" if at > _WIDE - 20 else "middle"
            shapes.append(f'<path class="axis" d="M{at:.1f} {_FLOOR}v4"/>')
            shapes.append(f'<text x="{at:.1f}" y="{_FLOOR + 15}" text-anchor="{anchor}">{view.show(value)}</text>')
    return "".join(shapes)


def _marks(view: _View, marks: Sequence[Mark]) -> str:
    shapes = []
    for mark in marks:
        at = view.at(mark.number)
        anchor = "start" if at < _WIDE / 2 else "end"
        shapes.append(f'<path class="cut" d="M{at:.1f} {_TOP - 8}V{_FLOOR}"/>')
        shapes.append(
            f'<text class="cut" x="{at:.1f}" y="{_TOP - 12}" text-anchor="{anchor}">{page.text(mark.text, 60)}</text>'
        )
    return "".join(shapes)


def _slider(name: str, view: _View, below: bool, marks: Sequence[Mark], selected: bool) -> str:
    """A slider that says what another cut would keep; hidden until the page's script shows it."""
    positions, kept = view.histogram.tries(below, [m.number for m in marks])
    keep = [True, *(np.diff(kept[0]) != 0)]  # cuts between which no image lies say the same
    inverse, total = view.histogram.scale.inverse, view.histogram.total
    tries = [
        (
            view.show(inverse(float(x)), 1),
            f"{_span(view.low, view.high, float(x)):.1f}",
            f"{alone:,} of {total:,} ({page.share(alone, total)})",
            f"with the other conditions {both:,}" if selected else "",
        )
        for x, alone, both in zip(positions[keep], *kept[:, keep].tolist(), strict=True)
    ]
    start = 0
    if marks:
        at = float(view.histogram.scale.forward(np.array(marks[0].number, np.float64)))
        start = int(np.abs(positions[keep] - at).argmin())
    words = f"{name} {'<' if below else '>='} {{}} keeps about"
    return (
        f'<div class="try" hidden data-tries="{page.text(json.dumps(tries), 10**6)}" data-words="{page.text(words)}" '
        f'data-hint="Move it to see what another cut would keep."><label>Try another cut of {page.text(name)}'
        f'<input type="range" min="0" max="{len(tries) - 1}" value="{start}"></label><output></output></div>'
    )


def _numbers(name: str, view: _View, kinds: Sequence[_Kind], below: bool | None) -> str:
    """The same as a table, with what a cut at each range's beginning (or end) would keep, unless `below` is None."""
    inverse = view.histogram.scale.inverse
    side = np.stack([view.bars.sum(0), view.bars[OWN] + view.bars[KEPT]])
    kept = np.cumsum(side, 1) if below else np.cumsum(side[:, ::-1], 1)[:, ::-1]
    rows, parted = [], len(kinds) > 1
    for i, (left, right) in enumerate(zip(view.edges[:-1], view.edges[1:], strict=True)):
        if view.bars[:, i].any():
            counts = [int(view.bars[list(fates), i].sum()) for _, fates, _ in kinds] if parted else []
            counts = [
                int(view.bars[:, i].sum()),
                *counts,
                *(kept[: 1 + parted, i].tolist() if below is not None else []),
            ]
            words = f"{view.show(inverse(left))} to {view.show(inverse(right))}"
            rows.append((words, *(f"{n:,}" for n in counts)))
    head = ["Range", "Images", *([words.capitalize() for *_, words in kinds] if parted else [])]
    if below is not None:
        head += ["A cut at its end keeps" if below else "A cut at its start keeps"]
        head += ["and with the other conditions"] * parted
    return page.table(f"Images by {page.text(name)}", head, rows)


def figure(
    name: str,
    histogram: Histogram,
    marks: Sequence[Mark] = (),
    selected: bool = True,
    names: Sequence[str] | None = None,
) -> str:
    """One histogram: an SVG, a slider to try another cut on, and all its numbers as a table.

    Parameters
    ----------
    name : str
        Of the column.
    histogram : Histogram
        Its values.
    marks : sequence of Mark
        Bounds on it.
    selected : bool
        Whether rows were kept and dropped at all.
    names : sequence of str, optional
        What the three counts are, the last one first, where they are not what becomes of images. Then there are no cuts
        to try.

    Returns
    -------
    str
        HTML. The slider works with `SCRIPT`.
    """
    missing = f"; {histogram.missing:,} without a value" if histogram.missing else ""
    if not histogram.total:
        return f"<figure><h3>{page.text(name)}</h3><figcaption>no values{missing}</figcaption></figure>\n"
    view = _View(histogram, *histogram.bars([m.number for m in marks]))
    kinds = _kinds(selected, names)
    below = marks[0].below if marks else name in LOWER_IS_BETTER
    tries = _slider(name, view, below, marks, selected) if names is None else ""
    numbers = _numbers(name, view, kinds, below if names is None else None)
    peak = int(view.bars.sum(0).max())
    span = f"{view.show(histogram.extremes[0])} to {view.show(histogram.extremes[1])}"
    words = f"{histogram.total:,} images, {span}, median about {view.show(histogram.median())}"
    axis = {PROBABILITY: " Logit axis.", LOG: " Logarithmic axis."}.get(histogram.scale, "")
    return (
        f'<figure><h3>{page.text(name)}</h3><svg viewBox="0 0 {_WIDE:.0f} 172" role="img" '
        f'aria-label="Histogram of {page.text(name)}: {words}"><path class="axis" d="M0 {_FLOOR}H{_WIDE}"/>'
        f'<text x="2" y="{_TOP - 2}">{peak:,}</text>{_bars(view, kinds)}{_ticks(view)}{_marks(view, marks)}'
        f'<path class="moved" visibility="hidden" d="M0 0"/></svg>'
        f"<figcaption>{words}{missing}.{axis}{tries}"
        f"<details><summary>Numbers</summary>{numbers}</details></figcaption></figure>\n"
    )
