"""Clusters as columns: those that scikit-learn finds where they are plain, and counts that numpy makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from distributed import Client

import dask_imgcurator as dic
from dask_imgcurator.cli.main import cli
from dask_imgcurator.schema import arrow_schema

pytest.importorskip("faiss")

K, WIDTH, ROWS = 6, 16, 300


def vectors(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of any length around K directions, and which: (n, d) float32, (n,)."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0][:K]
    which = rng.integers(0, K, n)
    points = centres[which] + rng.normal(0, 0.05, (n, WIDTH))
    return (points * rng.uniform(0.5, 3, (n, 1))).astype("f4"), which


def table(folder: Path, n: int = ROWS, seed: int = 0, width: int = WIDTH) -> tuple[pd.DataFrame, np.ndarray]:
    """Write score files, and return their rows as one frame, and the direction of each (-1: no vector)."""
    values, which = vectors(n, seed)
    names = ["key", "shard", "sample_offset", "status", "embedding"]
    missing = np.arange(n) % 29 == 0
    frame = pd.DataFrame(
        {
            "key": [f"k{i:04d}" for i in range(n)],
            "shard": [f"/data/{i // 70:02d}.tar" for i in range(n)],
            "sample_offset": np.arange(n) * 512,
            "status": np.where(missing, "decode_error", "ok"),
            "embedding": [None if gone else row[:width] for row, gone in zip(values, missing, strict=True)],
        }
    )
    folder.mkdir(exist_ok=True)
    for part, rows in frame.groupby("shard"):
        whole = pa.Table.from_pandas(rows, arrow_schema(names), preserve_index=False)
        pq.write_table(whole, folder / f"{Path(str(part)).stem}.parquet")
    return frame, np.where(missing, -1, which)


def same_groups(found: pd.Series, planted: np.ndarray) -> dict[int, int]:
    """Check that clusters are the planted ones under other numbers; returns which is which."""
    assert found.isna().tolist() == (planted < 0).tolist()
    there = planted >= 0
    pairs = set(zip(planted[there].tolist(), found[there].astype(int).tolist(), strict=True))
    assert len(pairs) == K == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    return dict(pairs)


@pytest.mark.parametrize("kind", ["read_scores", "dd.read_parquet", "from_pandas", "pandas", "persisted"])
def test_planted_clusters_are_found_in_frames_of_any_kind(kind: str, tmp_path: Path, client: Client) -> None:
    from sklearn.cluster import KMeans

    frame, planted = table(tmp_path / "scores")
    made: dict[str, Any] = {
        "read_scores": lambda: dic.read_scores(tmp_path / "scores"),
        "dd.read_parquet": lambda: dd.read_parquet(tmp_path / "scores"),
        "from_pandas": lambda: dd.from_pandas(dic.read_scores(tmp_path / "scores").compute(), npartitions=3),
        "pandas": lambda: dic.read_scores(tmp_path / "scores").compute(),
        "persisted": lambda: dic.read_scores(tmp_path / "scores").persist(),
    }
    df = dic.assign_clusters(made[kind](), K, seed=1)
    found = (df if kind == "pandas" else df.compute()).sort_values("key").reset_index(drop=True)
    assert [str(t) for t in found[["cluster", "cluster_distance"]].dtypes] == ["int32[pyarrow]", "float32"]
    same_groups(found["cluster"], planted)
    unit = np.stack([v / np.linalg.norm(v) for v in frame["embedding"] if v is not None])
    theirs = KMeans(K, n_init=3, random_state=0).fit(unit).transform(unit).min(axis=1)
    ours = found["cluster_distance"].dropna().to_numpy("f4")
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_a_reference_is_counted_by_cluster(tmp_path: Path) -> None:
    _, planted = table(tmp_path / "scores")
    _, other = table(tmp_path / "other", 90, seed=5)
    other = other[other != 2]  # none of one direction
    reference = dic.read_scores(tmp_path / "other").compute()
    reference = reference[vectors(90, 5)[1] != 2]
    df = dic.assign_clusters(dic.read_scores(tmp_path / "scores"), K, reference=reference)
    found = df.compute().sort_values("key").reset_index(drop=True)
    same_groups(found["cluster"], planted)
    expected = [None if at < 0 else int((other == at).sum()) for at in planted]
    assert [None if pd.isna(n) else int(n) for n in found["cluster_reference"]] == expected
    kept = dic.filter_frame(df, "cluster_reference > 0").compute()  # DataComp's filter
    assert len(kept) == ((planted >= 0) & (planted != 2)).sum()


def test_so_many_of_each_by_the_command_line(tmp_path: Path) -> None:
    _, planted = table(tmp_path / "scores")
    table(tmp_path / "other", 90, seed=5)
    add = ["add", str(tmp_path / "scores"), "--clusters", str(K), "--reference", str(tmp_path / "other")]
    done = CliRunner().invoke(cli, [*add, "--out", str(tmp_path / "more")])
    assert done.exit_code == 0, done.output
    assert "cluster, cluster_distance, cluster_reference" in done.stdout
    found = pd.concat(map(pd.read_parquet, sorted((tmp_path / "more").glob("*.parquet"))))
    same_groups(found["cluster"].reset_index(drop=True), planted)
    drawn = CliRunner().invoke(
        cli, ["select", str(tmp_path / "more"), "--sample", "7 by cluster", "--out", str(tmp_path / "few")]
    )
    assert drawn.exit_code == 0, drawn.output
    few = pd.concat(map(pd.read_parquet, (tmp_path / "few").glob("*.parquet")))
    assert few["cluster"].value_counts().tolist() == [7] * K


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0: give the number of clusters"),
        ({"k": 5000}, "k=5000: there are only 289 vectors"),
        ({"k": 3, "column": "key"}, "column 'key' holds text"),
        ({"k": 3, "column": "vector"}, "assign_clusters needs the column vector"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    table(tmp_path / "scores")
    with pytest.raises((ValueError, TypeError), match=message):
        dic.assign_clusters(dic.read_scores(tmp_path / "scores"), **arguments)


def test_a_reference_of_another_model(tmp_path: Path) -> None:
    table(tmp_path / "scores")
    table(tmp_path / "other", 90, width=8)
    df = dic.read_scores(tmp_path / "scores")
    with pytest.raises(ValueError, match=r"have 8 numbers, the clustered ones 16"):
        dic.assign_clusters(df, K, reference=dic.read_scores(tmp_path / "other").compute())
