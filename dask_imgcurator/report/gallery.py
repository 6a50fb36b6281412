"""Pictures of a table's rows in a notebook: sorted, a page at a time, from the locators that rows carry.

    dic.show(scores, sort_by="aesthetic_score")
    dic.show(scores, sort_by="nsfw_score", ascending=False, where="width >= 512").page(3)

Only what a page shows is read: a few columns of the table, never embeddings, and then the bytes of its pictures.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, is_dask
from ..engine.frames import require_columns
from ..engine.run import reduce
from ..images.thumbnails import Place, make_thumbnails
from ..schema import kind_of
from ..select.ranks import ValueOrder, arrow_type, value_order
from ..select.where import Where, filter_frame
from .histograms import LOWER_IS_BETTER
from .render import PARTS_CSS, ROW, card, many, plain, text, veils_note

__all__ = ["Gallery", "Pictures", "frame", "require_locators", "show", "widgets_of"]

LOCATORS = ("shard", "offset", "nbytes")

_AHEAD = 4  # pages that are taken at once, so that the next ones need no pass

# Colours that follow those of the text around, whatever theme the notebook has; names within a scope of their own.
_FRAME_CSS = f"""
.imgcurator {{ --card: color-mix(in srgb, currentColor 7%, transparent);
  --soft: color-mix(in srgb, currentColor 70%, transparent); --line: color-mix(in srgb, currentColor 20%, transparent);
  --text: currentColor; --in: color-mix(in srgb, #2a7de1 88%, currentColor); --cut: #d9483b; --own: #d29a3a;
  --out: color-mix(in srgb, currentColor 35%, transparent); font: 14px/1.45 system-ui, sans-serif;
  color: var(--jp-content-font-color1, var(--vscode-foreground, inherit));
* {{ box-sizing: border-box }}
p {{ margin: .3rem 0 }} p small, figcaption {{ color: var(--soft) }}
{PARTS_CSS}
&&& ul.wall {{ padding: 0; margin: .5rem 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(8rem, 45%), 1fr)) }}
&&& .wall li {{ margin: 0 }} &&& figcaption {{ font-size: 12px }} &&& .wall dl {{ gap: 0 .3rem }}
&&& .wall img {{ max-width: 100%; margin: 0; background: none }}
&&& .wall dl {{ grid-template-columns: auto minmax(0, 1fr) }}
&&& dl, &&& dt, &&& dd {{ float: none; width: auto; padding: 0; font-weight: normal; overflow-wrap: normal }}
&&& dd {{ overflow-wrap: anywhere }}
&&& code {{ font-size: .85em; overflow-wrap: anywhere; background: none; color: inherit; padding: 0 }}
}}"""


def show(
    df: Any,
    n: int = 24,
    sort_by: str | None = None,
    ascending: bool | None = None,
    page: int = 0,
    columns: Sequence[str] | None = None,
    *,
    where: str | Where | None = None,
    upright: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Gallery:
    """Show a table's pictures in a notebook, with their scores.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With ``shard``, ``offset`` and ``nbytes``. Best a score table (`read_scores`), or a frame that is persisted: of
        a lazy `embed`, a sorted page decodes all images, and another page may do so again.
    n : int
        Pictures on a page.
    sort_by : str, optional
        A column of numbers. Rows without a value come last, equal ones in the order of the table. By default rows are
        in the order of the table, of which then only the first partitions are read.
    ascending : bool, optional
        Whether the smallest come first; by default the best do: the largest, but of ``nsfw_score`` and ``blur`` the
        smallest.
    page : int
        From 0.
    columns : sequence of str, optional
        Columns whose values are shown besides `sort_by`; by default those that end in ``_score``.
    where : str or Where, optional
        Only rows for which this is true.
    upright : bool
        Whether the orientation that a photograph's EXIF data name is applied.
    storage_options : mapping, optional
        For the fsspec file systems of the shards.

    Returns
    -------
    Gallery
        Shows itself in a notebook; has ``next()``, ``previous()`` and ``page(i)``, and with ipywidgets ``pager()``.

    Raises
    ------
    ValueError
        If `df` lacks a column, one holds vectors, `n` is not positive, or there is no such page.
    SelectionError
        If `sort_by` is not a column of numbers.
    WhereError
        Where the expression has a mistake.

    Notes
    -----
    To sort a Dask DataFrame, each partition gives its first rows, a few pages of them, and these are merged on the
    workers: one pass over the columns that are shown, and none for the next pages. Pictures are read by a seek each.
    Those with an ``nsfw_score`` from 0.5 up, or without one where there is the column, are blurred until clicked.

    Examples
    --------
    >>> show(read_scores("run/scores"), sort_by="aesthetic_score")  # doctest: +SKIP
    """
    require_locators(df, "show")
    if n < 1:
        raise ValueError(f"n={n}: show at least 1 picture")
    values = _values(df, sort_by, columns)
    lower = sort_by in LOWER_IS_BETTER if ascending is None else ascending
    order = None if sort_by is None else value_order(df, sort_by, largest=not lower)
    if where is not None:
        df = filter_frame(df, where)
    wanted = [c for c in dict.fromkeys((*ROW, *values, "nsfw_score")) if c in df.columns]
    source: _Source = _InOrder(df, wanted) if order is None else _Sorted(df, wanted, order)
    how = "" if sort_by is None else f"by {sort_by}, {'lowest' if lower else 'highest'} first"
    return Gallery(source, Pictures(upright, storage_options), n, page, values, how)


def require_locators(df: Any, step: str) -> None:
    """Tell at once of a frame whose pictures cannot be found."""
    require_columns(df, LOCATORS, step, "keep these columns, by which pictures are found")


def _values(df: Any, sort_by: str | None, columns: Sequence[str] | None) -> list[str]:
    """Columns whose values are shown."""
    if isinstance(columns, str):
        columns = [columns]
    if columns is None:
        columns = [c for c in df.columns if str(c).endswith("_score") and kind_of(arrow_type(df, c)) == "number"]
    chosen = list(dict.fromkeys(([] if sort_by is None else [sort_by]) + list(columns)))
    require_columns(df, chosen, "show", "name columns that there are")
    for name in chosen:
        if kind_of(arrow_type(df, name)) == "list":
            raise ValueError(f"column {name!r} holds vectors, which cannot be shown: leave it out of columns=")
    return chosen


# --- rows -----------------------------------------------------------------------------------------


class _Source(Protocol):
    """Rows in some order; `total` is None as long as it is not known."""

    total: int | None

    def take(self, start: int, stop: int) -> list[dict[str, Any]]: ...


@dataclass
class _InOrder:
    """Rows in the order of the frame; of a Dask frame, each partition is read once, and none before it is needed."""

    df: Any
    columns: list[str]
    total: int | None = None
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _read: int = 0

    def take(self, start: int, stop: int) -> list[dict[str, Any]]:
        if not is_dask(self.df):
            self.total = len(self.df)
            return _to_host(self.df.iloc[start:stop], self.columns).to_pylist()
        narrow, ahead = self.df[self.columns], 1
        while len(self._rows) < stop and self._read < narrow.npartitions:
            some = narrow.partitions[self._read : self._read + ahead]
            self._rows += reduce(some, _to_host, _joined, self.columns).to_pylist()
            self._read, ahead = self._read + ahead, min(2 * ahead, 64)
        self.total = len(self._rows) if self._read >= narrow.npartitions else None
        return self._rows[start:stop]


@dataclass
class _Sorted:
    """Rows in the order of a column, those without a value last, equal ones in the order of the frame."""

    df: Any
    columns: list[str]
    order: ValueOrder
    total: int | None = None
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def take(self, start: int, stop: int) -> list[dict[str, Any]]:
        if self.total is None or len(self._rows) < min(stop, self.total):
            most = max(stop + (_AHEAD - 1) * (stop - start), 2 * len(self._rows))
            narrow = self.df[self.columns]
            found = reduce(narrow, _first, partial(_merge, most=most), self.order, self.columns, most)
            self.total, self._rows = found.total, found.table.to_pylist()
        return self._rows[start:stop]


@dataclass
class _First:
    """The first rows of a partition, or of several: their keys, whether they have one, and the rows themselves."""

    total: int
    keys: np.ndarray
    known: np.ndarray
    table: pa.Table


def _to_host(frame: Any, columns: list[str]) -> pa.Table:
    return backend_of(frame).to_host(frame, columns)


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive")


def _first(frame: Any, order: ValueOrder, columns: list[str], most: int) -> _First:
    keys, known = order.keys(_to_host(frame, [order.column]))
    by = np.lexsort((keys, ~known))[:most]  # which is stable
    return _First(len(frame), keys[by], known[by], _to_host(frame.iloc[by], columns))


def _merge(found: Sequence[_First], most: int) -> _First:
    keys, known = (np.concatenate([getattr(part, name) for part in found]) for name in ("keys", "known"))
    by = np.lexsort((keys, ~known))[:most]
    table = pa.concat_tables([part.table for part in found], promote_options="permissive").take(by)
    return _First(sum(part.total for part in found), keys[by], known[by], table)


# --- pictures and pages ---------------------------------------------------------------------------


@dataclass
class Pictures:
    """Thumbnails of rows, each made once.

    Attributes
    ----------
    upright, storage_options
        As for `thumbnails.make_thumbnails`.
    """

    upright: bool = False
    storage_options: Mapping[str, Any] | None = None
    _made: dict[Place, str | None] = field(default_factory=dict)

    def of(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Return the ``data:`` URI of each row's picture, None where none can be made."""
        new = [row for row in rows if _place(row) not in self._made]
        found = make_thumbnails(new, upright=self.upright, storage_options=self.storage_options)
        self._made.update({_place(row): found.get(_place(row)) for row in new})
        return [self._made[_place(row)] for row in rows]


def _place(row: Mapping[str, Any]) -> Place:
    return row["shard"], row["offset"]


def frame(content: str) -> str:
    """Put HTML into a scope of its own, so that its styles change nothing else in a notebook."""
    return f'<div class="imgcurator"><style>{_FRAME_CSS}</style>\n{content}</div>\n'


def widgets_of(what: str) -> Any:
    """Import ipywidgets.

    Parameters
    ----------
    what : str
        What needs it, for the error.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed, with the remedy.
    """
    try:
        return importlib.import_module("ipywidgets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs ipywidgets, which is not installed: pip install "dask-imgcurator[notebook]"', name=error.name
        ) from error


class Gallery:
    """A page of pictures, which a notebook shows; other pages are made from it. `show` makes the first.

    Attributes
    ----------
    rows : list of dict
        The rows of the page, with the columns that are shown.
    number : int
        Of the page, from 0.
    total : int or None
        Rows on all pages; None as long as the table was not read to its end.
    """

    def __init__(
        self, source: _Source, pictures: Pictures, n: int, number: int, values: Sequence[str], how: str
    ) -> None:
        self._source, self._pictures, self._n, self._values, self._how = source, pictures, n, list(values), how
        self.rows = source.take(n * number, n * (number + 1)) if number >= 0 else []
        self.number, self.total = number, source.total
        if number and not self.rows:
            last = (
                f"the last one is {max(0, (self.total or 0) - 1) // n}" if self.total is not None else "they begin at 0"
            )
            raise ValueError(f"page={number}: there is no such page, {last}")

    def page(self, number: int) -> Gallery:
        """Return another page, from 0; ValueError if there is none."""
        return Gallery(self._source, self._pictures, self._n, number, self._values, self._how)

    def next(self) -> Gallery:
        """Return the page after this one; after the last, the last."""
        more = self._source.take(self._n * (self.number + 1), self._n * (self.number + 2))
        return self.page(self.number + 1) if more else self.page(self.number)

    def previous(self) -> Gallery:
        """Return the page before this one; before the first, the first."""
        return self.page(max(0, self.number - 1))

    @property
    def heading(self) -> str:
        """Which rows these are, in words."""
        if not self.rows:
            return "no rows"
        first = self._n * self.number
        all_ = "" if self.total is None else f" of {self.total:,}"
        where = f"page {self.number}" + ("" if self.total is None else f" (last: {(self.total - 1) // self._n})")
        return ", ".join(filter(None, [f"rows {first + 1:,} to {first + len(self.rows):,}{all_}", where, self._how]))

    def html(self) -> str:
        """Return the page as HTML, pictures and all, without the scope that `frame` puts around it."""
        uris = self._pictures.of(self.rows)
        cards = "".join(card(row, uri, self._values) for row, uri in zip(self.rows, uris, strict=True))
        note = veils_note(True) if any("nsfw_score" in row for row in self.rows) else ""
        none = sum(uri is None for uri in uris)
        note += f" {many(none, 'row')} without a picture." if none else ""
        return f'<p>{text(self.heading)}<br><small>{note}</small></p><ul class="wall">{cards}</ul>\n'

    def pager(self) -> Any:
        """Return an ipywidgets box of this page with buttons to turn it.

        Raises
        ------
        ModuleNotFoundError
            If ipywidgets is not installed.
        """
        widgets = widgets_of("pager()")
        shown, content = self, widgets.HTML(frame(self.html()))
        back, on = (widgets.Button(description=words) for words in ("‹ previous", "next ›"))

        def turn(button: Any) -> None:
            nonlocal shown
            shown = shown.next() if button is on else shown.previous()
            content.value = frame(shown.html())
            mark()

        def mark() -> None:
            back.disabled = shown.number == 0
            on.disabled = shown.total is not None and self._n * (shown.number + 1) >= shown.total

        for button in (back, on):
            button.on_click(turn)
        mark()
        return widgets.VBox([widgets.HBox([back, on]), content])

    def _repr_html_(self) -> str:
        return frame(self.html())

    def __repr__(self) -> str:
        names = list(dict.fromkeys(["key", *self._values]))
        table = pd.DataFrame([{name: _cell(row.get(name)) for name in names} for row in self.rows], columns=names)
        return f"{plain(self.heading)}\n{table.to_string(index=False)}" if self.rows else self.heading


def _cell(value: Any) -> Any:
    return plain(value, 60) if isinstance(value, str) else value
