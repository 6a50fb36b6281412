"""The steps of a selection settled on rows: each row passes or not by itself, in whatever partition it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, get_backend, is_dask
from ..schema import kind_of
from .ranks import (
    IDENTITY,
    Order,
    RandomOrder,
    SelectionError,
    TiedOrder,
    arrow_type,
    find_ranks,
    partitions,
    tree,
    value_order,
)
from .steps import Sample, Step, Ties, Top
from .where import Where, parse_where

__all__ = ["Among", "Cut", "GroupCut", "Settled", "kept", "settle_step", "start_of"]

_ALL = 2**64 - 1
_NONE = -1


@dataclass(frozen=True)
class Cut:
    """A `Top` or `Sample` settled: which rows come before a bound. Works on any partition, and can be pickled.

    Attributes
    ----------
    text : str
        The step.
    columns : tuple of str
        The columns that it uses.
    order : Order
        The order in which rows come.
    last : int
        The last key that is kept; -1 if none is.
    tied : TiedOrder, optional
        The order of the rows that have this key; without it, all of them are kept.
    last_tied : int
        Of those, the last key that is kept.
    """

    text: str
    columns: tuple[str, ...]
    order: Order
    last: int
    tied: TiedOrder | None = None
    last_tied: int = _ALL

    def keep(self, frame: Any) -> np.ndarray:
        """Tell which rows of a partition are kept: (n,) bool."""
        keys, known = self.order.keys(frame)
        keep = known & (keys <= self.last)
        if self.tied is not None:
            keys, there = self.tied.keys(frame)
            keep &= ~there | (keys <= self.last_tied)
        return np.asarray(keep)


@dataclass(frozen=True, eq=False)
class GroupCut:
    """A `Sample` of each group settled: which rows come before the bound of their group.

    Attributes
    ----------
    text, columns, order
        As for `Cut`.
    by : str
        The column of groups.
    bounds : pandas.Series of uint64
        The last key that is kept, by group; of groups that it does not name, all rows are kept.
    """

    text: str
    columns: tuple[str, ...]
    order: RandomOrder
    by: str
    bounds: pd.Series

    def keep(self, frame: Any) -> np.ndarray:
        """Tell which rows of a partition are kept: (n,) bool."""
        rows = _grouped(frame, self.order, self.by)
        at = self.bounds.index.get_indexer(pd.Index(rows["group"]))
        bounds = np.r_[self.bounds.to_numpy(np.uint64), np.uint64(_ALL)][at]  # -1: no bound
        keep = np.zeros(len(frame), bool)
        keep[rows["row"].to_numpy()] = rows["key"].to_numpy() <= bounds
        return keep


@dataclass(frozen=True)
class Settled:
    """Steps settled: a test that each row passes or not by itself. Works on any partition, and can be pickled.

    Attributes
    ----------
    backend : str
        Of the partitions.
    cuts : tuple of Where, Cut or GroupCut
        One after another.
    """

    backend: str
    cuts: tuple[Where | Cut | GroupCut, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Columns that are needed to tell."""
        return list(dict.fromkeys(name for cut in self.cuts for name in cut.columns))

    def keep(self, frame: Any) -> np.ndarray:
        """Tell which rows of a partition are kept: (n,) bool."""
        keep = np.ones(len(frame), bool)
        for cut in self.cuts:
            if isinstance(cut, Where):
                keep &= kept(frame, cut)
            else:  # what ranks or hashes is asked about the rows that are left
                keep[keep] = cut.keep(_rows(frame, cut.columns, keep))
        return keep

    def mask(self, frame: Any) -> Any:
        """Tell which rows of a partition are kept: a Series of bool, of its library and index."""
        schema = pa.schema([pa.field("keep", pa.bool_(), nullable=False)])
        table = pa.Table.from_arrays([pa.array(self.keep(frame))], schema=schema)
        column = get_backend(self.backend).from_arrow(table)["keep"]
        column.index = frame.index
        return column

    def filter(self, df: Any) -> Any:
        """Keep rows of a frame, lazily if it is; of a score table, columns that nothing needs are not read.

        Parameters
        ----------
        df : dask, pandas or cuDF DataFrame
            With `columns`.

        Returns
        -------
        the frame's type
        """
        if not self.cuts:
            return df
        if not is_dask(df):
            return df[self.mask(df)]
        used = df[self.columns]
        return df[used.map_partitions(self.mask, meta=self.mask(_empty(used)), enforce_metadata=False)]


def kept(frame: Any, cut: Where | Cut | GroupCut) -> np.ndarray:
    """Tell which rows of a partition a step keeps by itself: (n,) bool."""
    return np.asarray(cut.mask(frame).to_numpy(), bool) if isinstance(cut, Where) else cut.keep(frame)


def _rows(frame: Any, columns: Sequence[str], keep: np.ndarray) -> Any:
    frame = frame[list(columns)]
    return frame if keep.all() else frame[keep]


@dataclass(frozen=True)
class Among:
    """An order of the rows that steps have left; the others have no place.

    Attributes
    ----------
    before : Settled
        The steps.
    order : Order
        The order.
    columns : tuple of str
        The columns that it uses.
    """

    before: Settled
    order: Order
    columns: tuple[str, ...]

    def keys(self, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `Order.keys`."""
        if not self.before.cuts:
            return self.order.keys(frame)
        there = self.before.keep(frame)
        keys, known = np.zeros(len(frame), np.uint64), there.copy()
        keys[there], known[there] = self.order.keys(_rows(frame, self.columns, there))
        return keys, known


def _empty(df: Any) -> Any:
    from dask.dataframe.utils import make_meta

    return make_meta(df) if is_dask(df) else df.iloc[:0]


# --- settle ---------------------------------------------------------------------------------------


def start_of(df: Any, ok_only: bool) -> Settled:
    """Return what comes before the first step."""
    ok = (parse_where("status == 'ok'"),) if ok_only and "status" in df.columns else ()
    return Settled(backend_of(df).name, ok)


def settle_step(df: Any, before: Settled, step: Step) -> Where | Cut | GroupCut:
    """Settle a step on the rows of a frame that those before it left; reads the columns that it ranks by."""
    if isinstance(step, Where):
        step.mask(_empty(df))  # its mistakes are told now
        return step
    if isinstance(step, Top):
        order = value_order(df, step.column, step.largest)
        return _settle_order(df, before, step, order, (step.column,), step.ties)
    random = _random_order(df, step.seed, f"`{step.text}`")
    if step.by is not None:
        return _settle_groups(df, before, step, step.by, random)
    return _settle_order(df, before, step, random, random.identity, "exact")


def _random_order(df: Any, seed: int, why: str) -> RandomOrder:
    identity = tuple(name for name in IDENTITY if name in df.columns)
    if not identity:
        raise SelectionError(
            f"{why} needs the columns by which a row is known ({', '.join(IDENTITY)}, or one of them): keep them "
            f"(there are: {', '.join(map(str, df.columns))})"
        )
    return RandomOrder(backend_of(df).name, identity, int(seed))


def _settle_order(
    df: Any, before: Settled, step: Top | Sample, order: Order, columns: tuple[str, ...], ties: Ties
) -> Cut:
    parts, among = partitions(df, [*before.columns, *columns]), Among(before, order, columns)
    n, places = find_ranks(parts, among, lambda n: [k for k in [step.amount.of(n)] if 0 < k < n])
    if not places:
        return Cut(step.text, columns, order, _ALL if step.amount.of(n) else _NONE)
    (place,) = places.values()
    left = place.rank - place.before
    if left == place.equal or ties == "include":
        return Cut(step.text, columns, order, place.key)
    if ties == "exclude":
        return Cut(step.text, columns, order, place.key - 1)
    if isinstance(order, RandomOrder):
        raise _indistinct(parts, among, place.key, order, step.text)
    random = _random_order(df, 0, f"`{step.text}` has ties to break and")
    tied = TiedOrder(order, place.key, random)
    columns = tuple(dict.fromkeys((*columns, *random.identity)))
    parts, among = partitions(df, [*before.columns, *columns]), Among(before, tied, columns)
    _, places = find_ranks(parts, among, lambda n: [left])
    second = places[left]
    if second.before + second.equal != left:
        raise _indistinct(parts, among, second.key, random, step.text)
    return Cut(step.text, columns, order, place.key, tied, second.key)


def _indistinct(parts: Sequence[Any], order: Order, key: int, random: RandomOrder, text: str) -> SelectionError:
    """Say which rows cannot be told apart."""
    rows = tree(parts, _rows_with, pd.concat, order, key, random)
    names = ", ".join(f"{name} {value!r}" for name, value in rows.iloc[:1].to_dict("records")[0].items())
    return SelectionError(
        f"`{text}` would keep some of {len(rows)} rows that it cannot tell apart, and drop the others: they have "
        f"{names}. Drop rows that are there twice, or keep the columns {', '.join(IDENTITY)}"
    )


def _rows_with(frame: Any, order: Order, key: int, random: RandomOrder) -> pd.DataFrame:
    keys, known = order.keys(frame)
    rows = frame[known & (keys == np.uint64(key))]
    return get_backend(random.backend).to_host(rows, list(random.identity)).to_pandas()


def _settle_groups(df: Any, before: Settled, step: Sample, by: str, order: RandomOrder) -> Cut | GroupCut:
    assert step.n is not None
    if by not in df.columns:
        raise SelectionError(f"there is no column {by!r} (there are: {', '.join(map(str, df.columns))})")
    _check_groups(by, arrow_type(df, by))
    columns = tuple(dict.fromkeys((by, *order.identity)))
    if step.n == 0:
        return Cut(step.text, columns, order, _NONE)
    parts, among = partitions(df, [*before.columns, *columns]), Among(before, order, columns)
    # One row more than is kept, to see that it is another one.
    n = step.n + 1
    first = tree(parts, _first_of_groups, partial(_merge_groups, n=n), among, order, by, n)
    place = first.groupby("group", sort=False).cumcount().to_numpy()
    keys = first["key"].to_numpy()
    same = np.flatnonzero((place[1:] == step.n) & (keys[1:] == keys[:-1]))
    if len(same):
        raise _indistinct(parts, among, int(keys[same[0]]), order, step.text)
    bounds = first[place == step.n - 1].set_index("group")["key"]
    return GroupCut(step.text, columns, order, by, bounds)


def _check_groups(by: str, type_: pa.DataType) -> None:
    if kind_of(type_) not in ("number", "string", "boolean") and not pa.types.is_null(type_):
        raise SelectionError(f"column {by!r} holds {type_}: groups are numbers, text or truth values")


def _grouped(frame: Any, order: RandomOrder, by: str) -> pd.DataFrame:
    """``group``, ``key`` and ``row`` (its number) of the rows that have a group."""
    groups = get_backend(order.backend).to_host(frame, [by])[by]
    _check_groups(by, groups.type)
    there = groups.is_valid()
    if pa.types.is_floating(groups.type):
        there = pa.array(there.to_numpy() & ~np.isnan(groups.fill_null(0).to_numpy()))
    rows = np.flatnonzero(there.to_numpy(zero_copy_only=False) if isinstance(there, pa.Array) else there.to_numpy())
    return pd.DataFrame({"group": groups.filter(there).to_pandas(), "key": order.keys(frame)[0][rows], "row": rows})


def _first_of_groups(frame: Any, among: Among, order: RandomOrder, by: str, n: int) -> pd.DataFrame:
    rows = _rows(frame, among.columns, among.before.keep(frame))
    return _merge_groups([_grouped(rows, order, by)[["group", "key"]]], n)


def _merge_groups(found: Sequence[pd.DataFrame], n: int) -> pd.DataFrame:
    # Empty ones have a type of their own where all groups are missing.
    rows = pd.concat([f for f in found if len(f)] or list(found[:1]), ignore_index=True)
    return rows.sort_values(["group", "key"]).groupby("group", sort=False).head(n).reset_index(drop=True)
