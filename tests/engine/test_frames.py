"""Frames as users have them, by Dask's own methods: against DuckDB on the same files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pytest

import dask_imgcurator as dic
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.schema import arrow_schema
from dask_imgcurator.steps.score_table import write_score_file

N = 40
EXTRA = {"likes": pa.int64(), "sure": pa.bool_()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score files of three shards: the first whole, the second with failed images, the third one not a tar."""
    made = tmp_path_factory.mktemp("frames")
    sizes = {"a": [100 + i for i in range(N)], "b": [None if i % 4 == 1 else 300 + i for i in range(N)]}
    for number, name in enumerate(sizes):
        rows = [
            {
                "key": f"{name}{i:02d}",
                "shard": f"/x/{name}.tar",
                "offset": 1024 * i,
                "nbytes": 7 * i,
                "sample_offset": 1024 * i,
                "sample_nbytes": 1024,
                "ext": "jpg",
                "status": "ok" if size else "gone",
                "width": size,
                "height": size and 50 + i,
                "likes": size and i,
                "sure": size and i % 3 == 0,
                "embedding": size and [float(i), 1.0],
                "aesthetic_score": size and i / 4,
            }
            for i, size in enumerate(sizes[name])
        ]
        table = pa.Table.from_pylist(rows, arrow_schema(rows[0], EXTRA))
        write_score_file(get_backend("pandas").from_arrow(table), f"{made}/{number}.parquet", {}, "pandas", {})
    (made / "c.tar").write_bytes(b"<html>" * 200)
    damaged = dic.read_webdataset(str(made / "c.tar"), backend="pandas").compute()
    write_score_file(damaged, f"{made}/2.parquet", {}, "pandas", {})
    return made


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    with dic.start_client(n_workers=2, backend="pandas") as client:
        yield client


@pytest.fixture(params=["read_scores", "persisted", "read_parquet", "from pandas"])
def df(request: pytest.FixtureRequest, folder: Path, workers: Any) -> Any:
    if request.param == "read_parquet":  # a file without the column has no part in this
        return dd.read_parquet([f"{folder}/0.parquet", f"{folder}/1.parquet"])
    if request.param == "from pandas":
        return dd.from_pandas(dic.read_scores(folder).compute(), npartitions=3)
    df = dic.read_scores(folder, backend="pandas")
    return df.persist() if request.param == "persisted" else df


@pytest.fixture
def of_table(folder: Path) -> Any:
    duckdb = pytest.importorskip("duckdb")

    def ask(what: str, rows: str = "true") -> Any:
        source = f"read_parquet('{folder}/*.parquet', union_by_name=true)"
        return duckdb.sql(f"SELECT {what} FROM {source} WHERE {rows}").fetchall()

    return ask


@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")  # of pandas, by a newer pyarrow
def test_summaries_of_a_column_with_nulls(df: Any, of_table: Any) -> None:
    ((count, least, most, mean, std, total),) = of_table(
        "count(width), min(width), max(width), avg(width), stddev(width), sum(width)"
    )
    about = df.describe().compute()["width"]
    assert [about[name] for name in ("count", "min", "max")] == [count, least, most]
    assert about["mean"] == pytest.approx(mean)
    assert about["std"] == pytest.approx(std)
    assert df["width"].sum().compute() == total
    # Dask's is that of its partitions, merged.
    ((low, high),) = of_table("quantile_disc(width, 0.2), quantile_disc(width, 0.8)")
    assert df["width"].quantile([0.0, 1.0]).compute().tolist() == [least, most]
    assert low <= float(df["width"].quantile(0.5).compute()) <= high
    assert "likes" in df.describe().compute().columns


def test_rows_by_their_key(df: Any, of_table: Any) -> None:
    """Also where a shard could not be read, and its row has no key of its own."""
    indexed = df.set_index("key")
    found = indexed.compute()["width"]
    expected = dict(of_table("key, width"))
    assert {key: None if pd.isna(v) else int(v) for key, v in found.items() if key} == {
        key: v for key, v in expected.items() if key
    }
    assert int(indexed.loc["b02", "width"].compute().iloc[0]) == 302


def test_a_column_that_is_called_like_an_attribute(df: Any, of_table: Any) -> None:
    assert df["nbytes"].sum().compute() == of_table("sum(nbytes)")[0][0]


def test_frames_of_two_origins_go_together(df: Any, folder: Path, workers: Any) -> None:
    theirs = dd.read_parquet([f"{folder}/0.parquet", f"{folder}/1.parquet"])
    both = df.merge(theirs[["key", "width", "embedding"]], on="key", suffixes=("", "_r")).compute()
    assert len(both) == 2 * N
    assert ((both["width"] == both["width_r"]) | both["width"].isna()).all()
    assert [list(v) for v in both["embedding"].dropna()] == [list(v) for v in both["embedding_r"].dropna()]
    assert len(dd.concat([df[["key", "width"]], theirs[["key", "width"]]]).compute()) == len(df) + 2 * N


def test_vectors_have_one_dtype(folder: Path) -> None:
    """Whatever the names that files and libraries give to the items of a list."""
    item, element = (pa.list_(pa.field(name, pa.float32())) for name in ("item", "element"))
    dtypes = [
        str(get_backend("pandas").from_arrow(pa.table({"embedding": pa.array([[1.0]], type_)})).dtypes["embedding"])
        for type_ in (item, element)
    ]
    read = dic.read_scores(folder, backend="pandas")
    made = dic.embed(dic.read_webdataset(str(folder / "c.tar"), backend="pandas"), model="starter")
    dtypes += [str(read.dtypes["embedding"]), str(made.dtypes["embedding"]), str(made.compute().dtypes["embedding"])]
    assert set(dtypes) == {"list<item: float>[pyarrow]"}
    assert str(read.compute().dtypes["embedding"]) == dtypes[0]
