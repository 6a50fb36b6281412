"""The row of a given rank in a distributed column, exactly, without sorting or shuffling: a radix select.

Every row's value becomes a 64-bit unsigned key with the same order. A pass counts each partition's rows by the first 16
bits of their keys; the sums show which bucket holds the wanted rank, and the next pass counts within that bucket by the
next bits, or by all remaining bits once it holds few enough rows. Only counts move between workers: at most 65,536 per
rank, or as many as there are rows in the last bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of
from ..engine.frames import meta_of
from ..engine.run import reduce
from ..schema import kind_of, suggest

#: Columns that identify a row in any partition; the key is used if one of the other two is missing.
IDENTITY = ("shard", "key", "sample_offset")
_PLACE = ("shard", "sample_offset")

_DIGIT = 16
_GATHER = 1 << 21  # rows whose whole keys may be counted at once: 32 MB
_SIGN = np.uint64(1 << 63)
_ONES = np.uint64(2**64 - 1)


class SelectionError(ValueError):
    """The selection is impossible on these rows."""


# --- keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueOrder:
    """The order of a numeric column; excludes null and NaN, and treats -0.0 as 0.0."""

    # Values are compared as `dtype` (``f8``, ``i8`` or ``u8``), which holds every value of the column exactly.

    column: str
    dtype: str
    largest: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the keys come from."""
        return (self.column,)

    def keys(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Return the (n,) uint64 keys of rows, and which rows have a key: (n,) bool."""
        keys, known = np.zeros(len(table), np.uint64), np.zeros(len(table), bool)
        at = 0
        for chunk in table[self.column].chunks:  # one after the other: they fit in the cache
            if chunk.null_count < len(chunk):  # else whatever its type
                keys[at : at + len(chunk)], known[at : at + len(chunk)] = self._keys(chunk)
            at += len(chunk)
        return keys, known

    def _keys(self, array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        try:
            if kind_of(array.type) != "number":
                raise pa.ArrowInvalid(f"a partition holds {array.type}")
            array = array.cast(pa.from_numpy_dtype(self.dtype))
        except pa.ArrowInvalid as err:  # a partition with another type than the first
            raise SelectionError(
                f"column {self.column!r} is compared as {np.dtype(self.dtype)}, which cannot hold its values exactly: "
                f"{err}. Give it one type"
            ) from err
        if self.dtype == "f8":
            values = array.to_numpy(zero_copy_only=False)  # null is NaN
            known = values == values
            bits = (values + 0.0).view(np.int64)
            keys = bits >> 63  # all ones if negative
            keys |= np.int64(-(2**63))
            keys ^= bits
        else:
            known = array.is_valid().to_numpy(zero_copy_only=False)
            keys = array.fill_null(0).to_numpy().view(np.int64) ^ np.int64(-(2**63) if self.dtype == "i8" else 0)
        return np.invert(keys, out=keys).view(np.uint64) if self.largest else keys.view(np.uint64), known

    def value(self, key: int) -> float | int:
        """Return the value of a key."""
        bits = np.array([key], np.uint64)
        if self.largest:
            bits = ~bits
        if self.dtype == "u8":
            return int(bits[0])
        if self.dtype == "i8":
            return int((bits ^ _SIGN).view(np.int64)[0])
        return float((bits ^ np.where(bits & _SIGN, _SIGN, _ONES)).view(np.float64)[0])


@dataclass(frozen=True)
class RandomOrder:
    """A random order that depends on the seed and on a row's identity, not on where it is."""

    identity: tuple[str, ...]
    seed: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the keys come from."""
        return self.identity

    def keys(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Return the (n,) uint64 keys of rows, and which rows have a key: all of them."""
        # Uses all bits of a seed, however long or negative.
        (seed,) = pd.util.hash_array(np.array([str(self.seed)], object))
        keys, at = np.full(len(table), seed, np.uint64), 0
        for batch in table.select(list(self.identity)).to_batches():  # one after the other: they fit in the cache
            some = keys[at : at + len(batch)]
            for name in self.identity:
                some[:] = _mix(some ^ _hashes(batch[name], repeated=name == "shard"))
            at += len(batch)
        return keys, np.ones(len(table), bool)


Order = ValueOrder | RandomOrder


def no_column(column: str, there: Iterable[Any], what: str = "") -> SelectionError:
    """Create the error for a missing column."""
    names = [str(name) for name in there]
    hint = suggest(column, names)
    return SelectionError(f"{what}no column {column!r}{hint} (available: {', '.join(names)})")


def arrow_type(df: Any, column: str) -> pa.DataType:
    """Arrow type of a column, from a frame's dtypes; null if they do not determine it (Python objects)."""
    return backend_of(df).to_host(meta_of(df), [column]).schema.field(column).type


def value_order(df: Any, column: str, largest: bool = False) -> ValueOrder:
    """Resolve how to compare a column's values."""
    if column not in df.columns:
        raise no_column(column, df.columns)
    type_ = arrow_type(df, column)
    long = pa.types.is_decimal(type_) and type_.precision > 15  # float64 cannot distinguish its values
    if long or kind_of(type_) not in ("number", "unknown"):
        raise SelectionError(f"column {column!r} holds {type_}, which has no rank here: name a column of int or float")
    dtype = {pa.int64(): "i8", pa.uint64(): "u8"}.get(type_, "f8")  # shorter integers are exact in float64
    return ValueOrder(column, dtype, largest)


def random_order(df: Any, seed: int, why: str) -> RandomOrder:
    """Resolve the columns that identify rows."""
    identity = tuple(name for name in IDENTITY if name in df.columns)
    if not identity:
        raise SelectionError(
            f"{why} needs the columns that identify a row ({', '.join(IDENTITY)}, or one of them): keep them "
            f"(available: {', '.join(map(str, df.columns))})"
        )
    return RandomOrder(_PLACE if set(_PLACE) <= set(identity) else identity, int(seed))


def _hashes(array: pa.Array, repeated: bool) -> np.ndarray:
    """Hash numbers or text: (n,) uint64, the same in every process and for every storage type."""
    if pa.types.is_integer(array.type):
        known = array.fill_null(-1) if array.null_count else array
        return known.cast(pa.int64()).to_numpy().view(np.uint64)
    if repeated or pa.types.is_dictionary(array.type):
        return by_value(array if pa.types.is_dictionary(array.type) else array.dictionary_encode(), _hashes_of)
    return _hashes_of(array)


def by_value(coded: pa.DictionaryArray, function: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
    """Apply a function once to each value of dictionary-encoded text, including null."""
    values = coded.dictionary
    of = function(pa.concat_arrays([values, pa.nulls(1, values.type)]))
    if len(values) == 1 and not coded.null_count:
        return np.broadcast_to(of[0], len(coded))
    return of[coded.indices.fill_null(len(values)).to_numpy()]


def _hashes_of(texts: pa.Array) -> np.ndarray:
    texts = texts.cast(pa.string())
    return pd.util.hash_array(texts.to_numpy(zero_copy_only=False).astype(object), categorize=False)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): a bijection in which every bit depends on all."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- passes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bracket:
    """Keys that contain a rank (from 1): those whose first bits are `key`, with `low` bits still unknown."""

    rank: int
    key: int
    low: int
    before: int  # rows with smaller keys
    equal: int  # rows whose keys begin with `key`

    @property
    def question(self) -> tuple[int, int, int]:
        """The next question: the prefix `key`, and the bit down to which to count."""
        return self.key, self.low, 0 if self.equal <= _GATHER else max(0, self.low - _DIGIT)

    def narrowed(self, low: int, buckets: np.ndarray, counts: np.ndarray) -> Bracket:
        """Return the narrower bracket, from the counts of keys that begin with `key`, down to bit `low`."""
        ends = self.before + np.cumsum(counts)
        at = int(np.searchsorted(ends, self.rank))
        equal = int(counts[at])
        return Bracket(self.rank, int(buckets[at]), low, int(ends[at]) - equal, equal)


#: Returns the keys of a partition's participating rows: (m,) uint64.
Keys = Callable[[Any], np.ndarray]

#: For each question, the sorted prefixes of the keys that occur, and how many rows have them.
_Counts = list[tuple[np.ndarray, np.ndarray]]


def find_ranks(df: Any, keys: Keys, ranks_of: Callable[[int], Iterable[int]]) -> tuple[int, dict[int, Bracket]]:
    """Find keys by rank; returns the number of participating rows, and per rank its key and the rows up to that key."""
    # `ranks_of` gets the number of participating rows and returns the ranks to find, from 1 to that number.
    low = 64 - _DIGIT
    ((buckets, counts),) = _ask(df, keys, [(0, 64, low)])
    n = int(counts.sum())
    found = {rank: Bracket(rank, 0, 64, 0, n).narrowed(low, buckets, counts) for rank in ranks_of(n)}
    while questions := list({b.question: None for b in found.values() if b.low}):
        answers = dict(zip(questions, _ask(df, keys, questions), strict=True))
        found = {r: b.narrowed(b.question[2], *answers[b.question]) if b.low else b for r, b in found.items()}
    return n, found


def _ask(df: Any, keys: Keys, questions: list[tuple[int, int, int]]) -> _Counts:
    found: _Counts = reduce(df, _count, _merge, keys, questions)
    return found


def _count(frame: Any, keys_of: Keys, questions: list[tuple[int, int, int]]) -> _Counts:
    keys = keys_of(frame)
    out = []
    for key, top, low in questions:
        inside = keys if top == 64 else keys[keys >> np.uint64(top) == np.uint64(key)]
        if top - low <= _DIGIT:
            start = np.uint64(key << (top - low))
            digits = inside >> np.uint64(low)
            digits -= start
            counts = np.bincount(digits.view(np.int64))
            there = np.flatnonzero(counts)
            out.append((there.astype(np.uint64) + start, counts[there]))
        else:
            buckets, counts = np.unique(inside >> np.uint64(low), return_counts=True)
            out.append((buckets, counts))
    return out


def _merge(found: list[_Counts]) -> _Counts:
    out = []
    for pieces in zip(*found, strict=True):
        buckets, counts = (np.concatenate(side) for side in zip(*pieces, strict=True))
        by = np.argsort(buckets, kind="stable")
        buckets, counts = buckets[by], counts[by]
        first = np.flatnonzero(np.r_[True, buckets[1:] != buckets[:-1]]) if len(buckets) else by
        out.append((buckets[first], np.add.reduceat(counts, first) if len(first) else counts))
    return out
