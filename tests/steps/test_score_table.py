"""Score tables of several files, of any making: no value is lost, whichever file comes first."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_imgcurator as dic
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.json_fields import JsonField
from dask_imgcurator.steps.read import ReadSpec, index_partition
from dask_imgcurator.steps.score_table import write_score_file

duckdb = pytest.importorskip("duckdb")

LISTS = [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2), pa.list_(pa.float64())]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32()]
FLOATS = [pa.float32(), pa.float64()]

#: Types of one column that hold each other's values, and values that all of them can hold.
FAMILIES: dict[str, tuple[list[pa.DataType], st.SearchStrategy[Any]]] = {
    "number": (INTEGERS + FLOATS, st.integers(0, 100)),
    "text": (TEXTS, st.sampled_from(["", "a", "żółć", "1", "NaN"])),
    "list": (LISTS, st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=2)),
    "boolean": ([pa.bool_()], st.booleans()),
    "date": ([pa.date32()], st.dates(datetime.date(1990, 1, 1), datetime.date(2030, 1, 1))),
    "decimal": ([pa.decimal128(5, 2), pa.decimal128(9, 2)], st.decimals(0, 99, places=2)),
}


@st.composite
def tables(draw: st.DrawFn) -> list[pa.Table]:
    """Files of a table: columns come and go, and change their type within a family."""
    families = draw(st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, max_size=4))
    files = []
    for number in range(draw(st.integers(1, 4))):
        n = draw(st.integers(0, 4))
        columns = {"row": pa.array([number * 10 + i for i in range(n)], pa.int64())}
        for i, family in enumerate(families):
            types, values = FAMILIES[family]
            if draw(st.integers(0, 3)):
                column = draw(st.lists(st.none() | values, min_size=n, max_size=n))
                type_ = pa.null() if not any(v is not None for v in column) and draw(st.booleans()) else None
                columns[f"{family}{i}"] = pa.array(column, type_ or draw(st.sampled_from(types)))
        files.append(pa.table(columns))
    return files


def plain(value: Any) -> Any:
    """A value as it can be compared: numbers by value, lists as tuples."""
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(plain(item) for item in value)
    if isinstance(value, float | decimal.Decimal):
        return None if math.isnan(value) else float(value)
    return value


def read(folder: Path) -> list[dict[str, Any]]:
    df = dic.read_scores(folder, backend="pandas")
    frame = df.compute(scheduler="synchronous")
    assert list(frame.columns) == list(df.columns)
    return list(get_backend("pandas").to_arrow(frame).to_pylist())


@settings(max_examples=150, deadline=None)
@given(tables())
def test_no_value_is_lost(files: list[pa.Table]) -> None:
    with tempfile.TemporaryDirectory() as name, duckdb.connect() as db:
        folder = Path(name)
        for i, table in enumerate(files):
            pq.write_table(table, folder / f"{i}.parquet")
        ours = {row["row"]: row for row in read(folder)}
        theirs = db.sql(f"SELECT * FROM read_parquet('{folder}/*.parquet', union_by_name=true)")
        for values in theirs.fetchall():
            expected = {n: plain(v) for n, v in zip(theirs.columns, values, strict=True)}
            assert {n: plain(v) for n, v in ours.pop(expected["row"]).items()} == expected
        assert not ours


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([1]), pa.array(["x"])),
        (pa.array([True]), pa.array([1])),
        (pa.array([[1.0]]), pa.array([1.0])),
        (pa.array([decimal.Decimal("0.1")]), pa.array([0.5])),
        (pa.array(["x"]), pa.array([b"x"])),
    ],
)
def test_types_without_a_common_one_name_both_files(tmp_path: Path, first: pa.Array, second: pa.Array) -> None:
    pq.write_table(pa.table({"x": first}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": second}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"column 'x' is .* in .*a\.parquet and .* in .*b\.parquet"):
        dic.read_scores(tmp_path)


def test_a_number_that_the_wider_type_cannot_hold_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [2**53 + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [0.5]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"column 'x' of .*a\.parquet cannot be read as double"):
        read(tmp_path)


def test_a_tensor_column_is_one_of_lists(tmp_path: Path) -> None:
    values = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), values)
    pq.write_table(pa.table({"embedding": tensors}), tmp_path / "a.parquet")
    assert [row["embedding"] for row in read(tmp_path)] == values.to_pylist()


# --- fields of JSON -------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["", "x", "1", "ż"])
JSON = SCALARS | st.lists(st.integers(0, 3), max_size=2) | st.dictionaries(st.just("k"), st.integers(0, 3), max_size=1)


def shard(path: Path, values: Sequence[Any]) -> str:
    import io
    import tarfile

    with tarfile.open(path, "w") as tar:
        for i, value in enumerate(values):
            for ext, data in (("jpg", b"1"), ("json", json.dumps({"x": value}).encode())):
                info = tarfile.TarInfo(f"{i}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def same(ours: Any, value: Any) -> bool:
    """Whether a column's value is a JSON value, as such or as its text."""
    if isinstance(ours, str):
        return ours == value if isinstance(value, str) else bool(json.loads(ours) == value)
    return bool(ours == value) and (isinstance(ours, bool) == isinstance(value, bool))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(JSON | st.integers(0, 9), max_size=4), min_size=1, max_size=3))
def test_a_json_value_stays_what_it_is(shards: list[list[Any]]) -> None:
    """However types change from sample to sample and from shard to shard."""
    spec = ReadSpec(fields=(JsonField("x", "x"),), notes=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, values in enumerate(shards):
            frame = index_partition([shard(folder / f"{i}.tar", values)], spec)
            about = {"shard": f"{i}", "read": {"fields": {"x": {"field": "x", "type": None}}}}
            write_score_file(frame, f"{folder}/{i}.parquet", about, "pandas", {})
        expected = [value for values in shards for value in values]
        try:
            found = [row["x"] for row in read(folder)]
        except ValueError as err:  # 2**53 + 1 in one shard, and 0.5 in another
            assert "cannot be read as double" in str(err)
            assert any(isinstance(v, int) and abs(v) > 2**53 for v in expected)
            return
    assert all(same(ours, value) for ours, value in zip(found, expected, strict=True))


# --- what we write --------------------------------------------------------------------------------


def test_files_of_no_rows_have_no_row_group_and_vectors_their_encoding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = pa.array(list(rng.normal(size=(2000, 64)).astype(np.float32)), pa.list_(pa.float32()))
    table = pa.table({"key": [str(i) for i in range(2000)], "embedding": vectors})
    backend = get_backend("pandas")
    for name, part in (("a", table), ("b", table.slice(0, 0))):
        write_score_file(backend.from_arrow(part), f"{tmp_path}/{name}.parquet", {}, "pandas", {})
    pq.write_table(table, tmp_path / "plain.arrow", compression="zstd")
    footer = pq.read_metadata(tmp_path / "a.parquet")
    assert pq.read_metadata(tmp_path / "b.parquet").num_row_groups == 0
    assert "BYTE_STREAM_SPLIT" in footer.row_group(0).column(1).encodings
    assert (tmp_path / "a.parquet").stat().st_size < 0.95 * (tmp_path / "plain.arrow").stat().st_size
    with duckdb.connect() as db:
        found = db.sql(f"SELECT key, embedding FROM read_parquet('{tmp_path}/*.parquet')").fetchall()
    assert [(key, np.float32(v).tolist()) for key, v in found] == list(
        zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True)
    )


@pytest.mark.parametrize("form", ["pandas", "dask", "shuffled"])
def test_a_frame_as_a_table(form: str, tmp_path: Path) -> None:
    """Pandas reads it in a process that does not know this library; it names the model of the table it came from."""
    import subprocess
    import sys

    import dask
    import dask.dataframe as dd

    made = {"shard": "a.tar", "encoder": {"model": "ViT-B-32"}, "heads": {}, "selected": {"steps": []}}
    vectors = pa.array([[float(i), 1.0] for i in range(10)], pa.list_(pa.float32()))
    table = pa.table({"key": [f"k{i}" for i in range(10)], "shard": ["a.tar"] * 10, "embedding": vectors})
    backend = get_backend("pandas")
    write_score_file(backend.from_arrow(table), f"{tmp_path}/old.parquet", made, "pandas", {})
    frame = backend.from_arrow(table.append_column("rating", pa.array(range(10))))
    df = frame if form == "pandas" else dd.from_pandas(frame, npartitions=3)
    df = df.shuffle("key") if form == "shuffled" else df
    with dask.config.set(scheduler="synchronous"):
        urls = dic.to_scores(df, tmp_path / "mine", like=tmp_path / "old.parquet")
    assert len(urls) == (1 if form == "pandas" else df.npartitions)
    assert {json.loads(pq.read_schema(url).metadata[b"imgcurator"])["encoder"]["model"] for url in urls} == {"ViT-B-32"}
    code = f"import pandas as pd; f = pd.read_parquet({str(tmp_path / 'mine')!r}); print(sorted(f.key), f.rating.sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{sorted(table['key'].to_pylist())} 45"
    found = {row["key"]: row["embedding"] for row in read(tmp_path / "mine")}
    assert found == dict(zip(table["key"].to_pylist(), vectors.to_pylist(), strict=True))
    with pytest.raises(FileExistsError, match="choose a new folder"):
        dic.to_scores(frame, tmp_path / "mine")
