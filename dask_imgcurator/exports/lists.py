"""The values of a column, one per line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa

from ..engine.backend import backend_of, is_dask
from ..engine.run import reduce
from ..schema import kind_of
from ..select.ranks import arrow_type
from .base import ExportError, concatenated, export_format, only_ok, require, with_status

_WAVE = 256  # partitions whose values are in memory at a time


def values_of(df: Any, column: str, repeat: str | None, format_: str) -> Iterator[pa.ChunkedArray]:
    """Yield a column's values without nulls, in order, partition by partition; each as often as `repeat` says."""
    names = [column] if repeat is None else [column, repeat]
    for name in names:
        require(df, name, format_)
    df = with_status(df, names)
    starts = range(0, df.npartitions, _WAVE) if is_dask(df) else ()
    for some in [df.partitions[start : start + _WAVE] for start in starts] or [df]:
        yield from reduce(some, _known, concatenated, column, repeat)


def _known(frame: Any, column: str, repeat: str | None) -> list[pa.ChunkedArray]:
    table = backend_of(frame).to_host(only_ok(frame), [column] if repeat is None else list({column, repeat}))
    if repeat is None:
        return [table[column].drop_null()]
    try:
        times = table[repeat].cast(pa.int64()).fill_null(0).to_numpy()
    except pa.ArrowException as err:
        raise ExportError(
            f"repeat={repeat!r} holds {table[repeat].type}: give a column of whole numbers ({err})"
        ) from err
    if (times < 0).any():
        raise ExportError(f"repeat={repeat!r} holds {times.min()}: it must be 0 or more")
    return [table[column].take(pa.array(np.repeat(np.arange(len(table)), times))).drop_null()]


@export_format("list", "one key, or value of another column, per line", folder=False)
def list_(df: Any, file: IO[bytes], column: str = "key", repeat: str | None = None) -> int:
    """Write the values of a column of text or integers, one per line, in UTF-8, without nulls.

    `repeat` is a column of whole numbers: how many lines each row gets.
    """
    require(df, column, "list")
    type_ = arrow_type(df, column)
    if not (kind_of(type_) == "string" or pa.types.is_integer(type_) or pa.types.is_null(type_)):
        raise ExportError(f"column {column!r} holds {type_}: a list must hold text or integers")
    rows = 0
    for values in values_of(df, column, repeat, "list"):
        for value in map(str, values.to_pylist()):
            if "\n" in value or "\r" in value:
                raise ExportError(f"column {column!r} holds {value!r}, which is more than one line: leave it out")
            file.write(value.encode() + b"\n")
        rows += len(values)
    return rows
