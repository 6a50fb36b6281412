"""The columns that this library reads and makes: one table, from which every ``meta``, file schema and page is made.

Image bytes are never a column. A row says where its image lies (`shard`, `offset`, `nbytes`), and the
step that needs the pixels reads them from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

Step = Literal["read", "embed", "measure", "aesthetic", "nsfw", "text"]
Kind = Literal["number", "string", "boolean", "list", "other"]


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
            "webdataset `__key__`; null in the row that reports an unreadable shard",
        ),
        Column("shard", pa.string(), "read", False, "URL of the tar"),
        Column("offset", pa.int64(), "read", False, "where the image member's data begin in the tar, bytes"),
        Column(
            "nbytes",
            pa.int64(),
            "read",
            False,
            "length of the image member's data, bytes; 0 where there is no image",
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
        Column("sha256", pa.string(), "embed", True, "of the image member's bytes, hexadecimal"),
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
        Column("contrast", pa.float32(), "measure", True, "percentile 99 less percentile 1 of the gray value, 0 to 1"),
        Column("blur", pa.float32(), "measure", True, "0 (sharp) to 1 (blurred)", lower_is_better=True),
        Column("entropy", pa.float32(), "measure", True, "of the gray values, 0 (flat) to 8 bits"),
        Column("colourfulness", pa.float32(), "measure", True, "0 (gray), 15 (slight), 59 (quite) to 109 (extreme)"),
        Column("phash", pa.string(), "measure", True, "perceptual hash, 64 bits, hexadecimal"),
    )
}

#: Columns of technical quality that are numbers.
MEASURES = tuple(c.name for c in COLUMNS.values() if c.step == "measure" and c.type == pa.float32())

#: Every value of the `status` column.
STATUSES: Mapping[str, str] = {
    "ok": "decoded and embedded (or, before `embed`, readable so far as the tar shows)",
    "decode_error": "the image's bytes are damaged or of a kind that nothing here decodes",
    "too_large": "more pixels than `imgcurator.max-pixels` allows",
    "no_image": "the sample has no member with an image extension",
    "read_error": "the tar ends early, is damaged or cannot be opened here",
}


def columns_of(*steps: Step) -> list[Column]:
    """Columns that the given steps add, in table order."""
    return [c for c in COLUMNS.values() if c.step in steps]


def kind_of(type_: pa.DataType) -> Kind:
    """Return how an Arrow type behaves in an expression; of dictionary-encoded values, as those do."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_boolean(type_):
        return "boolean"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "number"
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return "string"
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return "list"
    return "other"


def kinds_of_schema(schema: pa.Schema) -> dict[str, str]:
    """Kind of each column of a table, as `parse_where` wants it; a column of nulls may be of any."""
    return {field.name: "unknown" if pa.types.is_null(field.type) else kind_of(field.type) for field in schema}


def is_ours(name: str, type_: pa.DataType) -> bool:
    """Whether a column is this library's: a user's column of the same name may be of another kind."""
    return name in COLUMNS and (pa.types.is_null(type_) or kind_of(type_) == kind_of(COLUMNS[name].type))


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
    """Names of wanted columns that a table lacks; ValueError if one is there but of another kind."""
    # So that only their steps run. A column's presence does not tell how it was made: the table's provenance does.
    missing = []
    for field in wanted:
        if field.name not in schema.names:
            missing.append(field.name)
        elif kind_of(schema.field(field.name).type) != kind_of(field.type):
            raise ValueError(
                f"the table has a column {field.name!r} of type {schema.field(field.name).type}, "
                f"expected {field.type}: rename one of the two"
            )
    return missing
