"""The row of a given rank in a distributed column, exactly, without sorting or shuffling: a radix select.

Every row's value becomes an unsigned key of 32 or 64 bits with the same order. A pass counts each partition's rows by
the first 16 bits of their keys; the sums show which bucket holds the wanted rank, and the next pass counts within that
bucket by the next bits, or by all remaining bits once it holds few enough rows. Only counts move between workers: at
most 65,536 per rank, or as many as there are rows in the last bucket.
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


class SelectionError(ValueError):
    """The selection is impossible on these rows."""


# --- keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueOrder:
    """The order of a numeric column; excludes null and NaN, and treats -0.0 as 0.0."""

    # Values are compared as `dtype` (``f4``, ``f8``, ``i8`` or ``u8``), which holds every value of the column exactly.

    column: str
    dtype: str
    largest: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the keys come from."""
        return (self.column,)

    @property
    def bits(self) -> int:
        """Bits of a key."""
        return 8 * np.dtype(self.dtype).itemsize

    def keys(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Return the (n,) unsigned keys of rows, and which rows have a key: (n,) bool."""
        keys, known = np.zeros(len(table), f"u{self.bits // 8}"), np.zeros(len(table), bool)
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
            array = _exactly(array, pa.from_numpy_dtype(self.dtype))
        except pa.ArrowInvalid as err:  # a partition with another type than the first
            raise SelectionError(
                f"column {self.column!r} is compared as {np.dtype(self.dtype)}, which cannot hold its values exactly: "
                f"{err}. Give it one type"
            ) from err
        signed = np.dtype(f"i{self.bits // 8}")
        sign = np.iinfo(signed).min
        if self.dtype.startswith("f"):
            values = array.to_numpy(zero_copy_only=False)  # null is NaN
            known = values == values
            bits = (values + 0.0).view(signed)
            keys = bits >> (self.bits - 1)  # all ones if negative
            keys |= sign
            keys ^= bits
        else:
            known = array.is_valid().to_numpy(zero_copy_only=False)
            keys = array.fill_null(0).to_numpy().view(signed) ^ (sign if self.dtype == "i8" else 0)
        return (np.invert(keys, out=keys) if self.largest else keys).view(f"u{self.bits // 8}"), known

    def value(self, key: int) -> float | int:
        """Return the value of a key."""
        ones, sign = 2**self.bits - 1, 2 ** (self.bits - 1)
        key = key ^ ones if self.largest else key
        if self.dtype.startswith("f"):
            key ^= sign if key & sign else ones
        elif self.dtype == "i8":
            key ^= sign
        value: float | int = np.array(key, f"u{self.bits // 8}").view(self.dtype).item()
        return value


@dataclass(frozen=True)
class RandomOrder:
    """A random order that depends on the seed and on a row's identity, not on where it is."""

    identity: tuple[str, ...]
    seed: int = 0
    bits = 64

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the keys come from."""
        return self.identity

    def keys(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Return the (n,) uint64 keys of rows, and which rows have a key: all of them."""
        # Uses all bits of a seed, however long or negative.
        seed = pd.util.hash_array(np.array([str(self.seed)], object))
        keys, at = np.empty(len(table), np.uint64), 0
        for batch in table.select(list(self.identity)).to_batches():  # one after the other: they fit in the cache
            some: np.ndarray = seed
            for name in self.identity:
                some = _mix(some ^ _hashes(batch[name], repeated=name == "shard"))
            keys[at : at + len(batch)] = some
            at += len(batch)
        return keys, np.broadcast_to(np.True_, len(table))


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
    # Shorter integers are exact in float64. Half the bytes are read and written in half the time.
    dtype = {pa.int64(): "i8", pa.uint64(): "u8", pa.float32(): "f4", pa.float16(): "f4"}.get(type_, "f8")
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


def _exactly(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """Cast numbers; ArrowInvalid if one would change."""
    cast = array.cast(type_)
    if type_ == pa.float32() and array.type not in (pa.float16(), pa.float32()):  # Arrow rounds float64 and decimals
        exact, rounded = (a.to_numpy(zero_copy_only=False) for a in (array.cast(pa.float64()), cast))
        if (off := np.flatnonzero((exact != rounded) & (exact == exact))).size:
            raise pa.ArrowInvalid(f"a partition holds {exact[off[0]]} as {array.type}")
    return cast


def _hashes(array: pa.Array, repeated: bool) -> Any:
    """Hash numbers or text: (n,) uint64, or one for all; the same in every process and for every storage type."""
    if pa.types.is_integer(array.type):
        known = array.fill_null(-1) if array.null_count else array
        return known.cast(pa.int64()).to_numpy().view(np.uint64)
    if repeated or pa.types.is_dictionary(array.type):
        coded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
        if len(coded.dictionary) == 1 and not coded.null_count:
            return _hashes_of(coded.dictionary)
        return by_value(pa.chunked_array([coded]), _hashes_of)
    return _hashes_of(array)


def by_value(coded: pa.ChunkedArray, function: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Apply a function to a column; if it is dictionary-encoded, once to each of its values, including null."""
    if not pa.types.is_dictionary(coded.type):
        return function(coded)
    found, values, of = [], pa.nulls(0, coded.type.value_type), function(pa.nulls(1, coded.type.value_type))
    for chunk in coded.chunks:
        if not chunk.dictionary.equals(values):  # mostly they are those of the chunk before
            values = chunk.dictionary
            of = function(pa.concat_arrays([values, pa.nulls(1, values.type)]))
        codes = chunk.indices.fill_null(len(values)) if chunk.null_count else chunk.indices
        found.append(of.take(codes.to_numpy()))
    return np.concatenate(found) if found else of[:0]


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


#: Returns a partition's keys, (n,) unsigned, and which rows participate: (n,) bool.
Keys = Callable[[Any], tuple[np.ndarray, np.ndarray]]

#: For each question, the sorted prefixes of the keys that occur, and how many rows have them.
_Counts = list[tuple[np.ndarray, np.ndarray]]


def find_ranks(
    df: Any, keys: Keys, bits: int, ranks_of: Callable[[int], Iterable[int]]
) -> tuple[int, dict[int, Bracket]]:
    """Find keys by rank; returns the number of participating rows, and per rank its key and the rows up to that key."""
    # `ranks_of` gets the number of participating rows and returns the ranks to find, from 1 to that number.
    low = bits - _DIGIT
    ((buckets, counts),) = _ask(df, keys, [(0, bits, low)])
    n = int(counts.sum())
    found = {rank: Bracket(rank, 0, bits, 0, n).narrowed(low, buckets, counts) for rank in ranks_of(n)}
    while questions := list({b.question: None for b in found.values() if b.low}):
        answers = dict(zip(questions, _ask(df, keys, questions), strict=True))
        found = {r: b.narrowed(b.question[2], *answers[b.question]) if b.low else b for r, b in found.items()}
    return n, found


def _ask(df: Any, keys: Keys, questions: list[tuple[int, int, int]]) -> _Counts:
    found: _Counts = reduce(df, _count, _merge, keys, questions)
    return found


def _count(frame: Any, keys_of: Keys, questions: list[tuple[int, int, int]]) -> _Counts:
    keys, taking_part = keys_of(frame)
    keys = np.ascontiguousarray(keys)
    out = []
    for key, top, low in questions:
        rows = taking_part if top == 8 * keys.itemsize else taking_part & (keys >> top == key)
        if top - low == _DIGIT:
            digits = keys.view(np.uint16)[low // _DIGIT :: keys.itemsize // 2]  # the least significant comes first
            if 2 * np.count_nonzero(rows) <= len(rows):
                counts = np.bincount(digits[rows], minlength=1 << _DIGIT)
            else:  # the fewer rows are copied
                counts = np.bincount(digits, minlength=1 << _DIGIT) - np.bincount(digits[~rows], minlength=1 << _DIGIT)
            there = np.flatnonzero(counts)
            out.append((there.astype(np.uint64) + np.uint64(key << _DIGIT), counts[there]))
        else:
            buckets, counts = np.unique(keys[rows] >> low, return_counts=True)
            out.append((buckets.astype(np.uint64), counts))
    return out


def _merge(found: list[_Counts]) -> _Counts:
    out = []
    for pieces in zip(*found, strict=True):
        buckets, counts = (np.concatenate(side) for side in zip(*pieces, strict=True))
        if len(buckets) and buckets.max() - (start := buckets.min()) < 1 << _DIGIT:  # no need to sort them
            sums = np.bincount((buckets - start).view(np.int64), counts)
            there = np.flatnonzero(sums)
            buckets, sums = there.astype(np.uint64) + start, sums[there]
        else:
            buckets, at = np.unique(buckets, return_inverse=True)
            sums = np.bincount(at, counts)
        out.append((buckets, sums.astype(np.int64)))  # float64, exact up to 2**53 rows
    return out
