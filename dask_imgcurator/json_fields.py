"""Fields of the samples' JSON as columns: their names, and types that lose no value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .schema import COLUMNS

#: Arrow types that a user may give to a JSON field.
FIELD_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}

#: float64 holds all integers up to here exactly.
_EXACT = 2**53


@dataclass(frozen=True)
class JsonField:
    """A field of the samples' JSON that becomes a column."""

    column: str
    name: str
    type: str | None = None  # a key of `FIELD_TYPES`; None: decided by each shard's values
    likely: str | None = None  # type for a shard without values, from the first samples
    guessed: bool = False  # from the first samples: a value that does not fit is an error, not null


def parse_columns(columns: Sequence[str] | Mapping[str, str]) -> tuple[JsonField, ...]:
    """Parse the requested fields: ``[COLUMN=]FIELD[:TYPE]`` each, or a mapping of fields to types."""
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string: give a list, columns=[{columns!r}]")
    if isinstance(columns, Mapping):
        if wrong := {n: t for n, t in columns.items() if t not in FIELD_TYPES}:
            raise ValueError(f"unknown types of columns {wrong}: use {', '.join(FIELD_TYPES)}")
        fields = [JsonField(name, name, type_) for name, type_ in columns.items()]
    else:
        fields = [_parse(text) for text in columns]
    names = [field.column for field in fields]
    for name in names:
        if name in COLUMNS:
            raise ValueError(
                f"{name!r} is a column of this library: give the JSON field another name, as in original_{name}={name}"
            )
        if names.count(name) > 1:
            raise ValueError(f"two JSON fields give the column {name!r}: give one another name, as in {name}_2={name}")
    return tuple(fields)


def _parse(text: str) -> JsonField:
    head, _, type_ = text.rpartition(":")
    rest = head if type_ in FIELD_TYPES and head else text
    column, equals, name = rest.partition("=")
    if not rest or (equals and not (column and name)):
        raise ValueError(f"cannot read {text!r} as a column: write FIELD, FIELD:TYPE or COLUMN=FIELD")
    return JsonField(column, name or column, type_ if rest is head else None)


def as_type(value: Any, type_: str) -> Any:
    """Convert a JSON value to a column's type; None if it is of another kind."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if type_ == "string":
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # JSON allows half a surrogate pair ("\\ud800"), UTF-8 does not: it becomes U+FFFD.
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if type_ == "bool":
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if type_ == "int64":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    try:
        return float(value) if float(value) == value else None
    except OverflowError:
        return None


def type_of(values: Sequence[Any]) -> str | None:
    """Type that holds all the given JSON values unchanged; text, as JSON, if no other does; None if all are null."""
    kinds = {_kind(value) for value in values} - {None}
    if kinds == {"int64", "float64"} and all(abs(v) <= _EXACT for v in values if isinstance(v, int)):
        return "float64"
    return next(iter(kinds)) if len(kinds) == 1 else "string" if kinds else None


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    if isinstance(value, float):
        return None if math.isnan(value) else "float64"
    return None if value is None else "string"
