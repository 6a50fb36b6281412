"""Steps on frames of any kind (Dask, pandas or cuDF), and passes over their rows as Arrow tables."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.dataframe.dask_expr._expr import ArrowStringConversion, Projection
from dask.dataframe.dask_expr.io.io import FromMap, FromMapProjectable
from dask.system import CPU_COUNT

from .backend import backend_of, is_dask


def meta_of(frame: Any) -> Any:
    """Return an empty frame with the frame's columns."""
    from dask.dataframe.utils import make_meta

    return make_meta(frame) if is_dask(frame) else frame.iloc[:0]


def from_map(function: Callable[..., Any], items: Sequence[Any], label: str, meta: Any, **spec: Any) -> dd.DataFrame:
    """Make a lazy frame of one partition per item."""
    return dd.from_map(function, items, meta=meta, enforce_metadata=False, label=label, **spec)


def objects_stay() -> Any:
    """Context in which Dask does not convert objects in new frames to text."""
    # Only for our own graphs: in users' frames it would trigger a bug in Dask (`df.partitions[0].repartition(1)`).
    return dask.config.set({"dataframe.convert-string": False})


def as_made(backend: str) -> Any:
    """Context for new frames of a backend: Dask would convert the text of cuDF frames whose meta is pandas."""
    return contextlib.nullcontext() if backend == "pandas" else objects_stay()


def apply_step(
    frame: Any,
    function: Callable[[Any, Any], Any],
    spec: Any,
    added: pa.Schema,
    needs: Sequence[str] | None = None,
) -> Any:
    """Apply a partition function to a frame of any kind; `added`: columns that it adds or replaces."""
    # With `needs`, the columns that it reads, it is not called if none of the added columns is used.
    if not is_dask(frame):
        return function(frame, spec)
    start = meta_of(frame)
    new = backend_of(frame).from_arrow(added.empty_table())
    new.index = start.index
    meta = start.assign(**{name: new[name] for name in added.names})
    if needs is None:
        return frame.map_partitions(function, spec, meta=meta, enforce_metadata=False)
    names, narrow = list(added.names), frame[list(needs)]
    made = narrow.map_partitions(_added, function, spec, names, meta=meta[names], enforce_metadata=False)
    return frame.assign(**{name: made[name] for name in names})


def _added(frame: Any, function: Callable[[Any, Any], Any], spec: Any, names: list[str]) -> Any:
    return function(frame, spec)[names]


def require_columns(frame: Any, needed: Sequence[str], step: str, remedy: str) -> None:
    """Raise ValueError, on the client, for columns that a step needs and a frame lacks."""
    backend_of(frame)  # raises for anything but a frame
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{step} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {remedy} "
            f"(available: {', '.join(map(str, frame.columns))})"
        )


def refuse_text(frame: Any, column: str) -> None:
    """Raise TypeError, on the client, for text where vectors are expected: Dask converts objects to text."""
    dtype = str(meta_of(frame)[column].dtype)
    if dtype == "str" or dtype.startswith("string"):
        raise TypeError(
            f"column {column!r} holds text, not vectors. Dask converts objects to text: set its configuration "
            "dataframe.convert-string to False before the DataFrame is made, or use a column of Arrow lists"
        )


def host_column(frame: Any, name: str) -> list[Any]:
    """Return the values of a partition's column as Python objects."""
    return list(backend_of(frame).to_host(frame, [name])[name].to_pylist())


# --- rows as Arrow tables -------------------------------------------------------------------------


def to_arrow(frame: Any, names: Sequence[str]) -> pa.Table:
    """Copy columns of a pandas or cuDF frame into host memory; those of an Arrow table are used as they are."""
    if isinstance(frame, pa.Table):
        return frame.select(list(names))
    part = frame[list(names)]
    # Under their own names, the backend would convert some to the types of the schema.
    part.columns = [str(i) for i in range(len(names))]
    try:
        return backend_of(frame).to_host(part, list(part.columns)).rename_columns(list(names))
    except (pa.ArrowException, OverflowError, UnicodeError):  # Python objects
        if len(names) > 1:
            return pa.table({name: to_arrow(frame, [name])[name] for name in names})
        return pa.table({names[0]: _objects(frame[names[0]])})


def _objects(column: pd.Series) -> pa.Array:
    """Objects without an Arrow type: integers of any size as float64; for others, only whether they are null."""
    if pd.api.types.infer_dtype(column, skipna=True) in ("integer", "floating", "mixed-integer-float"):
        return pa.array(column.astype("float64"), from_pandas=True)
    return pa.array([b"" if known else None for known in column.notna()], pa.binary())


#: Reads columns.
More: TypeAlias = Callable[[list[str]], pa.Table]


class RowFilter(Protocol):
    """Decides which rows are wanted: from the columns `first`, and from `more` if those do not suffice."""

    @property
    def first(self) -> list[str]: ...

    def kept(self, table: pa.Table, more: More | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Picked:
    """The source of a partition and which of its rows are wanted; made by `pick`."""

    item: Any
    rows: int
    kept: int
    bits: bytes

    def __dask_tokenize__(self) -> Any:
        return self.item, self.rows, hashlib.sha256(self.bits).hexdigest()  # Dask would write bytes out as text

    @property
    def mask(self) -> np.ndarray:
        """The wanted rows: (n,) bool."""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.rows).astype(bool)


def pick(item: Any, kept: np.ndarray) -> Picked:
    """Keep some of an item's rows."""
    if isinstance(item, Picked):
        item, mask = item.item, item.mask
        mask[mask] = kept
        kept = mask
    return Picked(item, len(kept), int(kept.sum()), np.packbits(kept).tobytes())


def together(parts: Sequence[list[Picked]], at_once: int) -> list[list[Picked]]:
    """Join neighbouring partitions with few wanted rows, up to the size of the largest one."""
    most = max((sum(item.rows for item in part) for part in parts), default=0)
    found: list[list[Picked]] = []
    rows = most
    for part in parts:
        more = sum(item.kept for item in part)
        if found and rows + more <= most and len(found[-1]) + len(part) <= at_once:
            found[-1].extend(part)
            rows += more
        else:
            found.append(list(part))
            rows = more
    return found


class Reader(ABC):
    """Reads files as partitions of a frame; passes over a few columns read several at once, as Arrow tables."""

    backend: str
    filters: tuple[RowFilter, ...]
    at_once: int  # items per task when only a few columns are wanted

    @property
    @abstractmethod
    def meta(self) -> Any:
        """An empty partition."""

    @abstractmethod
    def __call__(self, items: Sequence[Any], columns: Sequence[str] | None = None) -> Any:
        """Read a partition; Dask's optimizer sets `columns` to those used later."""

    @abstractmethod
    def table(self, items: Sequence[Any], names: Sequence[str]) -> pa.Table:
        """Read columns of some items."""

    @abstractmethod
    def keeping(self, rows: RowFilter) -> Reader:
        """Read fewer rows."""

    def frame(self, parts: Sequence[Sequence[Any]], label: str) -> dd.DataFrame:
        """Make a lazy frame; each partition is read from some items."""
        with as_made(self.backend):
            return from_map(self, parts, label, self.meta)


def source_of(df: Any) -> tuple[Reader, list[Sequence[Any]]] | None:
    """A Dask frame's reader and each partition's items; None if the frame does more than select columns."""
    expr = df.expr.simplify()
    while isinstance(expr, Projection | ArrowStringConversion):
        expr = expr.frame
    reader = expr.operand("func") if isinstance(expr, FromMap | FromMapProjectable) else None
    return (reader, [expr.iterables[0][i] for i in expr._partitions]) if isinstance(reader, Reader) else None


def grouped(reader: Reader, parts: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Items of several partitions that one task reads when only a few columns are wanted."""
    size = min(reader.at_once, max(1, len(parts) // (2 * CPU_COUNT)))
    return [[item for part in parts[i : i + size] for item in part] for i in range(0, len(parts), size)]


def map_tables(
    df: Any, names: Sequence[str], function: Callable[..., Any], *args: Any, meta: Any, label: str
) -> dd.DataFrame:
    """Map a function (Arrow table of columns, *args) over a Dask frame, several partitions at once if possible."""
    source = source_of(df)
    if source is None:
        narrow = df[list(names)]
        return narrow.map_partitions(_on_frame, function, args, meta=meta, enforce_metadata=False, token=label)
    with objects_stay():
        return from_map(_on_items, grouped(*source), label, meta, args=[source[0], list(names), function, *args])


def _on_frame(frame: Any, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    return function(to_arrow(frame, list(frame.columns)), *args)


def _on_items(
    items: Sequence[Any], reader: Reader, names: Sequence[str], function: Callable[..., Any], *args: Any
) -> Any:
    return function(reader.table(items, names), *args)


def objects_of(items: Sequence[Any], label: str) -> dd.DataFrame:
    """Make a Dask frame with one partition per item, which holds the item."""
    with objects_stay():
        return from_map(boxed, list(items), label, boxed(None).iloc[:0])


def boxed(value: Any) -> pd.DataFrame:
    """A frame of one row with one object."""
    return pd.DataFrame({"object": pd.Series([value], dtype=object)})
