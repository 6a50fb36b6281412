"""The row of a given rank in a distributed column, exactly, without sorting or shuffling: a radix select.

Every row's value becomes a 64-bit unsigned key whose order is that of the rows. A pass counts, in each partition, the
rows by the first 16 bits of their keys; the sums tell in which bucket the wanted rank lies, and the next pass counts
within it by the next bits, or by all that are left once few enough rows are in it. Two passes settle a column of
float32 scores or random keys, up to some ten million rows; four settle any column of any length. Between workers move
counts only: at most 65,536 a question, or as many as there are rows in the last bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import dask
import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, get_backend, is_dask
from ..schema import kind_of

__all__ = [
    "IDENTITY",
    "Order",
    "Place",
    "RandomOrder",
    "SelectionError",
    "TiedOrder",
    "ValueOrder",
    "arrow_type",
    "find_ranks",
    "partitions",
    "tree",
    "value_order",
]

#: Columns by which a row is known, whatever partition it is in.
IDENTITY = ("shard", "key", "sample_offset")

_DIGIT = 16
_GATHER = 1 << 21  # rows whose whole keys may be counted at once: 32 MB
_FAN_IN = 16
_SIGN = np.uint64(1 << 63)
_ONES = np.uint64(2**64 - 1)


class SelectionError(ValueError):
    """A selection that cannot be made on these rows."""


# --- keys -----------------------------------------------------------------------------------------


class Order(Protocol):
    """An order of rows, as a key of each; picklable."""

    def keys(self, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the (n,) uint64 keys of a partition's rows, and which rows have one: (n,) bool."""
        ...


@dataclass(frozen=True)
class ValueOrder:
    """The order of a column of numbers; null and NaN have no place in it, and -0.0 is 0.0.

    Attributes
    ----------
    backend : str
        Of the partitions.
    column : str
        Name of the column.
    dtype : {"f8", "i8", "u8"}
        In which values are compared; every value of the column's type is exact in it.
    largest : bool
        Whether the largest value comes first.
    """

    backend: str
    column: str
    dtype: str
    largest: bool = False

    def keys(self, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `Order.keys`."""
        array = get_backend(self.backend).to_host(frame, [self.column])[self.column]
        known = array.is_valid().to_numpy()
        if not known.any():  # of whatever type
            return np.zeros(len(frame), np.uint64), known
        try:
            if kind_of(array.type) != "number":
                raise pa.ArrowInvalid(f"a partition holds {array.type}")
            values = array.cast(pa.from_numpy_dtype(self.dtype)).fill_null(0).to_numpy()
        except pa.ArrowInvalid as err:  # a partition of another type than the first
            raise SelectionError(
                f"column {self.column!r} has values that are not exact as {np.dtype(self.dtype)}, as which it is "
                f"compared: {err}. Give it one type"
            ) from err
        if self.dtype == "f8":
            known = known & ~np.isnan(values)
            bits = (values + 0.0).view(np.uint64)
            keys = bits ^ np.where(bits >> np.uint64(63) != 0, _ONES, _SIGN)
        elif self.dtype == "i8":
            keys = values.view(np.uint64) ^ _SIGN
        else:
            keys = values
        return (~keys if self.largest else keys), known

    def value(self, key: int) -> float | int:
        """Return the value that has a key."""
        bits = np.array([key], np.uint64)
        if self.largest:
            bits = ~bits
        if self.dtype == "u8":
            return int(bits[0])
        if self.dtype == "i8":
            return int((bits ^ _SIGN).view(np.int64)[0])
        return float((bits ^ np.where(bits & _SIGN, _SIGN, _ONES)).view(np.float64)[0])


def arrow_type(df: Any, column: str) -> pa.DataType:
    """Arrow type of a column by a frame's dtypes; null where they do not tell (Python objects)."""
    from dask.dataframe.utils import make_meta

    empty = make_meta(df) if is_dask(df) else df.iloc[:0]
    return backend_of(df).to_host(empty, [column]).schema.field(column).type


def value_order(df: Any, column: str, largest: bool = False) -> ValueOrder:
    """Settle how the values of a column are compared.

    Raises
    ------
    SelectionError
        If there is no such column (those there are are named), or it is not of numbers.
    """
    backend = backend_of(df)
    if column not in df.columns:
        raise SelectionError(f"there is no column {column!r} (there are: {', '.join(map(str, df.columns))})")
    type_ = arrow_type(df, column)
    if pa.types.is_decimal(type_) or not (kind_of(type_) == "number" or pa.types.is_null(type_)):
        raise SelectionError(f"column {column!r} holds {type_}, which has no rank here: name a column of int or float")
    dtype = {pa.int64(): "i8", pa.uint64(): "u8"}.get(type_, "f8")  # shorter integers are exact in float64
    return ValueOrder(backend.name, column, dtype, largest)


@dataclass(frozen=True)
class RandomOrder:
    """A random order that depends on the seed and on what a row is known by, not on where it is.

    Attributes
    ----------
    backend : str
        Of the partitions.
    identity : tuple of str
        Which of `IDENTITY` there are.
    seed : int
        Another seed, another order.
    """

    backend: str
    identity: tuple[str, ...]
    seed: int = 0

    def keys(self, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `Order.keys`."""
        table = get_backend(self.backend).to_host(frame, list(self.identity))
        # Of all the bits of a seed, however long or negative.
        keys = np.zeros(len(frame), np.uint64) ^ pd.util.hash_array(np.array([str(self.seed)], object))
        for name in self.identity:
            keys = _mix(keys ^ _hashes(table[name], repeated=name == "shard"))
        return keys, np.ones(len(frame), bool)


def _hashes(array: pa.ChunkedArray, repeated: bool) -> np.ndarray:
    """Hash numbers or text: (n,) uint64, the same in every process and for every way to store them."""
    if pa.types.is_integer(array.type):
        return array.fill_null(-1).cast(pa.int64()).to_numpy().view(np.uint64)
    array = array.cast(pa.string()).combine_chunks()
    if repeated:
        coded = array.dictionary_encode(null_encoding="encode")
        return _hashes_of(coded.dictionary)[coded.indices.to_numpy()]
    return _hashes_of(array)


def _hashes_of(texts: pa.Array) -> np.ndarray:
    return pd.util.hash_array(texts.to_numpy(zero_copy_only=False).astype(object), categorize=False)


def _mix(x: np.ndarray) -> np.ndarray:
    """Finish like splitmix64 (Steele, Lea and Flood 2014): a bijection in which every bit depends on all."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class TiedOrder:
    """The order `then` of the rows that have one key in the order `first`; the others have no place."""

    first: Order
    key: int
    then: Order

    def keys(self, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `Order.keys`; `then` is asked for the tied rows only."""
        keys, known = self.first.keys(frame)
        tied = known & (keys == np.uint64(self.key))
        out = np.zeros(len(frame), np.uint64)
        if tied.any():
            out[tied] = self.then.keys(frame[tied])[0]
        return out, tied


# --- passes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a rank lies.

    Attributes
    ----------
    rank : int
        From 1.
    key : int
        The first bits of the key that has it; all of them when `low` is 0.
    low : int
        How many of the last bits are still unknown.
    before : int
        Rows whose keys come before.
    equal : int
        Rows whose keys begin so.
    """

    rank: int
    key: int
    low: int
    before: int
    equal: int

    @property
    def question(self) -> tuple[int, int, int]:
        """What to ask next: of the keys that begin with `key`, down to which bit."""
        return self.key, self.low, 0 if self.equal <= _GATHER else max(0, self.low - _DIGIT)

    def narrowed(self, low: int, buckets: np.ndarray, counts: np.ndarray) -> Place:
        """Return the place within the rows that begin with `key`, counted down to the bit `low`."""
        ends = self.before + np.cumsum(counts)
        at = int(np.searchsorted(ends, self.rank))
        equal = int(counts[at])
        return Place(self.rank, int(buckets[at]), low, int(ends[at]) - equal, equal)


#: For each question, the sorted beginnings of the keys that there are, and how many rows have them.
_Counts = list[tuple[np.ndarray, np.ndarray]]


def find_ranks(
    parts: Sequence[Any], order: Order, ranks_of: Callable[[int], Iterable[int]]
) -> tuple[int, dict[int, Place]]:
    """Find rows by rank.

    Parameters
    ----------
    parts : sequence of frames or Delayed
        See `partitions`.
    order : Order
        Their order.
    ranks_of : callable
        Given the number of rows that have a key, returns the ranks to look for, from 1 to that number.

    Returns
    -------
    int, dict of int to Place
        The number of rows that have a key; for each rank its key, and how many rows have it or come before.
    """
    low = 64 - _DIGIT
    ((buckets, counts),) = _ask(parts, order, [(0, 64, low)])
    n = int(counts.sum())
    places = {rank: Place(rank, 0, 64, 0, n).narrowed(low, buckets, counts) for rank in ranks_of(n)}
    while questions := list({p.question: None for p in places.values() if p.low}):
        answers = dict(zip(questions, _ask(parts, order, questions), strict=True))
        places = {r: p.narrowed(p.question[2], *answers[p.question]) if p.low else p for r, p in places.items()}
    return n, places


def _ask(parts: Sequence[Any], order: Order, questions: list[tuple[int, int, int]]) -> _Counts:
    found: _Counts = tree(parts, _count, _merge, order, questions)
    return found


def _count(frame: Any, order: Order, questions: list[tuple[int, int, int]]) -> _Counts:
    keys, known = order.keys(frame)
    keys = keys[known]
    out = []
    for key, top, low in questions:
        inside = keys if top == 64 else keys[keys >> np.uint64(top) == np.uint64(key)]
        if top - low <= _DIGIT:
            start = np.uint64(key << (top - low))
            counts = np.bincount(((inside >> np.uint64(low)) - start).astype(np.int64))
            there = np.flatnonzero(counts)
            out.append((there.astype(np.uint64) + start, counts[there]))
        else:
            buckets, counts = np.unique(inside >> np.uint64(low), return_counts=True)
            out.append((buckets, counts))
    return out


def _merge(found: Sequence[_Counts]) -> _Counts:
    out = []
    for pieces in zip(*found, strict=True):
        buckets, counts = (np.concatenate(side) for side in zip(*pieces, strict=True))
        by = np.argsort(buckets, kind="stable")
        buckets, counts = buckets[by], counts[by]
        first = np.flatnonzero(np.r_[True, buckets[1:] != buckets[:-1]]) if len(buckets) else by
        out.append((buckets[first], np.add.reduceat(counts, first) if len(first) else counts))
    return out


# --- graphs ---------------------------------------------------------------------------------------


def partitions(df: Any, columns: Iterable[str]) -> list[Any]:
    """Return the partitions of a frame with some of its columns: Delayed, or the one frame itself."""
    chosen = df[list(dict.fromkeys(columns))]
    return list(chosen.to_delayed()) if is_dask(df) else [chosen]


def tree(parts: Sequence[Any], function: Any, merge: Any, *args: Any) -> Any:
    """Apply a function to each partition and merge the results, a few at a time, on the workers.

    Parameters
    ----------
    parts : sequence of frames or Delayed
        See `partitions`.
    function : callable
        ``function(partition, *args)``.
    merge : callable
        Of a list of results.
    *args
        Sent to the workers once.

    Returns
    -------
    The merged result.
    """
    if not dask.is_dask_collection(parts[0]):
        return merge([function(part, *args) for part in parts])
    shared = [dask.delayed(arg, traverse=False) for arg in args]
    level = [dask.delayed(function)(part, *shared) for part in parts]
    while True:
        level = [dask.delayed(merge)(level[i : i + _FAN_IN]) for i in range(0, len(level), _FAN_IN)]
        if len(level) == 1:
            return level[0].compute()
