"""Self-contained HTML from the templates beside this module, and the formatting of texts and numbers on pages.

Captions, keys, paths and messages may come from anyone. All template output is therefore escaped, shortened and
stripped of characters that hide or move text, unless a template marks it as HTML. A page's own policy forbids
everything from outside the file, and all scripts except those whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

#: Pictures with at least this nsfw_score are blurred until clicked.
NSFW = 0.5

#: Columns with a picture's credits; shown with it if a table has them.
CREDITS = ("license", "credit", "author", "attribution")

#: Columns on a card, besides scores.
ROW = ("key", "shard", "offset", "nbytes", "caption", "width", "height", "status", "error_message", *CREDITS)

# Control characters, and ones that change the direction of text, by which a name could pose as another.
_UNSAFE = {
    c: "\ufffd" for r in ((0, 32), (127, 160), (0x200E, 0x2010), (0x202A, 0x202F), (0x2066, 0x206A)) for c in range(*r)
} | dict.fromkeys((9, 10, 13), " ")


def plain(value: Any, most: int = 300) -> str:
    """Any value as one line of plain text without control characters, for pages and terminals; None is empty."""
    shown = str("" if value is None else value).encode("utf-8", "replace").decode().translate(_UNSAFE)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def without_secrets(url: Any) -> str:
    """A URL without user, password and query, which may be a signature."""
    shown = re.sub(r"//[^/@]*@", "//", str(url or ""))
    return shown.partition("?")[0] if "://" in shown else shown


def number(value: float | None, digits: int = 3) -> str:
    """A number with few digits."""
    if value is None or not np.isfinite(value):
        return "none"
    whole = value == int(value) or (abs(value) >= 1000 and digits <= 3)
    return f"{value:,.0f}" if whole and abs(value) < 1e15 else f"{value:.{digits}g}".replace("e-0", "e-")


def _value(value: Any) -> str:
    """A column's value, short, but with enough digits to distinguish 4.999 from a cut at 5."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return plain(value, 80)
    return "< 0.0001" if value is not None and 0 < value < 1e-4 else number(value, 5)


def grouped(count: int) -> str:
    """A count with thousands separators."""
    return f"{count:,}"


def many(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def share(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _credit(row: Mapping[str, Any]) -> str:
    return ", ".join(plain(row[name], 80) for name in CREDITS if row.get(name) is not None)


def _pictured(
    rows: Iterable[Mapping[str, Any]], images: Mapping[tuple[str, int], str]
) -> list[tuple[Mapping[str, Any], str]]:
    """Rows that have a picture, with the picture; `images` come from `make_thumbnails`."""
    found = [(row, images.get((row.get("shard", ""), row.get("offset", -1)))) for row in rows]
    return [(row, uri) for row, uri in found if uri is not None]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def short(value: Any, most: int = 300) -> Markup:
        return escape(plain(value, most))

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "grouped": grouped,
        "many": many,
        "number": number,
        "pictured": _pictured,
        "px": "{:.1f}".format,
        "share": share,
        "short": short,
        "uri": lambda uri: escape(uri),  # not shortened
        "url": lambda url, most=300: short(without_secrets(url), most),
        "value": _value,
    }
    environment.globals |= {"NSFW": NSFW, "credit": _credit, "zip": zip}
    return environment


def render(template: str, **context: Any) -> str:
    """Fill a template."""
    return _environment().get_template(template).render(context)


def page(template: str, kind: str, title: str, notes: Sequence[str], *scripts: str, **context: Any) -> str:
    """Make a self-contained page: kind, title, notes, and scripts in addition to the one that enlarges pictures."""
    code = "\n".join(render(script) for script in ("enlarge.js", *scripts))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    context |= {"kind": kind, "title": title, "notes": notes, "script": code, "digest": digest}
    return render(template, now=datetime.now(UTC), contents=[], **context)


def frame(content: str) -> str:
    """Wrap HTML in its own scope, so that its styles affect nothing else in a notebook."""
    return render("frame.html.j2", content=content)
