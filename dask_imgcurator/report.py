"""The self-contained page that a run leaves: counts, funnel, histograms, image walls, errors.

The score files are streamed once, without embeddings; what is kept of them is bounded: histograms of fixed size and a
few rows for each wall. Captions, keys, paths and messages come from strangers, so every text goes through `_text`, and
the page's own policy forbids scripts and anything from outside the file.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import files, filters, shards
from ._cpu import from_arrow
from .decode import inspect
from .schema import STATUSES, kind_of

if TYPE_CHECKING:
    from .results import RunResult

__all__ = ["write_report"]

_BATCH = 16_384  # rows of a score file in memory at a time
_WALL = 12  # pictures of a wall
_EXAMPLES = 5  # rows shown of each kind of error
_SIDE = 160  # pixels of a thumbnail: of pure noise it makes about 20 kB of the page, so 72 stay far below 3 MB
_NSFW = 0.5  # from here on a thumbnail is blurred
_MAX_NBYTES, _MAX_PIXELS = 64_000_000, 50_000_000  # of a picture that is worth decoding for a thumbnail
_SEED = 0

_CREDITS = ("license", "credit", "author", "attribution")
_ROW = ("key", "shard", "offset", "nbytes", "caption", "width", "height", "status", "error_message", *_CREDITS)
_NAME = r"(?:`(?P<quoted>[^`]+)`|(?P<name>[^\W\d]\w*))"
_LITERAL = r"(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_CUTS = (
    re.compile(rf"{_NAME} ?[<>]=? ?{_LITERAL}"),
    re.compile(rf"{_LITERAL} ?[<>]=? ?{_NAME}"),
)


# --- the figures: gathered while streaming --------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
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


_LINEAR = _Scale(lambda x: np.clip(x, -1e30, 1e30), lambda y: y, _round_ticks)
_LOG = _Scale(lambda x: np.log10(np.clip(x, 0.5, 1e30)), lambda y: 10**y, _decades)
# A classifier's probabilities bunch near 0 and 1, where a linear axis shows one bar.
_PROBABILITY = _Scale(
    _logit,
    lambda y: 1 / (1 + float(np.exp(-y))),
    lambda _l, _h: [0.5, 0.01, 0.99, 1e-4, 1e-6, 1e-8, 1e-10, 0.9999, 0.1, 0.9, 1e-3, 0.999, 1e-5, 1e-7],
)
_SCALES = {"nsfw_score": _PROBABILITY, "width": _LOG, "height": _LOG, "nbytes": _LOG}


@dataclass
class _Histogram:
    """Counts in fine bins of one width; the width doubles when a value lies outside, so one pass is enough."""

    scale: _Scale
    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, 4096), np.int64))  # dropped, kept
    low: float = 0.0
    step: float = 0.0
    extremes: tuple[float, float] = (np.inf, -np.inf)
    missing: int = 0

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def add(self, values: np.ndarray, kept: np.ndarray) -> None:
        finite = np.isfinite(values)
        self.missing += int((~finite).sum())
        if not finite.any():
            return
        values, kept = values[finite], kept[finite]
        self.extremes = (min(self.extremes[0], float(values.min())), max(self.extremes[1], float(values.max())))
        x = self.scale.forward(values)
        bins = self.counts.shape[1]
        least, most = float(x.min()), float(x.max())
        if not self.step:
            self.step = max(most - least, abs(least) * 1e-9, 1e-9) / (bins // 2)
            self.low = least - self.step * (bins // 4)
        while least < self.low or most >= self.low + self.step * bins:
            down = least < self.low
            pairs, empty = self.counts.reshape(2, -1, 2).sum(2), np.zeros((2, bins // 2), np.int64)
            self.counts = np.hstack([empty, pairs] if down else [pairs, empty])
            self.low -= self.step * bins * down
            self.step *= 2
        place = np.clip((x - self.low) / self.step, 0, bins - 1).astype(np.int64)
        for side in (0, 1):
            self.counts[side] += np.bincount(place[kept == side], minlength=bins)

    def median(self) -> float:
        where = np.searchsorted(np.cumsum(self.counts.sum(0)), (self.total + 1) // 2)
        return self.scale.inverse(self.low + (float(where) + 0.5) * self.step)

    def bars(self, cuts: Iterable[float], most: int = 40) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the edges, and counts (2, bars) between them, of a view that shows all values and cuts."""
        shown = self.scale.forward(np.array([*self.extremes, *cuts], np.float64))
        first, last = (int(np.floor((x - self.low) / self.step)) for x in (shown.min(), shown.max()))
        group = -(-(last + 1 - first) // most)
        bars = -(-(last + 1 - first) // group)
        used = np.flatnonzero(self.counts.any(0))
        out = np.zeros((2, bars), np.int64)
        for side in (0, 1):
            np.add.at(out[side], np.clip((used - first) // group, 0, bars - 1), self.counts[side, used])
        return self.low + self.step * (first + group * np.arange(bars + 1)), out


@dataclass
class _Wall:
    """The rows with the smallest order values."""

    title: str
    note: str
    rows: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def offer(self, order: np.ndarray, among: np.ndarray, row: Callable[[int], dict[str, Any]]) -> None:
        worst = self.rows[-1][0] if len(self.rows) == _WALL else np.inf
        with np.errstate(invalid="ignore"):
            found = np.flatnonzero(among & np.isfinite(order) & (order < worst))
        best = found[np.argsort(order[found], kind="stable")[:_WALL]]
        self.rows += [(float(order[i]), row(int(i))) for i in best]
        self.rows = sorted(self.rows, key=lambda r: r[0])[:_WALL]


@dataclass(frozen=True)
class _Cut:
    """A condition such as ``column >= number``: its place in the expression is `part`."""

    column: str
    number: float
    text: str
    part: int


def _cuts(parts: Sequence[filters.Where]) -> list[_Cut]:
    out = []
    for i, part in enumerate(parts):
        for pattern in _CUTS:
            if found := pattern.fullmatch(part.text):
                out.append(_Cut(found["quoted"] or found["name"], float(found["number"]), part.text, i))
    return out


class _Gathered:
    """Everything that the page takes from the score files."""

    def __init__(self, schema: pa.Schema, where: str | None) -> None:
        self.where = filters.parse_where(where) if where else None
        self.parts = self.where.conjuncts() if self.where else []
        numbers = {f.name for f in schema if kind_of(f.type) == "number"}
        self.cuts = [c for c in _cuts(self.parts) if c.column in numbers]
        names = ["aesthetic_score", "clip_score", "nsfw_score"]
        names += [*(n for n in schema.names if n.endswith("_score")), "width", "height", *(c.column for c in self.cuts)]
        self.histograms = {n: _Histogram(_SCALES.get(n, _LINEAR)) for n in dict.fromkeys(names) if n in numbers}
        self.scores = [n for n in self.histograms if n not in ("width", "height")]
        self.rank = next((n for n in names[:3] if n in numbers), None)
        mine = [c for c in self.cuts if c.column == self.rank]
        self.cut = next(iter(mine or self.cuts), None)
        self.wanted = {*_ROW, *self.histograms, *(self.where.columns if self.where else ())}
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.rows = self.kept = 0
        self._random = np.random.default_rng(_SEED)
        best, worst = ("lowest", "highest") if self.rank == "nsfw_score" else ("highest", "lowest")
        cut = self.cut.text if self.cut else ""
        self.walls = {
            "best": _Wall("Best kept", f"The {best} {self.rank} among the kept."),
            "inside": _Wall("Just kept", f"Closest to the cut {cut}, among the kept."),
            "outside": _Wall("Just dropped", f"Closest to the cut {cut}; they meet every other condition."),
            "worst": _Wall("Worst", f"The {worst} {self.rank} of all readable images."),
            "kept": _Wall("Random kept", f"Drawn at random among the kept (seed {_SEED})."),
            "dropped": _Wall("Random dropped", f"Drawn at random among the readable images not kept (seed {_SEED})."),
        }

    def add(self, table: pa.Table) -> None:
        """Take in some rows of a score file."""
        n = table.num_rows
        status = table["status"].to_pylist() if "status" in table.column_names else ["ok"] * n
        ok = np.array([s == "ok" for s in status], bool)
        frame = from_arrow(table.select(list(self.where.columns))) if self.where else None
        masks = [part.mask(frame).to_numpy(bool) for part in self.parts]
        kept = np.logical_and.reduce([ok, *masks])
        self.rows, self.kept = self.rows + n, self.kept + int(kept.sum())
        values = {name: _floats(table, name) for name in self.histograms}
        for name, histogram in self.histograms.items():
            histogram.add(values[name], kept)

        def row(i: int) -> dict[str, Any]:
            names = [c for c in (*_ROW, *self.scores) if c in table.column_names]
            return {**{c: table[c][i].as_py() for c in names}, "kept": bool(kept[i])}

        if self.rank is not None:
            order = values[self.rank] * (1 if self.rank == "nsfw_score" else -1)
            self.walls["best"].offer(order, kept, row)
            self.walls["worst"].offer(-order, ok, row)
        if self.cut is not None:
            away = np.abs(values[self.cut.column] - self.cut.number)
            others = np.logical_and.reduce([ok, *(m for i, m in enumerate(masks) if i != self.cut.part)])
            self.walls["inside"].offer(away, kept, row)
            self.walls["outside"].offer(away, others & ~kept, row)
        chance = self._random.random(n)
        self.walls["kept"].offer(chance, kept, row)
        self.walls["dropped"].offer(chance, ok & ~kept, row)
        for i in np.flatnonzero(~ok):
            shown = self.examples.setdefault(str(status[i]), [])
            if len(shown) < _EXAMPLES:
                shown.append(row(int(i)))


def _floats(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table[name].cast(pa.float64(), safe=False).to_numpy(), np.float64)


def _gather(tables: Sequence[str], where: str | None, storage_options: Mapping[str, Any]) -> _Gathered:
    gathered = None
    for url in tables:
        with files.opened(url, storage_options) as file:
            parquet = pq.ParquetFile(file)
            gathered = gathered or _Gathered(parquet.schema_arrow, where)
            names = [n for n in parquet.schema_arrow.names if n in gathered.wanted]
            for batch in parquet.iter_batches(_BATCH, columns=names):
                gathered.add(pa.Table.from_batches([batch]))
    return gathered or _Gathered(pa.schema([]), where)


# --- thumbnails -----------------------------------------------------------------------------------

_Place = tuple[str, int]


def _thumbnails(
    rows: Iterable[Mapping[str, Any]], upright: bool, storage_options: Mapping[str, Any] | None
) -> dict[_Place, str]:
    """Make ``data:`` URIs, shard by shard; rows whose thumbnail cannot be made are not in it."""
    by_shard: dict[str, dict[int, int]] = {}
    for row in rows:
        if row.get("shard") and row.get("nbytes") and row["nbytes"] <= _MAX_NBYTES:
            by_shard.setdefault(row["shard"], {})[row["offset"]] = row["nbytes"]
    made: dict[_Place, str] = {}
    for url, extents in by_shard.items():
        places = sorted(extents.items())
        try:
            for (offset, _), data in zip(places, shards.read_extents(url, places, storage_options), strict=True):
                uri = _thumbnail(data, upright)
                if uri is not None:
                    made[url, offset] = uri
        except Exception:  # a shard that is gone, or any error of a remote file system: the page counts what is missing
            continue
    return made


def _thumbnail(data: bytes, upright: bool) -> str | None:
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inspect(data, _MAX_PIXELS)
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
                small = ImageOps.exif_transpose(image) if upright else image
                small.thumbnail((_SIDE, _SIDE))
                rgba = small.convert("RGBA")
            # Nothing of the file but its pixels goes on: no EXIF, no profile.
            flat = Image.new("RGB", rgba.size, "white")
            flat.paste(rgba, mask=rgba.getchannel("A"))
            out = io.BytesIO()
            flat.save(out, "WEBP", quality=75)
    except Exception:  # bytes of strangers can raise nearly anything in Pillow's plugins
        return None
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


# --- the page -------------------------------------------------------------------------------------

_CSS = """
:root { --back: #fff; --text: #1b1f24; --soft: #57606a; --line: #d4d8dd; --card: #f5f6f8; --in: #0b66c3; --out: #aeb6c0;
  --cut: #b3261e; --warn: #fff4ce; --warn-line: #b98900 }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e7eaee; --soft: #a3abb5; --line: #3a4048;
  --card: #1e2329; --in: #58a6ff; --out: #646d78; --cut: #ff8b81; --warn: #382e0c; --warn-line: #d9a400 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif }
main { max-width: 72rem; margin: auto; padding: 1rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem }
h1 small { display: block; font-size: .9rem; font-weight: normal; margin-top: .3rem }
small, figcaption, p.legend, section > p, h3 + p, h1 small { color: var(--soft) }
code { font-size: .85em; overflow-wrap: anywhere } p { margin: .4rem 0 }
.notice { background: var(--warn); border-left: .35rem solid var(--warn-line); padding: .6rem .8rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 0 }
.cards div { background: var(--card); padding: .6rem .8rem; border-radius: .4rem }
.cards dt { font-size: .85rem; color: var(--soft) } .cards dd { margin: 0; font-size: 1.5rem }
.cards small { font-size: .8rem; white-space: nowrap }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse; width: 100%; font-size: .9rem }
caption { text-align: left; font-weight: 600; padding: .3rem 0 } thead th { color: var(--soft); font-weight: 600 }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums } td { overflow-wrap: anywhere; min-width: 4.5rem }
tbody th { font-weight: normal; min-width: 7rem } td:last-child { min-width: 8rem }
.bar { display: block; max-width: 12rem; height: .8rem; margin-top: .3rem; background: var(--card) }
.bar span { display: block; height: 100%; background: var(--in) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem }
figure { margin: 0; min-width: 0 } svg { display: block; width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--soft) }
.in { fill: var(--in); background: var(--in) } .out { fill: var(--out); background: var(--out) }
.axis { stroke: var(--soft) } svg .cut { stroke: var(--cut); stroke-width: 1.5; stroke-dasharray: 4 2 }
svg text.cut { stroke: none; fill: var(--cut); font-weight: 600 }
.legend span { display: inline-block; width: .8rem; height: .8rem; margin-left: .6rem }
figcaption, summary { font-size: .85rem } summary { cursor: pointer }
.wall { list-style: none; margin: .5rem 0; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(10rem, 45%), 1fr)) }
.wall li { background: var(--card); border-radius: .4rem; padding: .5rem; overflow-wrap: anywhere }
.wall img { display: block; width: 100%; height: 8rem; object-fit: contain }
.wall dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .5rem; margin: .2rem 0 }
.wall dd { margin: 0; text-align: right }
.wall small { display: block } .yes, .no { font-weight: 600 } .yes { color: var(--in) } .no { color: var(--cut) }
.veil { display: block; position: relative; overflow: hidden; cursor: pointer }
.veil input { position: absolute; opacity: 0 }
.veil input:not(:checked) + img { filter: blur(1.2rem) }
.veil input:focus-visible ~ span { outline: 3px solid var(--cut) }
.veil span { display: block; position: relative; background: var(--card); text-align: center; font-size: .8rem }
.veil input:checked ~ span { visibility: hidden }
"""

# Control characters, and those that turn the direction of what follows, so that a name cannot pose as another.
_UNSAFE = {
    c: "\ufffd" for r in ((0, 32), (127, 160), (0x200E, 0x2010), (0x202A, 0x202F), (0x2066, 0x206A)) for c in range(*r)
} | dict.fromkeys((9, 10, 13), " ")


def _text(value: Any, most: int = 300) -> str:
    """Any value as text that can stand in an element or a quoted attribute."""
    text = str("" if value is None else value).encode("utf-8", "replace").decode().translate(_UNSAFE)
    return html.escape(text if len(text) <= most else text[: most - 1] + "…", quote=True)


def _url(url: Any, most: int = 300) -> str:
    """Show a URL without what may be a secret in it: user, password and the query of a signed address."""
    text = re.sub(r"//[^/@]*@", "//", str(url or ""))
    return _text(text.partition("?")[0] if "://" in text else text, most)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not np.isfinite(value):
        return "none"
    whole = value == int(value) or (abs(value) >= 1000 and digits <= 3)
    return f"{value:,.0f}" if whole and abs(value) < 1e15 else f"{value:.{digits}g}".replace("e-0", "e-")


def _score(value: float | None) -> str:
    # More digits than one reads, so that what a cut at 5 drops does not look like a 5.
    return "< 0.0001" if value is not None and 0 <= value < 1e-4 else _number(value, 5)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _bar(part: int, whole: int) -> str:
    return f'<span class="bar"><span style="width:{100 * part / whole if whole else 0:.2f}%"></span></span>'


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of each row is its heading."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
        for first, *cells in rows
    )
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<div class="wide" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def _counts(result: RunResult, ok: int) -> str:
    counts = {"samples": result.samples, "readable": ok}
    if result.kept is not None:
        counts |= {"kept": result.kept, "dropped by the conditions": ok - result.kept}
    counts["failed"] = result.samples - ok
    items = "".join(
        f"<div><dt>{name}</dt><dd>{n:,} <small>{_share(n, result.samples)}</small></dd></div>"
        for name, n in counts.items()
    )
    rate = result.images_scored / result.scoring_seconds if result.scoring_seconds else 0
    words = [f"Scored in this run: {_many(result.shards_scored, 'shard')} with {_many(result.images_scored, 'image')}"]
    if result.images_scored:
        words[0] += f" ({rate:,.1f} images/s)"
    words.append(f"taken over from an earlier one: {_many(result.shards_taken_over, 'shard')}")
    if result.kept is not None:
        size = sum(shard.get("nbytes", 0) for shard in result.written)
        words.append(f"written: {_many(len(result.written), 'curated shard')} ({size / 1e6:,.1f} MB)")
    return f'<dl class="cards">{items}</dl><p>{"; ".join(words)}. {result.seconds:,.0f} s in all.</p>\n'


def _funnel(result: RunResult, ok: int) -> str:
    if not result.funnel:
        return "<p>No condition was set: every readable sample is kept.</p>\n" if result.kept is not None else ""
    start = [("all samples", "", f"{result.samples:,}", "", _bar(result.samples, result.samples))]
    start.append(("readable", "", f"{ok:,}", f"{result.samples - ok:,}", _bar(ok, result.samples)))
    rows, before = [], ok
    for step in result.funnel:
        removed, before = before - step["left"], step["left"]
        cells = (f"{step['alone']:,}", f"{before:,}", f"{removed:,}", _bar(before, result.samples))
        rows.append((f"<code>{_text(step['condition'])}</code>", *cells))
    head = ("Condition", "Pass it alone", "Left after it", "Removed by it", "Share of all samples left")
    return _table("What each condition leaves, in order", head, [*start, *rows])


def _figure(name: str, histogram: _Histogram, cuts: Sequence[_Cut], selected: bool) -> str:
    """One histogram: an inline SVG, and its numbers as a table."""
    missing = f"; {histogram.missing:,} without a value" if histogram.missing else ""
    if not histogram.total:
        return f"<figure><h3>{_text(name)}</h3><figcaption>no values{missing}</figcaption></figure>\n"
    scale = histogram.scale
    edges, bars = histogram.bars([c.number for c in cuts])
    wide, top, floor = 400.0, 26.0, 150.0
    low, high, peak = float(edges[0]), float(edges[-1]), int(bars.sum(0).max())

    # Enough digits to tell one edge from the next; probabilities near 1 need them most.
    fine = 1 + int(np.ceil(np.log10(max(abs(low), abs(high)) / (edges[1] - low)))) if scale is _LINEAR else 3

    def show(value: float) -> str:
        return _number(value, 9 if scale is _PROBABILITY and value > 0.99 else max(fine, 3))

    def x(position: float) -> float:
        return 4 + (wide - 8) * (position - low) / (high - low)

    shapes, numbers = [], []
    for left, right, dropped, kept in zip(edges[:-1], edges[1:], *bars, strict=True):
        if not dropped + kept:
            continue
        ends = show(scale.inverse(left)), show(scale.inverse(right))
        cells = (f"{dropped + kept:,}", f"{kept:,}") if selected else (f"{dropped + kept:,}",)
        numbers.append((f"{ends[0]} to {ends[1]}", *cells))
        tip = f"{ends[0]} to {ends[1]}: {dropped + kept:,} images" + (f", {kept:,} kept" if selected else "")
        base, rects = floor, ""
        for kind, count in (("in", kept), ("out", dropped)):
            tall = (floor - top) * count / peak
            base -= tall
            if count:
                rects += f'<rect class="{kind}" data-count="{count}" x="{x(left):.1f}" y="{base:.1f}" '
                rects += f'width="{max(x(right) - x(left) - 0.8, 0.8):.1f}" height="{tall:.1f}"/>'
        shapes.append(f"<g><title>{tip}</title>{rects}</g>")
    placed: list[float] = []
    for value in scale.ticks(scale.inverse(low), scale.inverse(high)):
        at = x(float(scale.forward(np.array(value, np.float64))))
        if 4 <= at <= wide - 4 and all(abs(at - other) >= 48 for other in placed):
            placed.append(at)
            anchor = "start" if at < 20 else "end" if at > wide - 20 else "middle"
            shapes.append(f'<path class="axis" d="M{at:.1f} {floor}v4"/>')
            shapes.append(f'<text x="{at:.1f}" y="{floor + 15}" text-anchor="{anchor}">{show(value)}</text>')
    for cut in cuts:
        at = x(float(scale.forward(np.array(cut.number, np.float64))))
        anchor = "start" if at < wide / 2 else "end"
        shapes.append(f'<path class="cut" d="M{at:.1f} {top - 8}V{floor}"/>')
        shapes.append(
            f'<text class="cut" x="{at:.1f}" y="{top - 12}" text-anchor="{anchor}">{_text(cut.text, 60)}</text>'
        )
    span = f"{show(histogram.extremes[0])} to {show(histogram.extremes[1])}"
    words = f"{histogram.total:,} images, {span}, median about {show(histogram.median())}"
    axis = {_PROBABILITY: " Logit axis.", _LOG: " Logarithmic axis."}.get(scale, "")
    label = f"Histogram of {_text(name)}: {words}"
    head = ("Range", "Images", "Kept") if selected else ("Range", "Images")
    return (
        f'<figure><h3>{_text(name)}</h3><svg viewBox="0 0 {wide:.0f} 172" role="img" aria-label="{label}">'
        f'<path class="axis" d="M0 {floor}H{wide}"/><text x="2" y="{top - 2}">{peak:,}</text>{"".join(shapes)}</svg>'
        f"<figcaption>{words}{missing}.{axis}<details><summary>Numbers</summary>"
        f"{_table(f'Images by {_text(name)}', head, numbers)}</details></figcaption></figure>\n"
    )


def _card(row: Mapping[str, Any], uri: str, scores: Sequence[str], selected: bool) -> str:
    nsfw = row.get("nsfw_score")
    caption = _text(row.get("caption") or "")
    name = caption or f"image {_text(row.get('key'))}, without caption"
    picture = f'<img src="{uri}" alt="{name}" title="{caption}">'
    # A score that is missing where there is a column for it says nothing good.
    if "nsfw_score" in row and not (nsfw is not None and nsfw < _NSFW):
        picture = (
            f'<label class="veil"><input type="checkbox" aria-label="Show this picture (NSFW {_number(nsfw)})">'
            f"{picture}<span>NSFW {_number(nsfw)}: show</span></label>"
        )
    values = "".join(f"<dt>{_text(n.removesuffix('_score'))}</dt><dd>{_score(row.get(n))}</dd>" for n in scores)
    size = f"{row['width']} × {row['height']}" if row.get("width") and row.get("height") else ""
    mark = f'<span class="{"yes" if row["kept"] else "no"}">{"kept" if row["kept"] else "dropped"}</span> '
    credit = ", ".join(_text(row[c], 80) for c in _CREDITS if row.get(c) is not None)
    return (
        f"<li><figure>{picture}<figcaption>{mark if selected else ''}{size}<dl>{values}</dl>"
        f'<code title="{_url(row.get("shard"))}">{_text(row.get("key"), 80)}</code>'
        f"{f'<small>{credit}</small>' if credit else ''}</figcaption></figure></li>\n"
    )


def _walls(gathered: _Gathered, images: Mapping[_Place, str], selected: bool) -> str:
    parts = []
    for wall in gathered.walls.values():
        rows = [row for _, row in wall.rows]
        if not rows or (not selected and "dropped" in wall.title):
            continue
        cards = []
        for row in rows:
            uri = images.get((row.get("shard", ""), row.get("offset", -1)))
            if uri is not None:
                cards.append(_card(row, uri, gathered.scores, selected))
        left_out = len(rows) - len(cards)
        note = f" {left_out} left out: no thumbnail could be made." if left_out else ""
        title = wall.title if selected else wall.title.removesuffix(" kept")
        parts.append(f'<h3>{title}</h3><p>{_text(wall.note)}{note}</p><ul class="wall">{"".join(cards)}</ul>\n')
    if not parts:
        return "<p>There is no readable image.</p>\n"
    if "nsfw_score" in gathered.histograms:
        how = f"Pictures with nsfw_score from {_NSFW} up, or without one, are blurred until you choose to see them."
    else:
        how = "There is no NSFW score, so nothing is blurred."
    return f"<p>{how}</p>\n" + "".join(parts)


def _errors(result: RunResult, examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    bad = {s: n for s, n in result.by_status.items() if s != "ok"}
    if not bad:
        return "<p>None: every sample was readable.</p>\n"
    rows = [
        (_text(s), f"{n:,}", _share(n, result.samples), _text(STATUSES.get(s, "").replace("`", "")))
        for s, n in bad.items()
    ]
    out = _table("Failed samples by status", ("Status", "Samples", "Share", "Meaning"), rows)
    for status, count in bad.items():
        shown = [
            (
                f"<code>{_text(row.get('key'), 120)}</code>",
                f"<code>{_url(row.get('shard'))}</code>",
                _text(row.get("error_message")),
            )
            for row in examples.get(status, ())
        ]
        if shown:
            caption = f"{_text(status)}: the first {len(shown)} of {count:,}"
            out += _table(caption, ("Key", "Shard", "Message"), shown)
    return out


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None and value != {}:
        yield name, value


def _run(result: RunResult, where: str | None) -> str:
    made = result.provenance
    encoder, decode = made.get("encoder", {}), made.get("decode", {})
    weights = encoder.get("pretrained") or encoder.get("weights_sha256") or encoder.get("starter_sha256") or "unknown"
    rows = [("Kept where", f"<code>{_text(where or 'every readable sample', 2000)}</code>")]
    rows.append(("Model", f"{_text(encoder.get('model', 'unknown'))}, weights <code>{_text(weights)}</code>"))
    heads = made.get("heads", {})
    rows += [(_text(column), f"head {_text(head.get('name', head))}") for column, head in heads.items()]
    rows.append(("Decoder", _text(f"{decode.get('decoder', 'unknown')} on {decode.get('device', 'unknown')}")))
    rows.append(("Versions", _text(", ".join(f"{n} {v}" for n, v in made.get("versions", {}).items()))))
    if result.kept is None:
        del rows[0]
    everything = [(_text(n), f"<code>{_text(v)}</code>") for n, v in _flat(made)]
    return (
        _table("Settings", ("What", "Value"), rows)
        + f"<details><summary>Everything that the scores depend on</summary>"
        f"{_table('Provenance', ('What', 'Value'), everything)}</details>\n"
    )


def write_report(
    folder: str,
    tables: Sequence[str],
    where: str | None,
    result: RunResult,
    storage_options: Mapping[str, Any],
    source_options: Mapping[str, Any] | None = None,
) -> str:
    """Write the page of a run.

    Parameters
    ----------
    folder : str
        URL of the run's folder.
    tables : sequence of str
        URLs of its score files. They are read once, in batches, without the embeddings (unless `where` uses them).
    where : str or None
        The expression that rows were kept by, besides ``status == 'ok'``.
    result : RunResult
        Counts, provenance and notes.
    storage_options : mapping
        For the fsspec file system of `folder` and `tables`.
    source_options : mapping, optional
        For the one of the source shards, from which thumbnails are made.

    Returns
    -------
    str
        URL of ``report.html``: one file, below 3 MB, that needs nothing else and loads nothing from outside.

    Raises
    ------
    OSError, pyarrow.ArrowException
        If a score file cannot be read, or the page not be written. A shard that cannot be read costs its thumbnails
        only; the page counts them.
    """
    gathered = _gather(tables, where, storage_options)
    selected = result.kept is not None
    ok = result.by_status.get("ok", 0) if result.by_status else result.samples
    upright = bool(result.provenance.get("decode", {}).get("adjust_orientation"))
    rows = (row for wall in gathered.walls.values() for _, row in wall.rows)
    images = _thumbnails(rows, upright, source_options)

    notes = [_text(note, 1000) for note in result.notes]
    if gathered.rows != result.samples or (selected and gathered.kept != result.kept):
        notes.append(
            f"The score files now hold {gathered.rows:,} samples and would keep {gathered.kept:,}; the run counted "
            f"{result.samples:,} and {_number(result.kept)}. Histograms and pictures show the files, counts the run."
        )
    cuts: dict[str, list[_Cut]] = {}
    for cut in gathered.cuts:
        cuts.setdefault(cut.column, []).append(cut)
    figures = [_figure(n, h, cuts.get(n, []), selected) for n, h in gathered.histograms.items()]
    legend = (
        '<p class="legend"><span class="in"></span> kept <span class="out"></span> not kept</p>' if selected else ""
    )
    title = _text(folder.rstrip("/").rpartition("/")[2] or folder, 100)
    now = datetime.now(UTC)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>Curation report: {title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Curation report <small>{title}, <time datetime="{now:%Y-%m-%dT%H:%MZ}">{now:%Y-%m-%d %H:%M} UTC</time>'
        "</small></h1>\n",
        "".join(f'<p class="notice" role="note"><strong>Note:</strong> {note}</p>\n' for note in notes),
        _section("Counts", _counts(result, ok)),
        _section("Selection", _funnel(result, ok)) if selected else "",
        _section("Scores", f'{legend}<div class="figures">{"".join(figures)}</div>\n'),
        _section("Pictures", _walls(gathered, images, selected)),
        _section("Errors", _errors(result, gathered.examples)),
        _section("What was run", _run(result, where)),
        "</main>\n</body>\n</html>\n",
    ]
    target = files.join(folder, "report.html")
    with files.write_whole(target, storage_options) as file:
        file.write("".join(parts).encode())
    return target


def _section(title: str, content: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{content}</section>\n'
