"""Selections on score tables are made on their files, several at once: they keep what pandas keeps of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_imgcurator as dic
from dask_imgcurator.engine.frames import source_of
from dask_imgcurator.schema import arrow_schema

STEPS = (
    "score >= 2",
    "score is null or clip_score < 0.4",
    "status == 'ok'",
    "top 30% by clip_score",
    "top 40% by score",  # of few values: ties
    "bottom 7 by score ties include",
    "top 25% by score among clip_score >= 0.2",
    "sample 20 seed 3",
    "sample 50%",
    "sample 2 by score",
    "sample 3 by shard",
)


def write(folder: Path, rows: list[int], coded: bool = False) -> pd.DataFrame:
    """Write score files of so many rows, and return them as one frame, made by pandas."""
    names = ["key", "shard", "sample_offset", "sample_nbytes", "status", "clip_score"]
    schema = arrow_schema([*names, "score"], {"score": pa.int16()})
    frames = []
    for part, n in enumerate(rows):
        rng = np.random.default_rng([part, n])
        frame = pd.DataFrame(
            {
                "key": [f"{part}-{i}" for i in range(n)],
                "shard": f"/data/{part:03d}.tar",
                "sample_offset": np.arange(n) * 1024,
                "sample_nbytes": 1024,
                "status": np.where(rng.random(n) < 0.1, "decode_error", "ok"),
                "clip_score": np.where(rng.random(n) < 0.1, np.nan, rng.normal(0.3, 0.1, n)).astype("f4"),
                "score": pd.array(rng.integers(0, 5, n), "Int16"),
            }
        )
        table = pa.Table.from_pandas(frame, schema, preserve_index=False)
        if coded and part % 2:  # as pandas writes categories
            at = table.schema.get_field_index("status")
            table = table.set_column(at, "status", table["status"].dictionary_encode())
        pq.write_table(table, folder / f"{part:03d}.parquet")
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert found["key"].tolist() == expected["key"].tolist()
    assert found["sample_offset"].tolist() == expected["sample_offset"].tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=3),
    st.lists(st.sampled_from(STEPS), max_size=2),
    st.booleans(),
)
def test_what_is_kept_is_what_pandas_keeps(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], steps: list[str], then: list[str], coded: bool
) -> None:
    folder = tmp_path_factory.mktemp("scores")
    whole = write(folder, rows, coded)
    df = dic.read_scores(folder, backend="pandas")
    assert source_of(df) is not None  # it is not the slow way that is tested
    kept = dic.apply_steps(df, steps)
    expected = dic.apply_steps(whole, steps)
    same(kept.compute(), expected)
    assert kept[["key"]].compute()["key"].tolist() == expected["key"].tolist()
    same(dic.apply_steps(kept, then, ok_only=False).compute(), dic.apply_steps(expected, then, ok_only=False))
    some = dic.funnel(df, steps)
    pd.testing.assert_frame_equal(some, dic.funnel(whole, steps))
    assert some["left"].iloc[-1] == len(expected)


def test_on_a_cluster_and_as_others_make_frames(client: Client, tmp_path: Path) -> None:
    whole = write(tmp_path, [200, 0, 50, 120])
    for steps in (["top 40% by score", "sample 31"], ["top 30% by clip_score among score >= 2"], ["sample 2 by score"]):
        expected = dic.apply_steps(whole, steps)
        df = dic.read_scores(tmp_path)
        for frame in (df, df.persist(), df[df["score"] >= 0], df[[*df.columns][::-1]]):
            same(dic.apply_steps(frame, steps).compute(), expected)
        same(dic.apply_steps(dic.filter_frame(df, "score >= 1"), steps).compute(), _after(whole, steps))


def _after(whole: pd.DataFrame, steps: list[str]) -> Any:
    return dic.apply_steps(whole[whole["score"] >= 1], steps)


def test_few_rows_are_few_partitions(tmp_path: Path) -> None:
    write(tmp_path, [100] * 12)
    df = dic.read_scores(tmp_path, backend="pandas")
    assert dic.sample(df, 30).npartitions == 1
    assert dic.apply_steps(df, "clip_score >= 0.3").npartitions == 12  # nothing is read to make it
    assert dic.sample(df, 1100, where="clip_score > -1").map_partitions(len).compute().max() <= 100


def test_a_file_that_changes_after_the_selection_is_told(tmp_path: Path) -> None:
    write(tmp_path, [30, 30])
    kept = dic.sample(dic.read_scores(tmp_path, backend="pandas"), 20)
    write(tmp_path, [30, 29])
    with pytest.raises(ValueError, match=r"001.parquet has changed since its rows were selected"):
        kept.compute()
