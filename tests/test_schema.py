"""The column table, against DESIGN.md's contract."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from dask_imgcurator.schema import COLUMNS, STATUSES, arrow_schema, columns_of, kind_of

#: Section 2.2 of the design: these names and types are promised.
CONTRACT = {
    "key": pa.string(),
    "shard": pa.string(),
    "offset": pa.int64(),
    "nbytes": pa.int64(),
    "sample_offset": pa.int64(),
    "sample_nbytes": pa.int64(),
    "ext": pa.string(),
    "caption": pa.string(),
    "status": pa.string(),
    "error_message": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "sha256": pa.string(),
    "embedding": pa.list_(pa.float32()),
    "aesthetic_score": pa.float32(),
    "nsfw_score": pa.float32(),
    "clip_score": pa.float32(),
}


def test_columns_of_the_contract_in_its_order() -> None:
    ours = {name: column.type for name, column in COLUMNS.items() if column.step not in ("measure", "note", "write")}
    assert ours == CONTRACT
    assert list(COLUMNS)[: len(CONTRACT)] == list(CONTRACT)
    assert all(name == column.name for name, column in COLUMNS.items())


def test_the_design_says_the_same(shared: Path) -> None:
    rows = re.findall(r"^\| (`.+?) \| ([^|]+) \|", (shared / "DESIGN.md").read_text(), re.MULTILINE)
    written = {name: dtype.replace("\\", "") for names, dtype in rows for name in re.findall(r"`(\w+)`", names)}
    ours = {name: str(COLUMNS[name].type).replace("list<item: float>", "list<float32>") for name in CONTRACT}
    assert written == {name: {"float": "float32"}.get(dtype, dtype) for name, dtype in ours.items()}


def test_nothing_that_failed_must_have_a_value() -> None:
    """A row of an image that failed has a shard, numbers and a status, and else nothing."""
    assert {name for name, column in COLUMNS.items() if not column.nullable} == {
        "shard",
        "offset",
        "nbytes",
        "sample_offset",
        "sample_nbytes",
        "status",
    }


def test_each_column_belongs_to_a_step_and_says_what_it_is() -> None:
    steps = ("read", "embed", "aesthetic", "nsfw", "text", "measure", "note", "write")
    assert [c.name for step in steps for c in columns_of(step)] == list(COLUMNS)
    assert columns_of("nsfw", "read") == [*columns_of("read"), *columns_of("nsfw")]
    assert all(column.meaning and "\n" not in column.meaning for column in COLUMNS.values())
    assert {"ok", "decode_error", "too_large", "no_image", "read_error"} == set(STATUSES)


def test_arrow_schema() -> None:
    schema = arrow_schema(["url", "key", "embedding", "status"], {"url": pa.string()})
    assert schema.equals(
        pa.schema(
            [
                pa.field("url", pa.string()),
                pa.field("key", pa.string()),
                pa.field("embedding", pa.list_(pa.float32())),
                pa.field("status", pa.string(), nullable=False),
            ]
        )
    )
    with pytest.raises(KeyError, match="licence"):
        arrow_schema(["key", "licence"], {"url": pa.string()})


@pytest.mark.parametrize(
    ("types", "kind"),
    [
        ([pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(9, 2)], "number"),
        ([pa.string(), pa.large_string(), pa.string_view()], "string"),
        ([pa.bool_()], "boolean"),
        ([pa.list_(pa.int8()), pa.large_list(pa.string()), pa.list_(pa.float32(), 3)], "list"),
        ([pa.binary(), pa.timestamp("s"), pa.date32(), pa.struct([])], "other"),
        ([pa.null()], "unknown"),
    ],
)
def test_kinds(types: list[pa.DataType], kind: str) -> None:
    assert [kind_of(type_) for type_ in types] == [kind] * len(types)
