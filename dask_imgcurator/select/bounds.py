"""Finding the bounds of a selection's steps that rank or draw.

A selection needs little of each row: whether it is readable, whether it meets each expression, and a key of 32 or 64
bits per step that ranks. One pass over the table makes these digests, which stay in memory where the partitions are.
They suffice to find all bounds, to count the kept rows, and to know which rows of a score table to read. If rows tie at
a bound, only those are read once more, for the order that breaks ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, is_dask
from ..engine.frames import (
    Reader,
    from_map,
    grouped,
    map_tables,
    meta_of,
    objects_of,
    objects_stay,
    pick,
    source_of,
    to_arrow,
    together,
)
from ..engine.run import current_client, reduce, stream
from ..results import Counts
from .ranks import IDENTITY, RandomOrder, SelectionError, arrow_type, find_ranks, no_column, random_order, value_order
from .settle import ALL, NONE, Bound, Condition, GroupBounds, Settled, check_groups, counts_of, digest
from .steps import Listed, RandomSample, Step, Top
from .where import Where


@dataclass
class Settling:
    """A selection in the making, on digests: pandas frames here, or a persisted Dask frame on a cluster."""

    df: Any
    settled: Settled
    digests: Any = None
    source: tuple[Reader, list[Sequence[Any]]] | None = None  # the frame's reader, and its partitions' items

    @property
    def groups(self) -> list[list[Any]]:
        """The items from which each partition of the digests was read, if there is a source."""
        return grouped(*self.source) if self.source is not None else []

    def add(self, condition: Condition) -> None:
        """Append a condition."""
        self.settled = replace(self.settled, conditions=(*self.settled.conditions, condition))

    def digest(self) -> Any:
        """Make all rows' digests."""
        names = self.settled.first
        if not is_dask(self.df):
            self.digests = [digest(to_arrow(self.df, names), self.settled)]
            return self.digests
        meta = digest(to_arrow(meta_of(self.df), names), self.settled)
        self.source = source_of(self.df)
        if self.source is None:
            lazy = map_tables(self.df, names, digest, self.settled, meta=meta, label="digest")
        else:
            meta["item"] = np.empty(0, np.int32)
            with objects_stay():
                lazy = from_map(_digest_items, self.groups, "digest", meta, args=[self.source[0], names, self.settled])
        # Dask would hash frames persisted in this process.
        self.digests = lazy.persist() if current_client() is not None else list(dask.compute(*lazy.to_delayed()))
        return self.digests

    def run(self, alone: bool) -> Settling:
        """Find all bounds, with `alone` also those of each condition by itself; reads the needed columns once."""
        if any(c.order is not None for c in self.settled.conditions):
            self.digest()
            conditions = self.settled.conditions
            for i, condition in enumerate(conditions):
                if condition.order is None:
                    continue
                bound = self._bound(replace(self.settled, conditions=conditions[:i]), i, condition)
                own = bound
                if alone and i > 0:
                    own = self._bound(replace(self.settled, conditions=()), i, condition)
                conditions = (*conditions[:i], replace(condition, bound=bound, alone=own), *conditions[i + 1 :])
            self.settled = replace(self.settled, conditions=conditions)
        return self

    def count(self) -> Counts:
        """Count the rows that the selection keeps."""
        if self.digests is not None:
            found: Counts = reduce(self.digests, _count_digests, Counts.sum, self.settled)
            return found
        columns = [name for name in self.settled.columns if name in self.df.columns] or list(self.df.columns[:1])
        counts: Counts = reduce(self.df, self.settled.count, Counts.sum, columns=columns)
        return counts

    def filter(self) -> Any:
        """Keep the selected rows of the frame; lazily, if it is lazy."""
        if self.source is None or self.source[0].filters:
            return self.settled.filter(self.df)
        (reader, items), sizes = self.source, [len(group) for group in self.groups]
        if isinstance(self.digests, list):
            found: Iterator[Any] = (
                _kept_by_item(*pair, self.settled) for pair in zip(self.digests, sizes, strict=True)
            )
        else:
            found = stream(self.digests, _kept_by_item, self.settled, each=sizes)
        kept = chain.from_iterable(found)
        picked = [[pick(item, next(kept)) for item in part] for part in items]
        return reader.frame(together(picked, reader.at_once), "selected")[list(self.df.columns)]

    def _bound(self, before: Settled, i: int, condition: Condition) -> Bound | GroupBounds:
        """Find a ranking step's bound on the rows left by the conditions before it."""
        step = condition.step
        assert isinstance(step, Top | RandomSample)
        if isinstance(step, RandomSample) and step.by is not None:
            return self._group_bounds(before, i, condition, step)
        keys = partial(keys_of, before=before, i=i)
        assert condition.order is not None
        bits = condition.order.bits
        n, found = find_ranks(self.digests, keys, bits, lambda n: [k for k in [step.amount.of(n)] if 0 < k < n])
        if not found:
            return Bound(ALL if step.amount.of(n) else NONE)
        (place,) = found.values()
        left = place.rank - place.before
        ties = step.ties if isinstance(step, Top) else "exact"
        if left == place.equal or ties == "include":
            return Bound(place.key)
        if ties == "exclude":
            return Bound(place.key - 1)
        if isinstance(step, RandomSample):
            raise self._indistinct(before, i, place.key, None, step.text)
        order = self._break_ties(before, i, place.key, step.text)
        keys = partial(_tied_keys, before=before, i=i, key=place.key)
        _, found = find_ranks(self.digests, keys, order.bits, lambda n: [left])
        second = found[left]
        if second.before + second.equal != left:
            raise self._indistinct(before, i, place.key, second.key, step.text)
        return Bound(place.key, second.key)

    def _break_ties(self, before: Settled, i: int, key: int, text: str) -> RandomOrder:
        """Add tie-breaking keys to the digests of the rows with a key, reading those rows' identity."""
        order = random_order(self.df, 0, f"`{text}` has ties to break and")
        self.settled = replace(self.settled, tied=order)
        which = partial(_tied, before=before, i=i, key=key)
        if self.source is not None:
            beside, function = self.groups, partial(_with_read_ties, reader=self.source[0], order=order, which=which)
        else:
            beside, function = self.df[list(order.columns)], partial(_with_ties, order=order, which=which)
        if isinstance(self.digests, list):
            there = beside if isinstance(beside, list) else stream(beside, _itself)
            self.digests = [function(part, own) for part, own in zip(self.digests, there, strict=True)]
            return order
        own = objects_of(beside, "items") if isinstance(beside, list) else beside
        meta = self.digests._meta.assign(tie=np.empty(0, np.uint64))
        self.digests = self.digests.map_partitions(
            function, own, meta=meta, enforce_metadata=False, align_dataframes=False, token="ties"
        ).persist()
        return order

    def _group_bounds(self, before: Settled, i: int, condition: Condition, step: RandomSample) -> Bound | GroupBounds:
        assert step.n is not None
        if step.n == 0:
            return Bound(NONE)
        # One row more than is kept, to check that it differs.
        first = reduce(self.digests, _first_of_groups, partial(_merge_groups, n=step.n + 1), before, i, step.n + 1)
        place = first.groupby("group", sort=False).cumcount().to_numpy()
        keys = first["key"].to_numpy()
        same = np.flatnonzero((place[1:] == step.n) & (keys[1:] == keys[:-1]))
        if len(same):
            raise self._indistinct(before, i, int(keys[same[0]]), None, step.text)
        return GroupBounds(first[place == step.n - 1].set_index("group")["key"])

    def _indistinct(self, before: Settled, i: int, key: int, tie: int | None, text: str) -> SelectionError:
        """Say which rows cannot be told apart."""
        identity = tuple(name for name in IDENTITY if name in self.df.columns)
        columns = list(dict.fromkeys([*self.settled.columns, *identity]))
        found = self.settled, before, i, key, tie, identity
        rows = reduce(self.df, _rows_with, pd.concat, *found, columns=columns)
        names = ", ".join(f"{name} {value!r}" for name, value in rows.iloc[:1].to_dict("records")[0].items())
        return SelectionError(
            f"`{text}` would keep some of {len(rows)} rows that it cannot tell apart, and drop the others: they have "
            f"{names}. Drop rows that are there twice, or keep the columns {', '.join(IDENTITY)}"
        )


def begin(df: Any, steps: Sequence[Step], ok_only: bool, planned: pa.Schema | None = None) -> Settling:
    """Prepare a selection on a frame; mistakes are reported now."""
    backend_of(df)  # raises for anything but a frame
    conditions = []
    for step in steps:
        if isinstance(step, Where | Listed):
            if isinstance(step, Listed):
                step.check(df.columns)
            elif planned is None:
                step.mask(meta_of(df))
            conditions.append(Condition(step))
        elif isinstance(step, Top):
            conditions.append(Condition(step, value_order(df, step.column, step.largest)))
        else:
            order = random_order(df, step.seed, f"`{step.text}`")
            if step.by is not None:
                if step.by not in df.columns:
                    raise no_column(step.by, df.columns)
                check_groups(step.by, arrow_type(df, step.by))
            conditions.append(Condition(step, order))
    return Settling(df, Settled(tuple(conditions), ok_only and "status" in df.columns, planned=planned))


# --- on partitions --------------------------------------------------------------------------------


def _digest_items(items: Sequence[Any], reader: Reader, names: Sequence[str], settled: Settled) -> pd.DataFrame:
    tables = [reader.table([item], names) for item in items]
    numbers = np.repeat(np.arange(len(items), dtype=np.min_scalar_type(len(items))), [len(t) for t in tables])
    return _with_column(digest(pa.concat_tables(tables), settled), "item", numbers)


def _with_column(digests: pd.DataFrame, name: str, values: np.ndarray) -> pd.DataFrame:
    """Add a column; pandas itself would copy it."""
    return pd.DataFrame({**{n: digests[n].values for n in digests}, name: values}, copy=False)


def _eligible(digests: pd.DataFrame, before: Settled, i: int) -> np.ndarray:
    return before.judge_digest(digests).kept & digests[f"{i} known"].to_numpy()


def keys_of(digests: pd.DataFrame, before: Settled, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of a ranking step, (n,) unsigned, and the rows that the conditions before it leave: (n,) bool."""
    return digests[f"{i}"].to_numpy(), _eligible(digests, before, i)


def _tied_keys(digests: pd.DataFrame, before: Settled, i: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    return digests["tie"].to_numpy(), _tied(digests, before, i, key)


def _tied(digests: pd.DataFrame, before: Settled, i: int, key: int) -> np.ndarray:
    """The rows left by the conditions before a ranking step that have a key: (n,) bool."""
    return _eligible(digests, before, i) & (digests[f"{i}"].to_numpy() == key)


def _with_ties(digests: pd.DataFrame, frame: Any, order: RandomOrder, which: Callable[..., np.ndarray]) -> pd.DataFrame:
    rows = which(digests)
    table = to_arrow(frame, order.columns).filter(pa.array(rows))
    return _set_ties(digests, rows, order.keys(table)[0])


def _with_read_ties(
    digests: pd.DataFrame, items: Any, reader: Reader, order: RandomOrder, which: Callable[..., np.ndarray]
) -> pd.DataFrame:
    rows, keys = which(digests), []
    own, read_from = digests["item"].to_numpy(), items if isinstance(items, list) else next(iter(items["object"]))
    for number in np.unique(own[rows]):
        table = reader.table([read_from[number]], order.columns)
        keys.append(order.keys(table.filter(pa.array(rows[own == number])))[0])
    return _set_ties(digests, rows, np.concatenate(keys) if keys else np.empty(0, np.uint64))


def _itself(frame: Any) -> Any:
    return frame


def _set_ties(digests: pd.DataFrame, rows: np.ndarray, keys: np.ndarray) -> pd.DataFrame:
    ties = digests["tie"].to_numpy().copy() if "tie" in digests else np.zeros(len(digests), np.uint64)
    ties[rows] = keys
    return _with_column(digests, "tie", ties)


def _count_digests(digests: pd.DataFrame, settled: Settled) -> Counts:
    return counts_of(settled, settled.judge_digest(digests), pa.table({}))


def _kept_by_item(digests: pd.DataFrame, items: int, settled: Settled) -> list[np.ndarray]:
    """The kept rows of each item: (n,) bool."""
    own = digests["item"].to_numpy()
    ends = np.searchsorted(own, np.arange(1, items, dtype=own.dtype))  # of another type, all would be converted
    return np.split(settled.judge_digest(digests).kept, ends)


def _rows_with(
    rows: pa.Table, settled: Settled, before: Settled, i: int, key: int, tie: int | None, identity: tuple[str, ...]
) -> pd.DataFrame:
    found = _tied(digest(rows, settled), before, i, key)
    if tie is not None:
        assert settled.tied is not None
        found &= settled.tied.keys(rows)[0] == np.uint64(tie)
    return rows.select(list(identity)).filter(pa.array(found)).to_pandas()


def _first_of_groups(digests: pd.DataFrame, before: Settled, i: int, n: int) -> pd.DataFrame:
    rows = digests[_eligible(digests, before, i)]
    return _merge_groups([pd.DataFrame({"group": rows[f"{i} group"], "key": rows[f"{i}"]})], n)


def _merge_groups(found: Sequence[pd.DataFrame], n: int) -> pd.DataFrame:
    # Empty ones have another type if all groups are missing.
    rows = pd.concat([f for f in found if len(f)] or list(found[:1]), ignore_index=True)
    return rows.sort_values(["group", "key"]).groupby("group", sort=False).head(n).reset_index(drop=True)
