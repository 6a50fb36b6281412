"""A selection's conditions settled on rows: each row then passes or not by itself, in whatever partition it is.

A row's part in a selection is small: whether it is readable, whether it meets each expression, and a 64-bit key for
each step that ranks. One pass over the table makes these digests, which stay in memory where the partitions are; all
bounds are found on them. Ties at a bound take one more pass, for the order that breaks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import backend_of, is_dask
from ..engine.frames import meta_of
from ..engine.run import current_client, reduce
from ..json_fields import FIELD_TYPES, as_type
from ..results import ConditionCount, Counts
from ..schema import kind_of
from .ranks import IDENTITY, Order, RandomOrder, SelectionError, arrow_type, find_ranks, random_order, value_order
from .steps import RandomSample, Step, Top
from .where import Where, to_arrow

_ALL = 2**64 - 1
_NONE = -1


@dataclass(frozen=True)
class Bound:
    """Bound of a ranking step: the last key kept, and the last key among its ties."""

    last: int
    last_tied: int = _ALL


@dataclass(frozen=True, eq=False)
class GroupBounds:
    """Bounds of a sample of each group: the last key kept, by group; groups not named are kept whole."""

    bounds: pd.Series


@dataclass(frozen=True)
class Condition:
    """One condition: an expression, or a step that ranks, with its bounds once settled."""

    step: Step
    order: Order | None = None
    bound: Bound | GroupBounds | None = None  # on what the conditions before left
    alone: Bound | GroupBounds | None = None  # on all readable rows

    @property
    def text(self) -> str:
        """What the user wrote."""
        return self.step.text

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it uses."""
        if self.order is None:
            return tuple(self.step.columns)  # type: ignore[union-attr]
        by = self.step.by if isinstance(self.step, RandomSample) else None
        return (*self.order.columns, *([by] if by is not None else []))


@dataclass(frozen=True)
class Verdict:
    """A selection's verdict on some rows; each array is (n,) bool."""

    ok: np.ndarray  # readable
    passed: list[np.ndarray]  # for each condition, by its bound in its turn
    alone: list[np.ndarray]  # by its bound on all readable rows

    @property
    def kept(self) -> np.ndarray:
        """Rows that are kept."""
        return np.logical_and.reduce([self.ok, *self.passed])


@dataclass(frozen=True)
class Settled:
    """A selection with settled bounds; works on any part of the rows, and can be pickled."""

    conditions: tuple[Condition, ...] = ()
    ok_only: bool = True  # rows whose ``status`` is not ``ok`` are dropped first, where there is a status
    tied: RandomOrder | None = None  # breaks ties, where a bound needs it
    planned: pa.Schema | None = None  # types of JSON fields that the conditions expect; a shard's own may differ

    @property
    def columns(self) -> list[str]:
        """Columns needed to judge a row (``status`` if there is one)."""
        names = [name for condition in self.conditions for name in condition.columns]
        tied = self.tied.columns if self.tied is not None else ()
        return list(dict.fromkeys([*(["status"] if self.ok_only else []), *names, *tied]))

    def judge(self, table: pa.Table) -> Verdict:
        """Judge the rows of an Arrow table."""
        return self.judge_digest(_digest(_as_planned(table, self.planned), self))

    def judge_frame(self, frame: Any) -> Verdict:
        """Judge the rows of a partition."""
        there = [name for name in self.columns if name != "status" or name in frame.columns]
        if not there:
            n = len(frame)
            return Verdict(np.ones(n, bool), [], [])
        return self.judge(to_arrow(frame, there))

    def judge_digest(self, digest: pd.DataFrame) -> Verdict:
        """Judge rows by their digests."""
        passed = [_passed(digest, i, c, c.bound) for i, c in enumerate(self.conditions)]
        alone = [
            mask if c.alone is None or c.alone is c.bound else _passed(digest, i, c, c.alone)
            for i, (c, mask) in enumerate(zip(self.conditions, passed, strict=True))
        ]
        return Verdict(digest["ok"].to_numpy(), passed, alone)

    def count(self, frame: Any) -> Counts:
        """Count a partition's rows."""
        verdict = self.judge_frame(frame)
        statuses: dict[str, int] = {}
        if "status" in frame.columns:
            found = pc.value_counts(to_arrow(frame, ["status"])["status"])
            statuses = {str(item["values"]): item["counts"] for item in found.to_pylist()}
        return counts_of(self, verdict, statuses)

    def filter(self, df: Any) -> Any:
        """Filter a Dask, pandas or cuDF frame, lazily if it is; of a score table, only what is needed is read."""
        used = [name for name in self.columns if name in df.columns]
        if not used:
            return df
        if not is_dask(df):
            return df[self.mask(df)]
        narrow = df[used]
        return df[narrow.map_partitions(self.mask, meta=self.mask(meta_of(narrow)), enforce_metadata=False)]

    def mask(self, frame: Any) -> Any:
        """Which rows of a partition are kept: a bool Series of its library and index."""
        schema = pa.schema([pa.field("keep", pa.bool_(), nullable=False)])
        table = pa.Table.from_arrays([pa.array(self.judge_frame(frame).kept)], schema=schema)
        column = backend_of(frame).from_arrow(table)["keep"]
        column.index = frame.index
        return column


def settled_where(where: Where | None, ok_only: bool = True, planned: pa.Schema | None = None) -> Settled:
    """Return a selection by an expression alone, which needs no settling."""
    parts = where.conjuncts() if where is not None else []
    return Settled(tuple(Condition(part) for part in parts), ok_only, planned=planned)


def _as_planned(table: pa.Table, planned: pa.Schema | None) -> pa.Table:
    """Columns as the types that conditions expect; null where a value is of another kind, such as text for a number."""
    for field in planned or ():
        at = table.schema.get_field_index(field.name)
        if at >= 0 and kind_of(table.schema.field(at).type) not in ("unknown", kind_of(field.type)):
            name = next(name for name, type_ in FIELD_TYPES.items() if type_ == field.type)
            values = [as_type(value, name) for value in table.column(at).to_pylist()]
            table = table.set_column(at, field, pa.array(values, field.type))
    return table


def counts_of(settled: Settled, verdict: Verdict, by_status: dict[str, int]) -> Counts:
    """Count a verdict, each condition alone and in turn."""
    left, funnel = verdict.ok, []
    for condition, passed, alone in zip(settled.conditions, verdict.passed, verdict.alone, strict=True):
        left = left & passed
        funnel.append(ConditionCount(condition.text, int((verdict.ok & alone).sum()), int(left.sum())))
    return Counts(len(verdict.ok), int(verdict.ok.sum()), int(left.sum()), by_status, funnel)


# --- digests --------------------------------------------------------------------------------------


def _digest(table: pa.Table, settled: Settled) -> pd.DataFrame:
    """All that a selection needs to know of rows, in a few bytes each."""
    ok = np.ones(len(table), bool)
    if settled.ok_only and "status" in table.column_names:
        ok = pc.fill_null(pc.equal(table["status"].cast(pa.string()), "ok"), False).to_numpy()
    digest: dict[str, Any] = {"ok": ok}
    for i, condition in enumerate(settled.conditions):
        if condition.order is None:
            digest[f"{i}"] = _truth(condition.step, table)  # type: ignore[arg-type]
            continue
        digest[f"{i}"], digest[f"{i} known"] = condition.order.keys(table)
        if isinstance(condition.step, RandomSample) and condition.step.by is not None:
            digest[f"{i} group"], there = _groups(table[condition.step.by], condition.step.by)
            digest[f"{i} known"] &= there
    if settled.tied is not None:
        digest["tie"], _ = settled.tied.keys(table)
    return pd.DataFrame(digest)


def _truth(where: Where, table: pa.Table) -> np.ndarray:
    return np.asarray(pc.fill_null(where.evaluate(table), False).to_numpy(zero_copy_only=False), bool)


def _groups(groups: pa.ChunkedArray, by: str) -> tuple[pd.Series, np.ndarray]:
    """Groups of rows, and which rows have one: (n,) bool."""
    _check_groups(by, groups.type)
    there = groups.is_valid().to_numpy()
    if pa.types.is_floating(groups.type):
        there = there & ~np.isnan(groups.fill_null(0).to_numpy())
    return groups.to_pandas().reset_index(drop=True), there


def _check_groups(by: str, type_: pa.DataType) -> None:
    if kind_of(type_) not in ("number", "string", "boolean") and not pa.types.is_null(type_):
        raise SelectionError(f"column {by!r} holds {type_}: groups are numbers, text or truth values")


def _passed(digest: pd.DataFrame, i: int, condition: Condition, bound: Any) -> np.ndarray:
    """Which rows meet a condition: (n,) bool."""
    if condition.order is None:
        return digest[f"{i}"].to_numpy()
    keys, known = digest[f"{i}"].to_numpy(), digest[f"{i} known"].to_numpy()
    if isinstance(bound, GroupBounds):
        at = bound.bounds.index.get_indexer(pd.Index(digest[f"{i} group"]))
        bounds = np.r_[bound.bounds.to_numpy(np.uint64), np.uint64(_ALL)][at]  # -1: no bound
        return known & (keys <= bounds)
    if bound.last == _NONE:
        return np.zeros(len(digest), bool)
    passed = known & (keys <= np.uint64(bound.last))
    if bound.last_tied != _ALL:
        passed &= (keys != np.uint64(bound.last)) | (digest["tie"].to_numpy() <= np.uint64(bound.last_tied))
    return passed


# --- settle ---------------------------------------------------------------------------------------


class _NeedsTies(Exception):
    """A bound falls among rows with equal values."""


@dataclass
class Settling:
    """A selection being settled: the digests of all rows, on which bounds are found one by one."""

    df: Any
    settled: Settled
    digests: Any = None

    def add(self, condition: Condition) -> None:
        """Append a condition."""
        self.settled = replace(self.settled, conditions=(*self.settled.conditions, condition))

    def digest(self) -> Any:
        """Make all rows' digests: one pandas frame, or a persisted Dask one if a cluster has the rows."""
        narrow = self.df[self.settled.columns]
        if not is_dask(narrow):
            return _digest_frame(narrow, self.settled)
        meta = _digest_frame(meta_of(narrow), self.settled)
        lazy = narrow.map_partitions(_digest_frame, self.settled, meta=meta, enforce_metadata=False, token="digest")
        return lazy.persist() if current_client() is not None else lazy.compute().reset_index(drop=True)

    def run(self, alone: bool) -> Settled:
        """Find all bounds, also each alone if `alone`; reads the needed columns once, or twice for ties."""
        if all(c.order is None for c in self.settled.conditions):
            return self.settled
        self.digests = self.digest()
        try:
            self._settle(alone)
        except _NeedsTies:
            why = next(c.text for c in self.settled.conditions if isinstance(c.step, Top))
            tied = random_order(self.df, 0, f"`{why}` has ties to break and")
            self.settled = replace(self.settled, tied=tied)
            self.digests = self.digest()
            self._settle(alone)
        return self.settled

    def _settle(self, alone: bool) -> None:
        conditions = tuple(replace(c, bound=None, alone=None) for c in self.settled.conditions)
        for i, condition in enumerate(conditions):
            if condition.order is None:
                continue
            bound = self._bound(replace(self.settled, conditions=conditions[:i]), i, condition)
            own = bound
            if alone and i > 0:
                own = self._bound(replace(self.settled, conditions=()), i, condition)
            conditions = (*conditions[:i], replace(condition, bound=bound, alone=own), *conditions[i + 1 :])
        self.settled = replace(self.settled, conditions=conditions)

    def _bound(self, before: Settled, i: int, condition: Condition) -> Bound | GroupBounds:
        """Find a ranking step's bound on the rows left by the conditions before it."""
        step = condition.step
        assert isinstance(step, Top | RandomSample)
        if isinstance(step, RandomSample) and step.by is not None:
            return self._group_bounds(before, i, condition, step)
        keys = partial(keys_of, before=before, i=i)
        n, found = find_ranks(self.digests, keys, lambda n: [k for k in [step.amount.of(n)] if 0 < k < n])
        if not found:
            return Bound(_ALL if step.amount.of(n) else _NONE)
        (place,) = found.values()
        left = place.rank - place.before
        ties = step.ties if isinstance(step, Top) else "exact"
        if left == place.equal or ties == "include":
            return Bound(place.key)
        if ties == "exclude":
            return Bound(place.key - 1)
        if isinstance(step, RandomSample):
            raise self._indistinct(before, i, place.key, None, step.text)
        if self.settled.tied is None:
            raise _NeedsTies
        _, found = find_ranks(self.digests, partial(_tied_keys, before=before, i=i, key=place.key), lambda n: [left])
        second = found[left]
        if second.before + second.equal != left:
            raise self._indistinct(before, i, place.key, second.key, step.text)
        return Bound(place.key, second.key)

    def _group_bounds(self, before: Settled, i: int, condition: Condition, step: RandomSample) -> Bound | GroupBounds:
        assert step.n is not None
        if step.n == 0:
            return Bound(_NONE)
        # One row more than is kept, to see that it is another one.
        first = reduce(self.digests, _first_of_groups, partial(_merge_groups, n=step.n + 1), before, i, step.n + 1)
        place = first.groupby("group", sort=False).cumcount().to_numpy()
        keys = first["key"].to_numpy()
        same = np.flatnonzero((place[1:] == step.n) & (keys[1:] == keys[:-1]))
        if len(same):
            raise self._indistinct(before, i, int(keys[same[0]]), None, step.text)
        return GroupBounds(first[place == step.n - 1].set_index("group")["key"])

    def _indistinct(self, before: Settled, i: int, key: int, tie: int | None, text: str) -> SelectionError:
        """Say which rows cannot be told apart."""
        random = random_order(self.df, 0, f"`{text}`")
        columns = [name for name in {*self.settled.columns, *random.columns} if name in self.df.columns]
        rows = reduce(self.df[columns], _rows_with, pd.concat, self.settled, before, i, key, tie, random.identity)
        names = ", ".join(f"{name} {value!r}" for name, value in rows.iloc[:1].to_dict("records")[0].items())
        return SelectionError(
            f"`{text}` would keep some of {len(rows)} rows that it cannot tell apart, and drop the others: they have "
            f"{names}. Drop rows that are there twice, or keep the columns {', '.join(IDENTITY)}"
        )


def begin(df: Any, steps: Sequence[Step], ok_only: bool) -> Settling:
    """Prepare a selection on a frame; mistakes are reported now."""
    backend_of(df)  # raises for anything that is no frame
    conditions = []
    for step in steps:
        if isinstance(step, Where):
            step.mask(meta_of(df))
            conditions.append(Condition(step))
        elif isinstance(step, Top):
            conditions.append(Condition(step, value_order(df, step.column, step.largest)))
        else:
            order = random_order(df, step.seed, f"`{step.text}`")
            if step.by is not None:
                if step.by not in df.columns:
                    raise SelectionError(
                        f"there is no column {step.by!r} (there are: {', '.join(map(str, df.columns))})"
                    )
                _check_groups(step.by, arrow_type(df, step.by))
            conditions.append(Condition(step, order))
    return Settling(df, Settled(tuple(conditions), ok_only and "status" in df.columns))


def _digest_frame(frame: Any, settled: Settled) -> pd.DataFrame:
    return _digest(to_arrow(frame, settled.columns), settled)


def _eligible(digest: pd.DataFrame, before: Settled, i: int) -> np.ndarray:
    return before.judge_digest(digest).kept & digest[f"{i} known"].to_numpy()


def keys_of(digest: pd.DataFrame, before: Settled, i: int) -> np.ndarray:
    """Keys of the rows left by the conditions before a ranking step: (m,) uint64."""
    return digest[f"{i}"].to_numpy()[_eligible(digest, before, i)]


def _tied_keys(digest: pd.DataFrame, before: Settled, i: int, key: int) -> np.ndarray:
    tied = _eligible(digest, before, i) & (digest[f"{i}"].to_numpy() == np.uint64(key))
    return digest["tie"].to_numpy()[tied]


def _rows_with(
    frame: Any, settled: Settled, before: Settled, i: int, key: int, tie: int | None, identity: tuple[str, ...]
) -> pd.DataFrame:
    host = to_arrow(frame, list(frame.columns))
    digest = _digest(host, settled)
    found = _eligible(digest, before, i) & (digest[f"{i}"].to_numpy() == np.uint64(key))
    if tie is not None:
        found &= digest["tie"].to_numpy() == np.uint64(tie)
    return host.select(list(identity)).filter(pa.array(found)).to_pandas()


def _first_of_groups(digest: pd.DataFrame, before: Settled, i: int, n: int) -> pd.DataFrame:
    rows = digest[_eligible(digest, before, i)]
    return _merge_groups([pd.DataFrame({"group": rows[f"{i} group"], "key": rows[f"{i}"]})], n)


def _merge_groups(found: Sequence[pd.DataFrame], n: int) -> pd.DataFrame:
    # Empty ones have a type of their own where all groups are missing.
    rows = pd.concat([f for f in found if len(f)] or list(found[:1]), ignore_index=True)
    return rows.sort_values(["group", "key"]).groupby("group", sort=False).head(n).reset_index(drop=True)
