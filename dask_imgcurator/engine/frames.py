"""Steps on frames of any kind: Dask, pandas or cuDF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask
import dask.dataframe as dd
import pyarrow as pa

from .backend import backend_of, is_dask


def meta_of(frame: Any) -> Any:
    """Return an empty frame with the frame's columns."""
    from dask.dataframe.utils import make_meta

    return make_meta(frame) if is_dask(frame) else frame.iloc[:0]


def from_map(function: Callable[..., Any], items: Sequence[Any], label: str, meta: Any, **spec: Any) -> dd.DataFrame:
    """Make a lazy frame of one partition per item."""
    return dd.from_map(function, items, meta=meta, enforce_metadata=False, label=label, **spec)


def objects_stay() -> Any:
    """Context in which Dask does not make text of the objects in new frames."""
    # For graphs of our own: in users' frames it would bring up a fault of Dask (`df.partitions[0].repartition(1)`).
    return dask.config.set({"dataframe.convert-string": False})


def apply_step(
    frame: Any,
    function: Callable[[Any, Any], Any],
    spec: Any,
    added: pa.Schema,
    needs: Sequence[str] | None = None,
) -> Any:
    """Apply a partition function to a frame of any kind; `added`: columns that it adds or replaces."""
    # With `needs`, the columns that it reads, it is not called at all where none of the added ones is wanted.
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
    backend_of(frame)  # raises for anything that is no frame
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{step} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {remedy} "
            f"(there are: {', '.join(map(str, frame.columns))})"
        )


def refuse_text(frame: Any, column: str) -> None:
    """Raise TypeError, on the client, for text where vectors are expected: Dask makes text of objects."""
    dtype = str(meta_of(frame)[column].dtype)
    if dtype == "str" or dtype.startswith("string"):
        raise TypeError(
            f"column {column!r} holds text, not vectors. Dask makes text of objects: set its configuration "
            "dataframe.convert-string to False before the DataFrame is made, or use a column of Arrow lists"
        )


def host_column(frame: Any, name: str) -> list[Any]:
    """Return the values of a partition's column as Python objects."""
    return list(backend_of(frame).to_host(frame, [name])[name].to_pylist())
