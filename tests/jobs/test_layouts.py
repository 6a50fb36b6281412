"""Score tables as other tools write them: every command works on every layout of text, numbers and vectors."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_imgcurator as dic

Change = Callable[[pa.Table, int], pa.Table]


def table(number: int) -> pa.Table:
    """Six rows, no two alike: two are cc0, and three have a rating above 1."""
    vectors = np.random.default_rng(number).normal(size=(6, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return pa.table(
        {
            "key": [f"{number}-{i}" for i in range(6)],
            "shard": [f"/data/{number}.tar"] * 6,
            "sample_offset": pa.array(range(0, 6 * 2048, 2048), pa.int64()),
            "sample_nbytes": pa.array([2048] * 6, pa.int64()),
            "status": ["ok"] * 6,
            "license": ["cc0", "by", None] * 2,
            "rating": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
            "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
        }
    )


def put(of: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return of.set_column(of.schema.get_field_index(name), name, values)


def vectors(of: pa.Table, type_: pa.DataType) -> pa.Table:
    return put(of, "embedding", pa.array(of["embedding"].to_pylist(), type_))


def tensors(of: pa.Table, _: int) -> pa.Table:
    storage = pa.array(of["embedding"].to_pylist(), pa.list_(pa.float32(), 8))
    return put(of, "embedding", pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [8]), storage))


LAYOUTS: dict[str, Change] = {
    "categories": lambda t, _: put(t, "license", t["license"].dictionary_encode()),
    "categories in one file": lambda t, n: put(t, "license", t["license"].dictionary_encode()) if n else t,
    "status as categories": lambda t, _: put(t, "status", t["status"].dictionary_encode()),
    "views": lambda t, _: put(t, "license", t["license"].cast(pa.string_view())),
    "decimals": lambda t, _: put(t, "rating", pa.array([decimal.Decimal(i) / 2 for i in range(6)])),
    "halves": lambda t, n: put(t, "rating", t["rating"].cast(pa.float16())) if n else t,
    "tensors": tensors,
    "fixed lists": lambda t, _: vectors(t, pa.list_(pa.float32(), 8)),
    "large lists": lambda t, _: vectors(t, pa.large_list(pa.float64())),
    "lists of several kinds": lambda t, n: vectors(t, [pa.large_list(pa.float32()), pa.list_(pa.float32(), 8)][n]),
    "a column of the second file": lambda t, n: t.append_column("extra", pa.array([1.5] * 6)) if n else t,
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_every_command_takes_it(change: Change, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    scores.mkdir()
    for number in range(2):
        pq.write_table(change(table(number), number), scores / f"{number}.parquet")
    assert dic.select_rows(scores, tmp_path / "cc0", "license == 'cc0'").kept == 4
    assert dic.select_rows(scores, tmp_path / "best", "rating > 1").kept == 6
    assert dic.select_rows(scores, tmp_path / "top", "top 25% by rating").kept == 3
    assert dic.select_rows(scores, tmp_path / "drawn", "sample 1 by license").kept == 2
    assert dic.drop_duplicates(scores, tmp_path / "unique", tiers=["semantic"]).kept == 12
    assert Path(dic.write_report(scores, tmp_path / "look.html", "rating > 1")).exists()
    assert dic.export_scores(scores, tmp_path / "keys.txt", "list").rows == 12
    assert dic.export_scores(scores, tmp_path / "index", "clip-retrieval").rows == 12
    (found,) = dic.search(scores, embedding=table(1)["embedding"][3].as_py(), k=1)["key"]
    assert found == "1-3"


def test_no_column_of_any_file_is_lost(tmp_path: Path) -> None:
    """Whichever file is first, and through a selection."""
    for number in range(2):
        (tmp_path / "scores").mkdir(exist_ok=True)
        of = table(number).append_column(f"extra{number}", pa.array([number + 0.5] * 6))
        pq.write_table(of, tmp_path / "scores" / f"{number}.parquet")
    dic.select_rows(tmp_path / "scores", tmp_path / "out", ["extra1 > 1 or extra0 > 0", "top 8 by rating"])
    left = dic.read_scores(tmp_path / "out", backend="pandas").compute()
    assert len(left) == 8
    for number in range(2):
        own = left["shard"] == f"/data/{number}.tar"
        assert (left.loc[own, f"extra{number}"] == number + 0.5).all()
        assert left.loc[~own, f"extra{number}"].isna().all()
