"""Parts of self-contained HTML pages: safe text, tables, cards with pictures, and the shell around them.

Captions, keys, paths and messages come from strangers: every text goes through `text`. The pages' own policy forbids
anything from outside the file, and every script but the one that is named in it by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..images.thumbnails import Place

__all__ = [
    "CREDITS",
    "CSS",
    "NSFW",
    "PARTS_CSS",
    "ROW",
    "bar",
    "card",
    "document",
    "figure_text",
    "many",
    "number",
    "plain",
    "section",
    "share",
    "table",
    "text",
    "url",
    "value_text",
    "veils_note",
    "wall",
]

#: From this nsfw_score on a picture is blurred until it is clicked.
NSFW = 0.5

#: Columns that say whom a picture is from; shown with it where a table has them.
CREDITS = ("license", "credit", "author", "attribution")

#: Columns that a card shows, besides scores.
ROW = ("key", "shard", "offset", "nbytes", "caption", "width", "height", "status", "error_message", *CREDITS)

_PAGE_CSS = """
:root { --back: #fff; --text: #1b1f24; --soft: #57606a; --line: #d4d8dd; --card: #f5f6f8;
  --in: #0b66c3; --own: #d98a00; --out: #aeb6c0;
  --cut: #b3261e; --warn: #fff4ce; --warn-line: #b98900 }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e7eaee; --soft: #a3abb5; --line: #3a4048;
  --card: #1e2329; --in: #58a6ff; --own: #e3a03a; --out: #646d78; --cut: #ff8b81; --warn: #382e0c;
  --warn-line: #d9a400 } }
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
tbody th { font-weight: normal; min-width: 7rem } @media (max-width: 40rem) { .bar { width: 4rem; margin: 0 } }
.bar { display: inline-block; width: 9rem; max-width: 100%; height: .8rem; margin-left: .5rem; background: var(--card) }
.bar span { display: block; height: 100%; background: var(--in) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem }
"""

#: Figures and cards: what a notebook needs too, within a scope of its own (`gallery.FRAME_CSS`).
PARTS_CSS = """
figure { margin: 0; min-width: 0 } svg { display: block; width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--soft) }
.own { fill: var(--own); background: var(--own) }
.in { fill: var(--in); background: var(--in) } .out { fill: var(--out); background: var(--out) }
.axis { stroke: var(--soft) } svg .cut { stroke: var(--cut); stroke-width: 1.5; stroke-dasharray: 4 2 }
svg text.cut { stroke: none; fill: var(--cut); font-weight: 600 }
.legend span { display: inline-block; width: .8rem; height: .8rem; margin-left: .6rem }
figcaption, summary { font-size: .85rem } summary { cursor: pointer }
.wall { list-style: none; margin: .5rem 0; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(10rem, 45%), 1fr)) }
.wall li { background: var(--card); border-radius: .4rem; padding: .5rem; overflow-wrap: anywhere }
.wall img { display: block; width: 100%; height: 8rem; object-fit: contain }
.wall .gone { height: 8rem; margin: 0; overflow: hidden; color: var(--soft); font-size: .8rem }
.wall dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .5rem; margin: .2rem 0 }
.wall dd { margin: 0; text-align: right }
.wall q { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; quotes: none }
.wall small { display: block } .yes, .no { font-weight: 600 } .yes { color: var(--in) } .no { color: var(--cut) }
.veil { display: block; position: relative; overflow: hidden; cursor: pointer }
.veil input { position: absolute; opacity: 0 }
.veil input:not(:checked) + img { filter: blur(1.2rem) }
.veil input:focus-visible ~ span { outline: 3px solid var(--cut) }
.veil span { display: block; position: relative; background: var(--card); text-align: center; font-size: .8rem }
.veil input:checked ~ span { visibility: hidden }
.veil input:checked ~ span { position: absolute }
"""

_LISTS_CSS = """
.groups { list-style: none; margin: .5rem 0; padding: 0; display: grid; gap: .8rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)) }
.groups > li { border-left: .3rem solid var(--line); padding-left: .7rem }
.try { margin: .5rem 0 0 } .try label { display: block } .try input { width: 100%; accent-color: var(--in) }
.try output { display: block; font-variant-numeric: tabular-nums } svg .moved { stroke: var(--text); stroke-width: 1.5 }
a { color: var(--in) }
"""

CSS = _PAGE_CSS + PARTS_CSS + _LISTS_CSS

# Control characters, and those that turn the direction of what follows, so that a name cannot pose as another.
_UNSAFE = {
    c: "\ufffd" for r in ((0, 32), (127, 160), (0x200E, 0x2010), (0x202A, 0x202F), (0x2066, 0x206A)) for c in range(*r)
} | dict.fromkeys((9, 10, 13), " ")


# --- text -----------------------------------------------------------------------------------------


def text(value: Any, most: int = 300) -> str:
    """Any value as text that can stand in an element or a quoted attribute; None is empty."""
    return html.escape(plain(value, most), quote=True)


def plain(value: Any, most: int = 300) -> str:
    """Any value as text on one line that hides nothing and moves no cursor, as a terminal can show it."""
    shown = str("" if value is None else value).encode("utf-8", "replace").decode().translate(_UNSAFE)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def url(value: Any, most: int = 300) -> str:
    """Show a URL without what may be a secret in it: user, password and the query of a signed address."""
    shown = re.sub(r"//[^/@]*@", "//", str(value or ""))
    return text(shown.partition("?")[0] if "://" in shown else shown, most)


def number(value: float | None, digits: int = 3) -> str:
    """A number in few digits."""
    if value is None or not np.isfinite(value):
        return "none"
    whole = value == int(value) or (abs(value) >= 1000 and digits <= 3)
    return f"{value:,.0f}" if whole and abs(value) < 1e15 else f"{value:.{digits}g}".replace("e-0", "e-")


def figure_text(value: float | None) -> str:
    """A score: with more digits than one reads, so that what a cut at 5 drops does not look like a 5."""
    return "< 0.0001" if value is not None and 0 < value < 1e-4 else number(value, 5)


def value_text(value: Any) -> str:
    """A value of any column, in few characters."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return text(value, 80)
    return figure_text(value)


def many(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def share(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def bar(part: int, whole: int) -> str:
    """A share as a bar."""
    return f'<span class="bar"><span style="width:{100 * part / whole if whole else 0:.2f}%"></span></span>'


# --- parts ----------------------------------------------------------------------------------------


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
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


def card(row: Mapping[str, Any], uri: str | None, scores: Sequence[str], mark: str = "") -> str:
    """A picture with what is known of it, as an item of a `wall`.

    Parameters
    ----------
    row : mapping
        Of the columns `ROW` and `scores`.
    uri : str or None
        The picture, as `make_thumbnails` makes it; None: the card says why there is none.
    scores : sequence of str
        Columns whose values are shown.
    mark : str
        HTML to begin the text with.

    Returns
    -------
    str
        HTML. The picture is blurred until it is clicked where ``nsfw_score`` is from `NSFW` up, or is missing where
        there is a column for it.
    """
    nsfw = row.get("nsfw_score")
    caption = text(row.get("caption") or "")
    name = caption or f"image {text(row.get('key'))}, without caption"
    # A score that is missing where there is a column for it says nothing good.
    veiled = "nsfw_score" in row and not (nsfw is not None and nsfw < NSFW)
    # Where a page is shown without its styles, one pixel tells nothing.
    pixel = 'width="1" height="1" ' if veiled else ""
    picture = f'<img {pixel}src="{uri}" alt="{name}" title="{caption}">'
    if uri is None:
        why = row.get("error_message") or "no picture: its bytes cannot be read or decoded here"
        picture = f'<p class="gone">{text(why, 120)}</p>'
    elif veiled:
        picture = (
            f'<label class="veil"><input type="checkbox" aria-label="Show this picture (NSFW {number(nsfw)})">'
            f"{picture}<span>NSFW {number(nsfw)}: show</span></label>"
        )
    values = "".join(f"<dt>{text(n.removesuffix('_score'))}</dt><dd>{value_text(row.get(n))}</dd>" for n in scores)
    size = f"{row['width']} × {row['height']}" if row.get("width") and row.get("height") else ""
    credit = ", ".join(text(row[c], 80) for c in CREDITS if row.get(c) is not None)
    said = f"<q>{text(row['caption'], 120)}</q>" if caption else ""
    return (
        f"<li><figure>{picture}<figcaption>{mark}{size}<dl>{values}</dl>"
        f"{said}"
        f'<code title="{url(row.get("shard"))}">{text(row.get("key"), 80)}</code>'
        f"{f'<small>{credit}</small>' if credit else ''}</figcaption></figure></li>\n"
    )


def wall(
    rows: Sequence[tuple[Mapping[str, Any], str]],
    images: Mapping[Place, str],
    scores: Sequence[str],
    title: str = "",
    note: str = "",
) -> str:
    """Cards beside each other.

    Parameters
    ----------
    rows : sequence of (mapping, str)
        Rows, and the mark of each.
    images : mapping
        Of `make_thumbnails`.
    scores : sequence of str
        Columns whose values are shown.
    title, note : str
        What they are; any text.

    Returns
    -------
    str
        HTML; of rows without a picture it says how many there are.
    """
    cards = []
    for row, mark in rows:
        uri = images.get((row.get("shard", ""), row.get("offset", -1)))
        if uri is not None:
            cards.append(card(row, uri, scores, mark))
    left_out = len(rows) - len(cards)
    notes = [text(note, 1000)] if note else []
    if left_out:
        notes.append(f"{left_out} left out: no thumbnail could be made.")
    head = f"<h3>{text(title)}</h3>" if title else ""
    head += f"<p>{' '.join(notes)}</p>" if notes else ""
    return f'{head}<ul class="wall">{"".join(cards)}</ul>\n'


def veils_note(scored: bool) -> str:
    """Say which pictures are blurred."""
    if scored:
        return f"Pictures with nsfw_score from {NSFW} up, or without one, are blurred until you choose to see them."
    return "There is no NSFW score, so nothing is blurred."


def section(title: str, content: str) -> str:
    """A part of a page under its own heading."""
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{content}</section>\n'


def document(kind: str, title: str, notes: Sequence[str], sections: Iterable[str], script: str = "") -> str:
    """A whole page that needs nothing else and loads nothing from outside.

    Parameters
    ----------
    kind : str
        What it is ("Curation report").
    title : str
        Of what; any text.
    notes : sequence of str
        Texts that stand first, marked.
    sections : iterable of str
        HTML.
    script : str
        The only one that may run; the page is complete without it.

    Returns
    -------
    str
        HTML.
    """
    now, title = datetime.now(UTC), text(title, 100)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; " if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {allowed}img-src data:; '
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{kind}: {title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{kind} <small>{title}, <time datetime="{now:%Y-%m-%dT%H:%MZ}">{now:%Y-%m-%d %H:%M} UTC</time>'
        "</small></h1>\n"
        + "".join(f'<p class="notice" role="note"><strong>Note:</strong> {text(n, 1000)}</p>\n' for n in notes)
        + "".join(sections)
        + "</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )
