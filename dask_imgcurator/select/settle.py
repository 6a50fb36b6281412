"""A selection whose bounds are known: each row then passes or fails by itself, whatever its partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import backend_of, is_dask
from ..engine.frames import More, meta_of, source_of, to_arrow
from ..json_fields import FIELD_TYPES, as_type
from ..results import ConditionCount, Counts
from ..schema import kind_of, plain_type
from .ranks import Order, RandomOrder, SelectionError, by_value
from .steps import RandomSample, Step
from .where import Where

ALL = 2**64 - 1
NONE = -1

#: Keys that break ties among some of the rows: (n,) bool to (m,) uint64.
Ties = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Bound:
    """Bound of a ranking step: the last key kept, and the last key among its ties."""

    last: int
    last_tied: int = ALL


@dataclass(frozen=True, eq=False)
class GroupBounds:
    """Bounds of a sample per group: the last key kept, by group; groups not listed are kept whole."""

    bounds: pd.Series


class RowTest(Protocol):
    """A condition that decides each row by itself."""

    @property
    def text(self) -> str:
        """Its text; equal texts mean equal conditions."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it uses."""

    def evaluate(self, table: pa.Table) -> pa.Array | pa.ChunkedArray:
        """Whether each row of an Arrow table is kept."""


@dataclass(frozen=True)
class Condition:
    """One condition: an expression, or a step that ranks, with its bounds once known."""

    step: Step | RowTest
    order: Order | None = None
    bound: Bound | GroupBounds | None = None  # on the rows left by the conditions before
    alone: Bound | GroupBounds | None = None  # on all readable rows

    @property
    def text(self) -> str:
        """Its text."""
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
    """A selection's verdict on some rows, in arrays of (n,) bool."""

    ok: np.ndarray  # readable
    passed: list[np.ndarray]  # per condition, with its bound in turn
    alone: list[np.ndarray]  # with its bound on all readable rows

    @property
    def kept(self) -> np.ndarray:
        """Rows that are kept."""
        return np.logical_and.reduce([self.ok, *self.passed])


@dataclass(frozen=True)
class Settled:
    """A selection with known bounds; works on any part of the rows, and can be pickled."""

    conditions: tuple[Condition, ...] = ()
    ok_only: bool = True  # if there is a ``status``, rows that are not ``ok`` are dropped first
    tied: RandomOrder | None = None  # breaks ties, if a bound needs it
    planned: pa.Schema | None = None  # types of JSON fields that the conditions expect; a shard's own may differ

    @property
    def columns(self) -> list[str]:
        """Columns needed to judge a row (``status`` if there is one)."""
        return list(dict.fromkeys([*self.first, *(self.tied.columns if self.tied is not None else ())]))

    @property
    def first(self) -> list[str]:
        """Columns needed to judge any row; others are needed only for ties at a bound."""
        names = [name for condition in self.conditions for name in condition.columns]
        return list(dict.fromkeys([*(["status"] if self.ok_only else []), *names]))

    def judge(self, table: pa.Table, more: More | None = None) -> Verdict:
        """Judge the rows of an Arrow table; `more` reads other columns of the same rows."""

        def ties(rows: np.ndarray) -> np.ndarray:
            assert self.tied is not None
            whole = table if more is None else more(list(self.tied.columns))
            return self.tied.keys(whole.select(list(self.tied.columns)).filter(pa.array(rows)))[0]

        return self._judge(digest(table, self), ties)

    def judge_digest(self, digest: pd.DataFrame) -> Verdict:
        """Judge rows by their digests."""
        return self._judge(digest, lambda rows: digest["tie"].to_numpy()[rows])

    def _judge(self, digest: pd.DataFrame, ties: Ties) -> Verdict:
        passed = [_passed(digest, i, c, c.bound, ties) for i, c in enumerate(self.conditions)]
        alone = [
            mask if c.alone is None or c.alone is c.bound else _passed(digest, i, c, c.alone, ties)
            for i, (c, mask) in enumerate(zip(self.conditions, passed, strict=True))
        ]
        return Verdict(digest["ok"].to_numpy(), passed, alone)

    def count(self, table: pa.Table) -> Counts:
        """Count the rows of an Arrow table."""
        return counts_of(self, self.judge(table), table)

    def kept(self, table: pa.Table, more: More | None = None) -> np.ndarray:
        """The kept rows of an Arrow table: (n,) bool; `more` as for `judge`."""
        return self.judge(table, more).kept

    def filter(self, df: Any) -> Any:
        """Filter a Dask, pandas or cuDF frame, lazily if it is lazy; reads only the needed parts of a score table."""
        used = [name for name in self.columns if name in df.columns]
        if not used:
            return df
        if not is_dask(df):
            return df[self.mask(df)]
        if (source := source_of(df)) is not None:
            reader, items = source
            return reader.keeping(self).frame(items, "selected")[list(df.columns)]
        narrow = df[used]
        return df[narrow.map_partitions(self.mask, meta=self.mask(meta_of(narrow)), enforce_metadata=False)]

    def mask(self, frame: Any) -> Any:
        """The kept rows of a partition: a bool Series of its library and index."""
        schema = pa.schema([pa.field("keep", pa.bool_(), nullable=False)])
        rows = to_arrow(frame, [name for name in self.columns if name in frame.columns])
        table = pa.Table.from_arrays([pa.array(self.kept(rows))], schema=schema)
        column = backend_of(frame).from_arrow(table)["keep"]
        column.index = frame.index
        return column


def settled_where(where: Where | None, ok_only: bool = True, planned: pa.Schema | None = None) -> Settled:
    """Return a selection by an expression alone, which has no bounds to find."""
    parts = where.conjuncts() if where is not None else []
    return Settled(tuple(Condition(part) for part in parts), ok_only, planned=planned)


def _as_planned(table: pa.Table, planned: pa.Schema | None) -> pa.Table:
    """Convert columns to the types that conditions expect; values of another kind (text for a number) become null."""
    for field in planned or ():
        at = table.schema.get_field_index(field.name)
        if at >= 0 and kind_of(table.schema.field(at).type) not in ("unknown", kind_of(field.type)):
            name = next(name for name, type_ in FIELD_TYPES.items() if type_ == field.type)
            values = [as_type(value, name) for value in table.column(at).to_pylist()]
            table = table.set_column(at, field, pa.array(values, field.type))
    return table


def counts_of(settled: Settled, verdict: Verdict, table: pa.Table) -> Counts:
    """Count a verdict on a table's rows, each condition alone and in turn."""
    left, funnel = verdict.ok, []
    for condition, passed, alone in zip(settled.conditions, verdict.passed, verdict.alone, strict=True):
        left = left & passed
        funnel.append(ConditionCount(condition.text, _many(verdict.ok & alone), _many(left)))
    by_status = _count_texts(table["status"]) if "status" in table.column_names else {}
    return Counts(len(verdict.ok), _many(verdict.ok), _many(left), by_status, funnel)


def _count_texts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each text occurs."""
    found = Counter[str]()
    for chunk in column.chunks:
        coded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        counts = np.bincount(coded.indices.drop_null().to_numpy(), minlength=len(coded.dictionary)).tolist()
        found.update({str(text): n for text, n in zip(coded.dictionary.to_pylist(), counts, strict=True) if n})
        if coded.null_count:
            found["None"] += coded.null_count
    return dict(found)


def _many(rows: np.ndarray) -> int:
    return int(np.count_nonzero(rows))  # several times as fast as a sum


# --- digests --------------------------------------------------------------------------------------


def digest(table: pa.Table, settled: Settled) -> pd.DataFrame:
    """Everything that a selection needs to know about rows, except to break ties, in a few bytes each."""
    table = _as_planned(table, settled.planned)
    ok = np.broadcast_to(np.True_, len(table))
    if settled.ok_only and "status" in table.column_names:
        ok = by_value(table["status"], _is_ok)
    columns: dict[str, Any] = {"ok": ok}
    for i, condition in enumerate(settled.conditions):
        if condition.order is None:
            columns[f"{i}"] = _truth(condition.step, table)  # type: ignore[arg-type]
            continue
        columns[f"{i}"], columns[f"{i} known"] = condition.order.keys(table)
        if isinstance(condition.step, RandomSample) and condition.step.by is not None:
            columns[f"{i} group"], there = _groups(table[condition.step.by], condition.step.by)
            columns[f"{i} known"] = columns[f"{i} known"] & there
    return pd.DataFrame(columns, copy=False)


def _is_ok(texts: Any) -> np.ndarray:
    return _where_true(pc.equal(texts.cast(pa.string()), "ok"))


def _truth(where: RowTest, table: pa.Table) -> np.ndarray:
    if len(where.columns) == 1 and (name := where.columns[0]) in table.column_names:
        return by_value(table[name], lambda values: _where_true(where.evaluate(pa.table({name: values}))))
    return _where_true(where.evaluate(table))


def _where_true(truth: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Unpack truth values: (n,) bool, False for null."""
    array = truth.combine_chunks() if isinstance(truth, pa.ChunkedArray) else truth
    if not len(array):
        return np.zeros(0, bool)
    # Arrow's own conversion takes ten times as long.
    end, (known, truths) = array.offset + len(array), array.buffers()
    bits = np.frombuffer(truths, np.uint8, -(-end // 8))
    if known is not None:
        bits = bits & np.frombuffer(known, np.uint8, len(bits))
    return np.unpackbits(bits, count=end, bitorder="little")[array.offset :].view(bool)


def _groups(groups: pa.ChunkedArray, by: str) -> tuple[pd.Series, np.ndarray]:
    """Groups of rows, and which rows have a group: (n,) bool."""
    groups = groups.cast(plain_type(groups.type))
    check_groups(by, groups.type)
    there = groups.is_valid().to_numpy()
    if pa.types.is_floating(groups.type):
        there = there & ~np.isnan(groups.fill_null(0).to_numpy())
    return groups.to_pandas().reset_index(drop=True), there


def check_groups(by: str, type_: pa.DataType) -> None:
    """Raise `SelectionError` for a column that cannot define groups."""
    if kind_of(type_) not in ("number", "string", "boolean") and not pa.types.is_null(type_):
        raise SelectionError(f"column {by!r} holds {type_}: groups are numbers, text or booleans")


def _passed(digest: pd.DataFrame, i: int, condition: Condition, bound: Any, ties: Ties) -> np.ndarray:
    """The rows that meet a condition: (n,) bool."""
    if condition.order is None:
        return digest[f"{i}"].to_numpy()
    keys, known = digest[f"{i}"].to_numpy(), digest[f"{i} known"].to_numpy()
    if isinstance(bound, GroupBounds):
        at = bound.bounds.index.get_indexer(pd.Index(digest[f"{i} group"]))
        bounds = np.r_[bound.bounds.to_numpy(np.uint64), np.uint64(ALL)][at]  # -1: no bound
        return known & (keys <= bounds)
    if bound.last == NONE:
        return np.zeros(len(digest), bool)
    passed = known & (keys <= min(bound.last, np.iinfo(keys.dtype).max))
    if bound.last_tied != ALL:
        tied = passed & (keys == bound.last)
        if tied.any():
            passed[tied] = ties(tied) <= np.uint64(bound.last_tied)
    return passed
