"""Pictures of a table's rows in a notebook: sorted, a page at a time, read through the rows' locators.

    dic.show(scores, sort_by="aesthetic_score")
    dic.show(scores, sort_by="nsfw_score", ascending=False, where="width >= 512").page(3)

Only the data for a page are read: a few columns of the table, never embeddings, and the bytes of its pictures.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, is_dask
from ..engine.frames import require_columns
from ..engine.run import reduce
from ..images.thumbnails import make_thumbnails
from ..schema import kind_of
from ..select.ranks import ValueOrder, arrow_type, value_order
from ..select.where import Where, filter_frame
from .histograms import LOWER_IS_BETTER
from .render import ROW, frame, plain, render

LOCATORS = ("shard", "offset", "nbytes")

_AHEAD = 4  # pages read at once; the next ones need no pass

#: The first rows of one or several partitions: total number of rows, ranks (2, n), and the rows.
_First = tuple[int, np.ndarray, pa.Table]


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
        With ``shard``, ``offset`` and ``nbytes``; preferably a score table (`read_scores`) or a persisted frame,
        because a sorted page of a lazy `embed` decodes all images.
    n : int
        Pictures per page.
    sort_by : str, optional
        A column of numbers; rows without a value come last. By default, rows are in table order, and only the first
        partitions are read.
    ascending : bool, optional
        Whether the smallest come first; by default only for ``nsfw_score`` and ``blur``.
    page : int
        Page number, from 0.
    columns : sequence of str, optional
        Columns whose values are shown besides `sort_by`; by default those that end in ``_score``.
    where : str or Where, optional
        Only rows for which this is true.
    upright : bool
        Whether to apply the orientation in a photograph's EXIF data.
    storage_options : mapping, optional
        For the fsspec file systems of the shards.

    Returns
    -------
    Gallery
        Displays itself in a notebook; has ``next()``, ``previous()`` and ``page(i)``, and with ipywidgets ``pager()``.

    Raises
    ------
    ValueError, SelectionError, WhereError
        If a column is missing or unsuitable, the page does not exist, or the expression has a mistake.

    Notes
    -----
    Sorting takes one pass over the shown columns, which serves several pages. Pictures with an ``nsfw_score`` of 0.5 or
    more, or null, are blurred until clicked.

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
    source = _InOrder(df, wanted) if order is None else _Sorted(df, wanted, order)
    how = "" if sort_by is None else f"by {sort_by}, {'lowest' if lower else 'highest'} first"
    return Gallery(source, Pictures(upright, storage_options), n, values, how, page)


def require_locators(df: Any, step: str) -> None:
    """Raise ValueError for a frame whose pictures cannot be found."""
    require_columns(df, LOCATORS, step, "keep these columns, which locate the pictures")


def _values(df: Any, sort_by: str | None, columns: Sequence[str] | None) -> list[str]:
    """Columns whose values to show."""
    if isinstance(columns, str):
        columns = [columns]
    if columns is None:
        columns = [c for c in df.columns if str(c).endswith("_score") and kind_of(arrow_type(df, c)) == "number"]
    chosen = list(dict.fromkeys(([] if sort_by is None else [sort_by]) + list(columns)))
    require_columns(df, chosen, "show", "name existing columns")
    for name in chosen:
        if kind_of(arrow_type(df, name)) == "list":
            raise ValueError(f"column {name!r} holds vectors, which cannot be shown: leave it out of columns=")
    return chosen


# --- rows -----------------------------------------------------------------------------------------


@dataclass
class _InOrder:
    """Rows in frame order; each partition of a Dask frame is read once, when needed."""

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
    """Rows sorted by a column, missing values last, ties in frame order."""

    df: Any
    columns: list[str]
    order: ValueOrder
    total: int | None = None
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def take(self, start: int, stop: int) -> list[dict[str, Any]]:
        if self.total is None or len(self._rows) < min(stop, self.total):
            most = max(stop + (_AHEAD - 1) * (stop - start), 2 * len(self._rows))
            narrow = self.df[self.columns]
            merge = partial(_merge, most=most)
            self.total, _, table = reduce(narrow, _first, merge, self.order, self.columns, most)
            self._rows = table.to_pylist()
        return self._rows[start:stop]


def _to_host(part: Any, columns: list[str]) -> pa.Table:
    return backend_of(part).to_host(part, columns)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive")


def _first(part: Any, order: ValueOrder, columns: list[str], most: int) -> _First:
    keys, known = order.keys(_to_host(part, [order.column]))
    ranks = np.stack([~known, keys]).astype(np.uint64)  # rows without a value last
    by = np.lexsort(ranks[::-1])[:most]  # stable
    return len(part), ranks[:, by], _to_host(part.iloc[by], columns)


def _merge(found: Sequence[_First], most: int) -> _First:
    totals, ranks, tables = zip(*found, strict=True)
    together = np.hstack(ranks)
    by = np.lexsort(together[::-1])[:most]
    return sum(totals), together[:, by], _joined(tables).take(by)


# --- pictures and pages ---------------------------------------------------------------------------


@dataclass
class Pictures:
    """Thumbnails of rows, each made once; options as for `make_thumbnails`."""

    upright: bool = False
    storage_options: Mapping[str, Any] | None = None
    _made: dict[tuple[str, int], str | None] = field(default_factory=dict)

    def beside(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str | None]]:
        """Return rows with the ``data:`` URI of their picture, or None if it cannot be made."""
        places = [(row["shard"], row["offset"]) for row in rows]
        new = [row for row, place in zip(rows, places, strict=True) if place not in self._made]
        found = make_thumbnails(new, upright=self.upright, storage_options=self.storage_options)
        self._made |= {place: found.get(place) for place in places if place not in self._made}
        return [(row, self._made[place]) for row, place in zip(rows, places, strict=True)]


def widgets_of(what: str) -> Any:
    """Import ipywidgets for a feature; ModuleNotFoundError says how to install it."""
    try:
        return importlib.import_module("ipywidgets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs ipywidgets, which is not installed: pip install "dask-imgcurator[notebook]"', name=error.name
        ) from error


@dataclass(repr=False, eq=False)
class Gallery:
    """A page of pictures that displays itself in a notebook, and creates other pages. `show` creates the first.

    Attributes
    ----------
    number : int
        Page number, from 0.
    rows : list of dict
        The rows of the page, with the shown columns.
    total : int or None
        Rows on all pages; None until the table has been read to its end.
    """

    _source: _InOrder | _Sorted
    _pictures: Pictures
    _n: int
    _values: list[str]
    _how: str  # how rows are sorted, in words
    number: int
    rows: list[dict[str, Any]] = field(init=False)
    total: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self._take(self.number) if self.number >= 0 else []
        self.total = self._source.total
        if self.number and not self.rows:
            last = "they begin at 0" if self.total is None else f"the last one is {max(0, self.total - 1) // self._n}"
            raise ValueError(f"page={self.number}: no such page, {last}")

    def _take(self, number: int) -> list[dict[str, Any]]:
        return self._source.take(self._n * number, self._n * (number + 1))

    def page(self, number: int) -> Gallery:
        """Return another page, from 0; ValueError if there is none."""
        return replace(self, number=number)

    def next(self) -> Gallery:
        """Return the next page; after the last, the last."""
        return self.page(self.number + 1 if self._take(self.number + 1) else self.number)

    def previous(self) -> Gallery:
        """Return the previous page; before the first, the first."""
        return self.page(max(0, self.number - 1))

    @property
    def heading(self) -> str:
        """Which rows these are, in words."""
        if not self.rows:
            return "no rows"
        first, of, last = self._n * self.number, "", ""
        if self.total is not None:
            of, last = f" of {self.total:,}", f" (last: {(self.total - 1) // self._n})"
        words = [f"rows {first + 1:,} to {first + len(self.rows):,}{of}", f"page {self.number}{last}", self._how]
        return ", ".join(filter(None, words))

    def html(self) -> str:
        """Return the page as HTML with pictures, without the scope that `frame` puts around it."""
        cards = self._pictures.beside(self.rows)
        return render(
            "gallery.html.j2",
            heading=self.heading,
            scored=any("nsfw_score" in row for row in self.rows),
            missing=sum(uri is None for _, uri in cards),
            cards=cards,
            values=self._values,
        )

    def pager(self) -> Any:
        """Return an ipywidgets box of this page with buttons to turn it (ModuleNotFoundError without ipywidgets)."""
        widgets = widgets_of("pager()")
        shown, content = self, widgets.HTML(self._repr_html_())
        back, on = (widgets.Button(description=words) for words in ("‹ previous", "next ›"))

        def mark() -> None:
            back.disabled = shown.number == 0
            on.disabled = shown.total is not None and shown._n * (shown.number + 1) >= shown.total

        def turn(button: Any) -> None:
            nonlocal shown
            shown = shown.next() if button is on else shown.previous()
            content.value = shown._repr_html_()
            mark()

        for button in (back, on):
            button.on_click(turn)
        mark()
        return widgets.VBox([widgets.HBox([back, on]), content])

    def _repr_html_(self) -> str:
        return frame(self.html())

    def __repr__(self) -> str:
        if not self.rows:
            return self.heading
        names = list(dict.fromkeys(["key", *self._values]))
        table = pd.DataFrame([{name: _cell(row.get(name)) for name in names} for row in self.rows], columns=names)
        return f"{plain(self.heading)}\n{table.to_string(index=False)}"


def _cell(value: Any) -> Any:
    return plain(value, 60) if isinstance(value, str) else value
