"""The columns that this library reads and makes: one table, from which every ``meta``, file schema and page follows.

Image bytes are never a column. A row says where its image is (`shard`, `offset`, `nbytes`), and steps that need pixels
read them from there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

#: Key of this library's entry in a Parquet file's metadata: the provenance of its rows.
METADATA_KEY = "imgcurator"

Step = Literal["read", "embed", "measure", "aesthetic", "nsfw", "text", "note", "write"]
Kind = Literal["number", "string", "boolean", "list", "other", "unknown"]


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    name: str
    type: pa.DataType
    step: Step
    nullable: bool
    meaning: str
    lower_is_better: bool = False
    scale: Literal["linear", "log", "probability"] = "linear"


COLUMNS: Mapping[str, Column] = {
    c.name: c
    for c in (
        Column(
            "key",
            pa.string(),
            "read",
            True,
            "webdataset `__key__`; empty in the row that reports an unreadable shard",
        ),
        Column("shard", pa.string(), "read", False, "URL of the tar"),
        Column("offset", pa.int64(), "read", False, "where the image member's data begin in the tar, bytes"),
        Column(
            "nbytes",
            pa.int64(),
            "read",
            False,
            "length of the image member's data, bytes; 0 without an image",
            scale="log",
        ),
        Column(
            "sample_offset",
            pa.int64(),
            "read",
            False,
            "where the sample's first header begins in the tar, bytes",
        ),
        Column(
            "sample_nbytes",
            pa.int64(),
            "read",
            False,
            "extent of all members of the sample, headers and padding included",
        ),
        Column("ext", pa.string(), "read", True, "image member's extension, lower case, without the leading dot"),
        Column("caption", pa.string(), "read", True, "the `.txt` member, or the JSON field that `caption=` names"),
        Column("status", pa.string(), "read", False, "`ok`, or why there is no embedding (see the statuses)"),
        Column("error_message", pa.string(), "read", True, "null when `status` is `ok`"),
        Column("width", pa.int32(), "embed", True, "pixels, as decoded (EXIF orientation not applied)", scale="log"),
        Column("height", pa.int32(), "embed", True, "pixels, as decoded (EXIF orientation not applied)", scale="log"),
        Column("sha256", pa.string(), "embed", True, "hash of the image member's bytes, hexadecimal"),
        Column("embedding", pa.list_(pa.float32()), "embed", True, "L2-normalised image embedding"),
        Column("aesthetic_score", pa.float32(), "aesthetic", True, "aesthetic score, about 1 (poor) to 10 (good)"),
        Column(
            "nsfw_score",
            pa.float32(),
            "nsfw",
            True,
            "probability, 0 (safe) to 1 (not safe for work)",
            lower_is_better=True,
            scale="probability",
        ),
        Column("clip_score", pa.float32(), "text", True, "cosine of the caption's and the image's embeddings"),
        # A measure has a function of its name in images/quality.py.
        Column("brightness", pa.float32(), "measure", True, "mean gray value, 0 (black) to 1 (white)"),
        Column("contrast", pa.float32(), "measure", True, "percentile 99 minus percentile 1 of the gray value, 0 to 1"),
        Column("blur", pa.float32(), "measure", True, "0 (sharp) to 1 (blurred)", lower_is_better=True),
        Column("entropy", pa.float32(), "measure", True, "entropy of the gray values, 0 (flat) to 8 bits"),
        Column("colourfulness", pa.float32(), "measure", True, "0 (gray), 15 (slight), 59 (quite) to 109 (extreme)"),
        Column("phash", pa.string(), "measure", True, "perceptual hash, 64 bits, hexadecimal"),
        Column("note", pa.string(), "note", True, "what was not used as is (`a kind: details; another kind`)"),
        # In the table beside a curated tar, whose columns above say where a sample is in that tar.
        Column("source_shard", pa.string(), "write", True, "URL of the tar from which the sample was copied"),
        Column("source_sample_offset", pa.int64(), "write", True, "`sample_offset` there"),
        Column("source_sample_nbytes", pa.int64(), "write", True, "`sample_nbytes` there"),
    )
}

#: Columns of technical quality that are numbers.
MEASURES = tuple(c.name for c in COLUMNS.values() if c.step == "measure" and c.type == pa.float32())

#: Every value of the `status` column.
STATUSES: Mapping[str, str] = {
    "ok": "decoded and embedded (before `embed`: readable as far as the tar shows)",
    "decode_error": "damaged image data or an unsupported format",
    "too_large": "more pixels than `imgcurator.max-pixels`",
    "no_image": "no member of the sample has an image extension",
    "read_error": "the tar is cut off, damaged or cannot be read",
}


#: Which command adds a column that a table may lack.
MAKERS: Mapping[str, str] = {
    "clip_score": "`dask-imgcurator add --clip-score` makes it",
    "aesthetic_score": "`dask-imgcurator add --aesthetic-head NAME` makes it",
    "nsfw_score": "`dask-imgcurator add --nsfw-head NAME` makes it",
    "caption_words": "`dask-imgcurator add --caption-stats` makes it",
    "caption_chars": "`dask-imgcurator add --caption-stats` makes it",
    "caption_language": "`dask-imgcurator add --language` makes it",
    "cluster": "`dask-imgcurator add --clusters K` makes it",
    **{
        c.name: "`dask-imgcurator score` makes it, except with --no-measures"
        for c in COLUMNS.values()
        if c.step == "measure"
    },
}


def suggest(name: str, columns: Iterable[str]) -> str:
    """A hint for a missing column: what adds it, or which one was meant; empty if neither is known."""
    if name in MAKERS:
        return f"; {MAKERS[name]}"
    lower = {str(column).lower(): str(column) for column in columns}
    close = difflib.get_close_matches(name.lower(), list(lower), n=2)
    return "; did you mean " + " or ".join(repr(lower[found]) for found in close) + "?" if close else ""


def columns_of(*steps: Step) -> list[Column]:
    """Columns that the given steps add, in table order."""
    return [c for c in COLUMNS.values() if c.step in steps]


def plain_type(type_: pa.DataType) -> pa.DataType:
    """Type as which a column is read: one layout for text and lists, whichever tool wrote them."""
    if isinstance(type_, pa.BaseExtensionType):  # a tensor of fixed shape, say
        return plain_type(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_):
        return pa.binary()
    return pa.list_(plain_type(type_.value_type)) if is_list(type_) else type_


def is_list(type_: pa.DataType) -> bool:
    """Whether a type is a list, in any layout."""
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{kind}")(type_) for kind in kinds)


def kind_of(type_: pa.DataType) -> Kind:
    """Return how an Arrow type behaves in an expression."""
    type_ = plain_type(type_)
    if pa.types.is_boolean(type_):
        return "boolean"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "number"
    if pa.types.is_string(type_):
        return "string"
    if pa.types.is_list(type_):
        return "list"
    return "unknown" if pa.types.is_null(type_) else "other"


def kinds_of_schema(schema: pa.Schema) -> dict[str, str]:
    """Kind of each column of a table, for `parse_where`; a column of nulls may be of any kind."""
    return {field.name: kind_of(field.type) for field in schema}


# --- tables of several files ----------------------------------------------------------------------


def unify_schemas(schemas: Iterable[tuple[str, pa.Schema]], loose: Container[str] = ()) -> pa.Schema:
    """Schema that holds the columns of several files (names, schemas) without losing a value.

    A column without a common type becomes text if it is `loose` (a JSON field); otherwise ValueError names the files.
    """
    found: dict[str, tuple[pa.Field, str]] = {}
    distinct: dict[pa.Schema, str] = {}
    for file, schema in schemas:
        distinct.setdefault(schema.remove_metadata(), file)
    for schema, file in distinct.items():
        for field in schema:
            old, before = found.get(field.name, (field.with_type(plain_type(field.type)), file))
            type_ = _wider(old.type, plain_type(field.type))
            if type_ is None and field.name in loose:
                type_ = pa.string()
            if type_ is None:
                raise ValueError(
                    f"column {field.name!r} is {old.type} in {before} and {plain_type(field.type)} in {file}: "
                    "convert one of the two, or give the files one by one"
                )
            nullable = old.nullable or field.nullable
            found[field.name] = pa.field(field.name, type_, nullable), before if type_ == old.type else file
    everywhere = set.intersection(*(set(schema.names) for schema in distinct)) if distinct else set()
    return pa.schema([f if f.name in everywhere else f.with_nullable(True) for f, _ in found.values()])


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of both; None if there is none."""
    if a == b:
        return a
    kinds = {kind_of(a), kind_of(b)} - {"unknown"}
    if len(kinds) > 1 or ((pa.types.is_decimal(a) or pa.types.is_decimal(b)) and (_floats(a) or _floats(b))):
        return None
    if (_floats(a) and pa.types.is_integer(b)) or (_floats(b) and pa.types.is_integer(a)):
        return pa.float64()  # Arrow would make float32 of int64 with float32
    try:
        both = [pa.schema([("", type_)]) for type_ in (a, b)]
        return plain_type(pa.unify_schemas(both, promote_options="permissive").field(0).type)
    except pa.ArrowException:
        return None


def _floats(type_: pa.DataType) -> bool:
    return bool(pa.types.is_floating(type_))


def conform(table: pa.Table, schema: pa.Schema, file: str) -> pa.Table:
    """Convert a file's columns to a table's schema: missing ones are null; ValueError if a value would change."""
    # The metadata stays.
    if table.schema.equals(schema):
        return table
    columns, there = [], set(table.column_names)
    for field in schema:
        if field.name not in there:
            columns.append(pa.nulls(len(table), field.type))
            continue
        try:
            columns.append(_as_type(table[field.name], field.type))
        except pa.ArrowException as err:
            raise ValueError(
                f"column {field.name!r} of {file} cannot be read as {field.type}, as other files have it: {err}"
            ) from err
    return pa.Table.from_arrays(columns, schema=schema.with_metadata(table.schema.metadata))


def _as_type(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_floating(column.type) and pa.types.is_string(type_):  # as JSON writes numbers: Arrow's 1.0 is "1"
        texts = [None if value is None else json.dumps(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, type_)])
    return column.cast(type_)


def is_ours(name: str, type_: pa.DataType) -> bool:
    """Whether a column is this library's; a user's column of the same name may be of another kind."""
    return name in COLUMNS and kind_of(type_) in ("unknown", kind_of(COLUMNS[name].type))


def arrow_schema(names: Iterable[str], extra: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """Arrow schema of the named columns, in order; `extra`: types of columns outside the table (JSON fields, say)."""
    extra = extra or {}
    fields = []
    for name in names:
        if name in COLUMNS:
            column = COLUMNS[name]
            fields.append(pa.field(name, column.type, nullable=column.nullable))
        else:
            fields.append(pa.field(name, extra[name]))
    return pa.schema(fields)


def missing_columns(schema: pa.Schema, wanted: pa.Schema) -> list[str]:
    """Names of wanted columns that a table lacks; ValueError if one exists with another kind."""
    # Only the steps of missing columns run. A column's presence does not say how it was made; the provenance does.
    missing = []
    for field in wanted:
        if field.name not in schema.names:
            missing.append(field.name)
        elif kind_of(schema.field(field.name).type) not in ("unknown", kind_of(field.type)):
            raise ValueError(
                f"the table has a column {field.name!r} of type {schema.field(field.name).type}, "
                f"expected {field.type}: rename one of the two"
            )
    return missing
