"""One contract suite for every backend, the choice of a backend, and who may import what.

The cuDF half runs where there is a card; its assertions are the same.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
import dask.array
import dask.bag
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dask_imgcurator as dic
from dask_imgcurator.engine.backend import BackendError, backend_of, get_backend, gpu_problem, resolve_name
from dask_imgcurator.engine.cluster import backend_for
from dask_imgcurator.schema import COLUMNS, arrow_schema
from dask_imgcurator.steps.score_table import ScoreFiles, write_score_file

needs_no_gpu = pytest.mark.skipif(gpu_problem() is None, reason="there is a card, and RAPIDS")


@pytest.fixture(params=["pandas", pytest.param("cudf", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Any:
    return get_backend(request.param)


VALUES: dict[pa.DataType, list[Any]] = {
    pa.string(): ["a", None, "ü ☃", ""],
    pa.int64(): [2**53 + 1, None, -(2**63), 0],
    pa.int32(): [2**31 - 1, None, -1, 0],
    pa.float32(): [0.1, None, -1e30, 0.0],
    pa.float64(): [0.1, None, 1e300, 0.0],
    pa.bool_(): [True, None, False, True],
    pa.list_(pa.float32()): [[0.1, -2.0], None, [1e-30, 3.0], [0.0, 0.5]],
}


def whole_table() -> pa.Table:
    """Every column of the table, and one of each type that a user's field can have; null wherever one may be."""
    schema = arrow_schema(
        [*COLUMNS, *(f"my_{i}" for i in range(len(VALUES)))], {f"my_{i}": t for i, t in enumerate(VALUES)}
    )
    columns = []
    for field in schema:
        values = VALUES[field.type]
        columns.append(
            pa.array(values if field.nullable else [values[0] if v is None else v for v in values], field.type)
        )
    return pa.Table.from_arrays(columns, schema=schema)


def matrix(rows: int, width: int, device: str) -> torch.Tensor:
    return torch.arange(rows * width, dtype=torch.float32, device=device).reshape(rows, width) / 7


def host(backend: Any, column: Any) -> list[Any]:
    """Values of a column, by way of Arrow."""
    return list(backend.to_arrow(column.to_frame("x"))["x"].to_pylist())


# --- the contract ---------------------------------------------------------------------------------


def test_arrow_and_back(backend: Any) -> None:
    table = whole_table()
    frame = backend.from_arrow(table)
    assert list(frame.columns) == table.column_names
    assert backend.to_arrow(frame).equals(table)
    assert backend.to_arrow(frame).schema == table.schema
    assert backend.to_host(frame, ["sha256", "offset"]).equals(table.select(["sha256", "offset"]))
    assert backend_of(frame).name == backend.name


def test_arrow_and_back_of_some_rows(backend: Any) -> None:
    table = whole_table()
    frame = backend.from_arrow(pa.concat_tables([table, table.slice(1, 2), table]))
    rows = [9, 0, 5, 1]
    expected = pa.concat_tables([table, table.slice(1, 2), table]).take(rows)
    assert backend.to_arrow(frame.iloc[rows]).equals(expected)
    assert backend.to_arrow(frame.iloc[3:8]).to_pylist() == table.to_pylist()[3:] + table.to_pylist()[1:3] + [
        table.to_pylist()[0],
        table.to_pylist()[1],
    ]
    assert backend.to_arrow(frame[frame["nbytes"] == 0]).num_rows == 2
    empty = backend.from_arrow(table.schema.empty_table())
    assert backend.to_arrow(empty).schema == table.schema
    assert list(empty.dtypes) == list(frame.dtypes)


def test_nulls_do_not_change_the_dtype(backend: Any) -> None:
    """The dtypes are those of the schema, whatever the values: partitions agree with each other and with the meta."""
    table = whole_table()
    nullable = [f.name for f in table.schema if f.nullable]
    none = pa.Table.from_arrays(
        [pa.nulls(4, f.type) if f.name in nullable else table[f.name] for f in table.schema], schema=table.schema
    )
    full = table.take([0, 2, 3])
    dtypes = [list(backend.from_arrow(t).dtypes) for t in (table, none, full, table.slice(0, 0))]
    assert all(d == dtypes[0] for d in dtypes)
    assert backend.to_arrow(backend.from_arrow(none)).equals(none)


def test_numbers_can_be_compared_and_nulls_fail_the_comparison(backend: Any) -> None:
    frame = backend.from_arrow(whole_table())
    kept = frame[(frame["aesthetic_score"] >= 0) & (frame["width"] >= 0)]
    assert backend.to_arrow(kept)["width"].to_pylist() == [2**31 - 1, 0]
    assert len(frame[frame["my_5"]]) == 2


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 3], [4, 0, 2], [3], []], ids=str)
@pytest.mark.parametrize("index", [None, [7, 3, 9, 9, 1]], ids=["plain index", "shuffled index"])
def test_matrix_column_and_back(backend: Any, rows: list[int], index: list[int] | None) -> None:
    frame = backend.from_arrow(pa.table({"n": range(5)}))
    if index is not None:
        frame.index = index
    values = matrix(len(rows), 3, backend.device)
    column = backend.matrix_column(values, np.array(rows, np.int64), frame.index)
    expected: list[Any] = [None] * 5
    for row, value in zip(rows, values.tolist(), strict=True):
        expected[row] = value
    assert host(backend, column) == expected
    frame = frame.assign(embedding=column)  # aligned by the index, or by place where that is the same
    table = backend.to_arrow(frame)
    assert table["embedding"].to_pylist() == expected
    assert table.schema.field("embedding").type == pa.list_(pa.float32())
    assert list(frame.dtypes) == list(backend.from_arrow(table).dtypes)
    found, where = backend.matrix(frame["embedding"])
    assert where.tolist() == sorted(rows)
    assert found.dtype == torch.float32
    assert found.device.type == backend.device
    assert found.tolist() == [expected[i] for i in sorted(rows)]


def test_matrix_of_chosen_rows(backend: Any) -> None:
    """Slices, masks and shuffles of a column give the vectors of these rows."""
    frame = backend.from_arrow(pa.table({"n": range(8)}))
    rows = np.array([0, 2, 3, 5, 6])
    values = matrix(5, 4, backend.device)
    frame = frame.assign(e=backend.matrix_column(values, rows, frame.index))
    vector = dict(zip(rows.tolist(), values.tolist(), strict=True))
    for chosen in ([3, 4, 5, 6], [6, 1, 0, 7, 5], [2, 2], [7, 1]):
        found, where = backend.matrix(frame["e"].iloc[chosen])
        assert where.tolist() == [i for i, row in enumerate(chosen) if row in vector]
        assert found.tolist() == [vector[row] for row in chosen if row in vector]
    found, where = backend.matrix(frame["e"].iloc[3:7])
    assert (where.tolist(), found.tolist()) == ([0, 2, 3], [vector[3], vector[5], vector[6]])
    found, where = backend.matrix(frame[frame["n"] > 4]["e"])
    assert (where.tolist(), found.tolist()) == ([0, 1], [vector[5], vector[6]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_become_float32(backend: Any, dtype: torch.dtype) -> None:
    frame = backend.from_arrow(pa.table({"n": range(2)}))
    values = torch.tensor([[0.5, -2.0], [1.5, 0.25]], dtype=dtype, device=backend.device)
    rows = np.array([0, 1])
    assert host(backend, backend.matrix_column(values, rows, frame.index)) == [[0.5, -2.0], [1.5, 0.25]]
    assert host(backend, backend.float_column(values[:, 1], rows, frame.index)) == [-2.0, 0.25]


def test_a_slice_of_a_matrix(backend: Any) -> None:
    frame = backend.from_arrow(pa.table({"n": range(3)}))
    values = matrix(6, 8, backend.device)[::2, 1::3]
    assert not values.is_contiguous()
    assert host(backend, backend.matrix_column(values, np.arange(3), frame.index)) == values.tolist()


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 2),
        pa.list_(pa.int64()),
    ],
    ids=str,
)
def test_vectors_of_any_origin(backend: Any, type_: pa.DataType) -> None:
    values = [[1, 2], None, [3, 4], [5, 6], None]
    if backend.name == "cudf":  # has lists of one kind
        type_ = pa.list_(type_.value_type)
    chunks = pa.chunked_array([pa.array(values[:2], type_), pa.array([[9, 9], *values[2:]], type_)[1:]])
    frame = backend.from_arrow(pa.table({"e": chunks}))
    found, where = backend.matrix(frame["e"])
    assert (found.tolist(), where.tolist()) == ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [0, 2, 3])
    assert found.dtype == torch.float32
    found, where = backend.matrix(frame["e"].iloc[2:4])
    assert (found.tolist(), where.tolist()) == ([[3.0, 4.0], [5.0, 6.0]], [0, 1])


def test_null_within_a_vector_is_nan(backend: Any) -> None:
    frame = backend.from_arrow(pa.table({"e": pa.array([[1.0, None], [3.0, 4.0], None], pa.list_(pa.float32()))}))
    found, where = backend.matrix(frame["e"])
    np.testing.assert_array_equal(found.cpu().numpy(), [[1.0, np.nan], [3.0, 4.0]])
    assert where.tolist() == [0, 1]


@pytest.mark.parametrize("type_", [pa.list_(pa.float32()), pa.string(), pa.float32()], ids=str)
@pytest.mark.parametrize("rows", [0, 3])
def test_a_column_without_vectors_has_no_matrix(backend: Any, type_: pa.DataType, rows: int) -> None:
    """A partition in which all failed is no error, whatever type its column then has."""
    frame = backend.from_arrow(pa.table({"e": pa.nulls(rows, type_)}))
    found, where = backend.matrix(frame["e"])
    assert (found.shape[0], len(where)) == (0, 0)
    assert found.device.type == backend.device


@pytest.mark.parametrize("values", [[[1.0, 2.0], [3.0]], [[1.0], [], [2.0]], [[1.0, 2.0, 3.0], None, [4.0]]], ids=str)
def test_vectors_of_different_lengths(backend: Any, values: list[Any]) -> None:
    frame = backend.from_arrow(pa.table({"mine": pa.array(values, pa.list_(pa.float32()))}))
    with pytest.raises(ValueError, match="column 'mine' holds vectors of different lengths"):
        backend.matrix(frame["mine"])


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["[1, 2]", None]),
        pa.array([1.0, None]),
        pa.array([1, 2]),
        pa.array([["1", "2"], None]),
        pa.array([[[1.0], [2.0]], None]),
        pa.array([{"x": 1.0}, None]),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_that_are_no_vectors(backend: Any, column: pa.Array) -> None:
    frame = backend.from_arrow(pa.table({"mine": column}))
    with pytest.raises(TypeError, match=r"column 'mine' holds .*, not vectors of numbers"):
        backend.matrix(frame["mine"])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 0], []], ids=str)
def test_float_column(backend: Any, rows: list[int]) -> None:
    frame = backend.from_arrow(pa.table({"n": range(4)}))
    values = torch.tensor([0.5, 1.5, 2.5, 3.5][: len(rows)], device=backend.device)
    column = backend.float_column(values, np.array(rows, np.int64), frame.index)
    expected: list[Any] = [None] * 4
    for i, row in enumerate(rows):
        expected[row] = i + 0.5
    table = backend.to_arrow(frame.assign(aesthetic_score=column))
    assert table["aesthetic_score"].to_pylist() == expected
    assert str(column.dtype) == "float32"


def test_a_score_that_is_not_a_number_is_null(backend: Any) -> None:
    frame = backend.from_arrow(pa.table({"n": range(3)}))
    values = torch.tensor([0.5, float("nan")], device=backend.device)
    column = backend.float_column(values, np.array([2, 1]), frame.index)
    assert host(backend, column) == [None, None, 0.5]


def test_parquet(backend: Any, tmp_path: Path) -> None:
    table = whole_table()
    path = str(tmp_path / "x.parquet")
    about = {"model": "ünï"}
    write_score_file(backend.from_arrow(table), path, about, backend.name, {})
    # as pyarrow sees it
    footer = pq.read_schema(path)
    assert json.loads((footer.metadata or {})[b"imgcurator"]) == about
    assert footer.remove_metadata().equals(table.schema)
    assert pq.read_table(path).replace_schema_metadata(None).equals(table)
    assert footer.field("embedding").type == pa.list_(pa.float32())
    # as this backend reads it
    spec = ScoreFiles(backend.name, table.schema)
    back = spec([path])
    assert list(back.dtypes) == list(backend.from_arrow(table).dtypes)
    assert backend.to_arrow(back).equals(table)
    some = spec([path], ["nsfw_score", "key"])
    assert backend.to_arrow(some).equals(table.select(["nsfw_score", "key"]))
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def test_duckdb_reads_the_parquet(backend: Any, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    table = whole_table()
    path = str(tmp_path / "x.parquet")
    write_score_file(backend.from_arrow(table), path, {}, backend.name, {})
    names = ["key", "offset", "width", "embedding", "aesthetic_score", "my_5"]
    with duckdb.connect() as db:
        # "offset" is a word of SQL
        query = 'SELECT key, "offset", width, embedding, aesthetic_score, my_5 FROM read_parquet(?)'
        rows = db.sql(query, params=[path])
        types, found = [str(t) for t in rows.types], rows.fetchall()
    assert types == ["VARCHAR", "BIGINT", "INTEGER", "FLOAT[]", "FLOAT", "BOOLEAN"]
    assert found == [tuple(row[n] for n in names) for row in table.to_pylist()]


def test_a_failed_write_leaves_nothing(backend: Any, tmp_path: Path) -> None:
    frame = backend.from_arrow(whole_table())
    with pytest.raises(OSError, match="nowhere"):
        write_score_file(frame, str(tmp_path / "nowhere" / "x.parquet"), {}, backend.name, {})
    assert list(tmp_path.iterdir()) == []


# --- pandas alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda v: pd.Series(v, dtype=object),
        lambda v: pd.Series([None if x is None else list(x) for x in v], dtype=object),
        lambda v: pd.Series([np.nan if x is None else tuple(x.tolist()) for x in v], dtype=object),
        lambda v: pd.Series([pd.NA if x is None else x.astype(np.float64) for x in v], dtype=object),
        lambda v: pd.Series([None if x is None else x.astype(np.float16) for x in v], dtype=object),
        lambda v: pd.Series([None if x is None else x[::1].astype(">f4").astype("f4") for x in v], dtype=object),
        lambda v: pd.Series(pd.array(v, dtype=pd.ArrowDtype(pa.list_(pa.float16())))),
        lambda v: pd.Series(pd.array(v, dtype=pd.ArrowDtype(pa.list_view(pa.float32())))),
    ],
    ids=["arrays", "lists", "tuples", "float64", "float16", "swapped", "arrow float16", "list view"],
)
def test_objects_as_vectors(make: Any) -> None:
    backend = get_backend("pandas")
    vectors = [np.array([0.5, -1], np.float32), None, np.array([2, 3], np.float32), None]
    column = make(vectors)
    found, where = backend.matrix(column)
    assert (found.tolist(), where.tolist()) == ([[0.5, -1.0], [2.0, 3.0]], [0, 2])
    found, where = backend.matrix(column.iloc[1:3])
    assert (found.tolist(), where.tolist()) == ([[2.0, 3.0]], [1])


def test_the_tensor_is_a_copy() -> None:
    backend = get_backend("pandas")
    frame = backend.from_arrow(pa.table({"e": pa.array([[1.0, 2.0]], pa.list_(pa.float32()))}))
    values, _ = backend.matrix(frame["e"])
    values.zero_()
    assert host(backend, frame["e"]) == [[1.0, 2.0]]


@pytest.mark.parametrize("values", [["a", [1.0]], [torch.ones(2)], [[1.0], "b"]], ids=str)
def test_objects_that_are_no_vectors(values: list[Any]) -> None:
    with pytest.raises(TypeError, match="column 'mine' cannot be read as vectors of numbers"):
        get_backend("pandas").matrix(pd.Series(values, dtype=object, name="mine"))


def test_frames_as_users_make_them_get_the_types_of_the_table() -> None:
    frame = pd.DataFrame(
        {
            "key": np.array(["a", None], object),
            "offset": [1, 2],
            "width": [3.0, np.nan],
            "embedding": [np.array([1.0, 2.0]), None],
            "aesthetic_score": [1.5, np.nan],
            "status": pd.Categorical(["ok", "ok"]),
        }
    )
    table = get_backend("pandas").to_arrow(frame)
    assert table.schema == arrow_schema(frame.columns)
    assert table.to_pylist() == [
        {"key": "a", "offset": 1, "width": 3, "embedding": [1.0, 2.0], "aesthetic_score": 1.5, "status": "ok"},
        {"key": None, "offset": 2, "width": None, "embedding": None, "aesthetic_score": None, "status": "ok"},
    ]


# --- choosing -------------------------------------------------------------------------------------


def test_names() -> None:
    assert resolve_name("pandas") == "pandas"
    assert get_backend("pandas").name == "pandas"
    for wrong in ("cuda", "", "Pandas"):
        with pytest.raises(ValueError, match=f"unknown backend '{wrong}'"):
            resolve_name(wrong)
    with pytest.raises(ValueError, match="unknown backend 'auto': use pandas or cudf"):
        get_backend("auto")


def test_auto_takes_what_there_is() -> None:
    assert resolve_name("auto") == ("pandas" if gpu_problem() else "cudf")
    assert resolve_name() == resolve_name("auto")


def test_the_configuration_is_the_default_and_no_more() -> None:
    with dask.config.set({"imgcurator.backend": "pandas"}):
        assert resolve_name() == "pandas"
    with dask.config.set({"imgcurator.backend": "polars"}):
        assert resolve_name("pandas") == "pandas"
        with pytest.raises(ValueError, match="unknown backend 'polars'"):
            resolve_name()


@needs_no_gpu
def test_only_auto_falls_back() -> None:
    with pytest.raises(BackendError, match=r"backend 'cudf' cannot be used here: .*backend='pandas'") as caught:
        resolve_name("cudf")
    if find_spec("cudf") is None:
        assert re.search(r'pip install "dask-imgcurator\[cu1[23]\]"', str(caught.value))
    with dask.config.set({"imgcurator.backend": "cudf"}), pytest.raises(BackendError, match="cudf"):
        resolve_name()


@needs_no_gpu
def test_a_graph_of_cudf_frames_is_made_without_a_card(tmp_path: Path) -> None:
    """By a client whose workers have cards, or will: here there are none yet, and then one without a card comes."""
    from distributed import Client, LocalCluster

    from dask_imgcurator.checks.samples import make_sample_shards

    shards = [str(p) for p in make_sample_shards(tmp_path / "shards", count=4, per_shard=2).shards]
    with pytest.raises(BackendError, match="cudf"):
        dic.read_webdataset(shards, backend="cudf")
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        df = dic.read_webdataset(shards, columns=["uid"], backend="cudf")
        df = dic.score_aesthetic(dic.embed(df, model="starter"), "aesthetic-starter")
        df = df[(df.aesthetic_score >= 5.0) & (df["width"] > 9)]
        assert df.npartitions == 2
        assert {"key": "string", "uid": "string", "width": "int32[pyarrow]"}.items() <= dict(
            df.dtypes.astype(str)
        ).items()
        assert backend_for("cudf", cluster.scheduler_address) == "cudf"
        assert backend_for("cudf", cheap=True) == "cudf"
        # Whatever Dask would put between for pandas' sake, such as another kind of text, would meet cuDF's frames.
        assert "ArrowStringConversion" not in [type(node).__name__ for node in df.optimize(fuse=False).expr.walk()]
        cluster.scale(1)
        client.wait_for_workers(1)
        with pytest.raises(BackendError, match=r"cannot be used by the workers: .*no CUDA device"):
            dic.read_webdataset(shards, backend="cudf")


def test_cheap_work_takes_pandas_unless_cudf_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a card."""
    monkeypatch.setattr("dask_imgcurator.engine.backend.gpu_problem", lambda: None)
    assert [backend_for(name, cheap=True) for name in (None, "auto", "pandas", "cudf")] == ["pandas"] * 3 + ["cudf"]
    assert backend_for("auto") == "cudf"
    with dask.config.set({"dataframe.backend": "cudf"}):
        assert backend_for(None, cheap=True) == "cudf"
    with dask.config.set({"imgcurator.backend": "cudf"}):
        assert backend_for(None, cheap=True) == "cudf"


@needs_no_gpu
def test_dasks_own_setting_counts_for_auto() -> None:
    with dask.config.set({"dataframe.backend": "cudf"}):
        with pytest.raises(BackendError, match="cudf"):
            resolve_name("auto")
        with pytest.raises(BackendError, match="cudf"):
            resolve_name()
        assert resolve_name("pandas") == "pandas"


@pytest.mark.gpu
def test_dasks_own_setting_counts_for_auto_on_a_card() -> None:
    with dask.config.set({"dataframe.backend": "cudf"}):
        assert resolve_name("auto") == "cudf"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_the_install_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card is visible, RAPIDS is missing: the hint says what to install, and falling back is not silent."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    gpu_problem.cache_clear()
    try:
        with pytest.raises(BackendError, match=r'cudf is not installed: pip install "dask-imgcurator\[cu13\]"'):
            resolve_name("cudf")
        with pytest.warns(UserWarning, match=r"using the CPU: a CUDA card is visible, but cudf is not installed"):
            assert resolve_name("auto") == "pandas"
    finally:
        gpu_problem.cache_clear()


# --- dispatch -------------------------------------------------------------------------------------


class Annotated(pd.DataFrame):
    """A subclass, as other libraries have."""


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": [1]}),
        pd.Series([1]),
        Annotated({"a": [1]}),
        dd.from_dict({"a": [1, 2]}, npartitions=2),
        dd.from_dict({"a": [1, 2]}, npartitions=2)["a"],
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_pandas_frames(frame: Any) -> None:
    assert backend_of(frame).name == "pandas"


@pytest.mark.parametrize(
    "thing",
    [
        {"a": [1]},
        [1],
        None,
        np.zeros(3),
        pa.table({"a": [1]}),
        pd.Timestamp(0),
        dask.array.zeros(3),
        dask.bag.from_sequence([1]),
        dask.delayed(1),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_is_no_frame(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a Dask, pandas or cuDF frame, got \w+"):
        backend_of(thing)


@pytest.mark.gpu
def test_cudf_frames() -> None:
    import cudf

    frame = cudf.DataFrame({"a": [1, 2]})
    assert backend_of(frame).name == "cudf"
    assert backend_of(frame["a"]).name == "cudf"
    assert backend_of(dd.from_map(lambda _: frame, [0], meta=frame.iloc[:0])).name == "cudf"
