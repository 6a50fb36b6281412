"""Duplicates in tiers: against brute force, by hand, and whatever the partitions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

import dask_imgcurator as dic
from dask_imgcurator.duplicates import cells as in_cells
from dask_imgcurator.duplicates import hashes
from dask_imgcurator.duplicates.components import Forest
from dask_imgcurator.duplicates.deduplication import dedup, duplicate_groups, find_duplicates
from dask_imgcurator.duplicates.index import build_index, open_index
from dask_imgcurator.duplicates.rows import DedupError, Rows
from dask_imgcurator.engine.backend import get_backend

WIDTH = 24
MIXED = 0x5555_5555_5555_5555  # a hash that tells something; others as far from it as a number has bits


@pytest.fixture(autouse=True)
def one_thread_at_a_time() -> Iterator[None]:
    with dask.config.set(scheduler="sync"):
        yield


def unit(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def frame_of(vectors: Any, **columns: Any) -> pd.DataFrame:
    """A frame as `read_scores` gives it: Arrow lists, so that Dask leaves them alone."""
    n = len(vectors)
    start = {"key": [f"{i:05d}" for i in range(n)], "shard": ["a.tar"] * n, "sample_offset": range(n), **columns}
    table = pa.table({name: pa.array(values) for name, values in start.items()})
    lists = pa.array([None if v is None else [float(x) for x in v] for v in vectors], pa.list_(pa.float32()))
    return get_backend("pandas").from_arrow(table.append_column("embedding", lists))


def clustered(n: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Vectors in loose clusters, with near copies at all distances, some of them copies of copies."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, width))[rng.integers(0, 20, n)] + rng.standard_normal((n, width))
    for i in rng.choice(np.arange(n // 2, n), n // 3, replace=False):
        x[i] = x[rng.integers(0, i)] + rng.standard_normal(width) * rng.uniform(0, 0.6)
    return unit(x)


def brute(vectors: np.ndarray, eps: float) -> np.ndarray:
    """Labels of the connected components of the full matrix, in float64."""
    x = vectors.astype(np.float64)
    return connected_components(x @ x.T >= 1 - eps, directed=False)[1]


def partition(labels: Any) -> set[frozenset[int]]:
    """Groups of two and more."""
    groups = pd.Series(np.arange(len(labels))).groupby(np.asarray(labels)).agg(frozenset)
    return {g for g in groups if len(g) > 1}


def groups_by_key(table: pd.DataFrame) -> set[frozenset[int]]:
    return {frozenset(int(k) for k in keys) for keys in table.groupby("group")["key"].agg(list)}


def staying(frame: Any) -> list[str]:
    frame = frame.compute() if dask.is_dask_collection(frame) else frame
    return sorted(frame["key"])


# --- against brute force --------------------------------------------------------------------------


@pytest.mark.parametrize("n_cells", [None, 1, 12])
def test_components_are_those_of_the_full_matrix(n_cells: int | None) -> None:
    vectors = clustered(2000)
    df = dd.from_pandas(frame_of(vectors), npartitions=5)
    tried = [0.01, 0.03, 0.08]
    # In 24 dimensions, borders of cells are everywhere: all cells in reach are looked into.
    found = find_duplicates(df, ["semantic"], eps=tried, n_cells=n_cells, probe=12)
    for eps in tried:
        expected = partition(brute(vectors, eps))
        assert len(expected) > 50
        assert groups_by_key(found.groups(eps)) == expected
    counts = found.counts()
    assert counts["dropped"].tolist() == [2000 - len(set(brute(vectors, eps))) for eps in tried]
    assert counts["remaining"].tolist() == [len(set(brute(vectors, eps))) for eps in tried]


def test_similarity_is_that_to_the_row_that_stays() -> None:
    vectors = clustered(600)
    table = find_duplicates(frame_of(vectors), ["semantic"], eps=0.08).groups()
    expected = (vectors[table["key"].astype(int)] * vectors[table["kept_key"].astype(int)]).sum(1)
    np.testing.assert_allclose(table["similarity"], expected, atol=1e-5)
    assert table["similarity"].min() < 1 - 0.08  # the far ends of a chain
    assert (table["kept"] == (table["key"] == table["kept_key"])).all()


@pytest.mark.parametrize(("probe", "least"), [(1, 0.93), (2, 0.98), (3, 0.99)])
def test_recall_on_real_embeddings(shared: Path, probe: int, least: float) -> None:
    """In 35 cells, about √n; a pair counts if both are in one group."""
    vectors = unit(np.load(shared / "starter" / "pairs.npz")["clip_b32"])
    found = find_duplicates(frame_of(vectors), ["semantic"], eps=[0.02, 0.05, 0.1], n_cells=35, probe=probe)
    for eps in (0.02, 0.05, 0.1):
        i, j = np.nonzero(np.triu(vectors @ vectors.T >= 1 - eps, 1))
        assert len(i)
        table = found.groups(eps)
        group = pd.Series(table["group"].to_numpy(), table["key"].astype(int))
        together = group.reindex(i).to_numpy() == group.reindex(j).to_numpy()
        assert together.mean() >= least


@pytest.mark.parametrize(("references", "homes", "visitors"), [(0, 100, 0), (0, 40, 70), (60, 30, 20), (8, 0, 9)])
def test_a_cell_compares_each_pair_once(
    references: int, homes: int, visitors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that live there, with each other and with all others; and visitors with the reference."""
    monkeypatch.setattr(in_cells, "BLOCK", 16)
    monkeypatch.setattr(in_cells, "Forest", Everything)
    rows = np.random.default_rng(homes).permutation(references + homes + visitors)
    kind = np.repeat([0, 1, 2], [references, homes, visitors])
    cell = in_cells.Cell(rows, references, homes)

    def take(some: np.ndarray) -> torch.Tensor:
        return torch.ones((len(some), 1))

    found = [in_cells.near_pairs(*task, take, 0.5, sequential=False) for task in cell.tasks()]
    seen = [tuple(sorted(pair)) for a, b, _ in found for pair in zip(a.tolist(), b.tolist(), strict=True)]
    meeting = ({1}, {0, 1}, {1, 2}, {0, 2})
    expected = [p for p in itertools.combinations(range(len(rows)), 2) if {*kind[list(p)]} in meeting]
    assert sorted(seen) == sorted(tuple(sorted(rows[list(p)].tolist())) for p in expected)


class Everything(Forest):
    """Keeps all pairs."""

    def _thin(self) -> None:
        pass


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 7, 40]))
@settings(max_examples=40, deadline=None)
def test_a_forest_connects_what_all_pairs_connect(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = np.array([p for p in itertools.combinations(range(n), 2) if rng.random() < 0.5])
    pairs = pairs.reshape(-1, 2).astype(np.int64)
    similarity = rng.choice(np.linspace(-1, 1, 9), len(pairs)).astype(np.float32)
    forest = Forest(n, limit=0)
    for some in np.array_split(np.arange(len(pairs)), 4):
        forest.add(pairs[some, 0], pairs[some, 1], similarity[some])
    i, j, kept = forest.pairs()
    assert len(i) < n
    for threshold in (-1.0, 0.0, 0.5, 1.0):
        whole, thin = np.eye(n, dtype=bool), np.eye(n, dtype=bool)
        whole[tuple(pairs[similarity >= threshold].T)] = True
        thin[i[kept >= threshold], j[kept >= threshold]] = True
        labels = [connected_components(matrix, directed=False)[1] for matrix in (whole, thin)]
        assert partition(labels[0]) == partition(labels[1])


def test_many_copies_make_few_pairs() -> None:
    vectors = torch.nn.functional.normalize(torch.ones(2500, 4) + 1e-3 * torch.rand(2500, 4), dim=1)
    tasks = in_cells.Cell(np.arange(2500), 0, 2500).tasks()
    found = [in_cells.near_pairs(*task, vectors.__getitem__, 0.9, sequential=False) for task in tasks]
    forest = Forest(2500, limit=0)
    for pairs in found:
        assert len(pairs[0]) < 2500
        forest.add(*pairs)
    i, _, similarity = forest.pairs()
    assert len(i) == 2499
    assert similarity.min() > 0.99


# --- whatever the partitions ----------------------------------------------------------------------


def signed(n: int) -> pd.DataFrame:
    """Rows with duplicates in every tier, null and tied scores, failures among them."""
    rng = np.random.default_rng(3)
    vectors = [*clustered(n)]
    sha = [f"{i:064x}" for i in range(n)]
    hashes = rng.integers(0, 2**63, n).astype(np.uint64)
    for i in range(n - n // 10, n):
        sha[i], hashes[i], vectors[i] = sha[i // 3], hashes[i // 3], vectors[i // 3]
    for i in range(n // 2, n // 2 + n // 10):
        hashes[i] = hashes[i - 40] ^ np.uint64(1 << int(rng.integers(64)))
    score = [None if i % 7 == 0 else float(rng.integers(0, 4)) for i in range(n)]
    status = ["decode_error" if i % 31 == 0 else "ok" for i in range(n)]
    vectors = [None if i % 31 == 0 else v for i, v in enumerate(vectors)]
    shards = [f"{i % 5}.tar" for i in range(n)]
    return frame_of(
        vectors, shard=shards, sha256=sha, phash=hashes, aesthetic_score=pa.array(score, pa.float32()), status=status
    )


@pytest.mark.parametrize("rule", ["components", "semdedup", "nemo"])
def test_partitions_and_order_do_not_matter(rule: Any) -> None:
    frame = signed(700)
    options: dict[str, Any] = {"eps": [0.02, 0.06], "rule": rule, "keep": "aesthetic_score", "n_cells": 7}
    tables = []
    for npartitions, seed in ((1, None), (4, 1), (3, 2)):
        mixed = frame if seed is None else frame.sample(frac=1, random_state=seed)
        mixed = mixed.reset_index(drop=True)
        found = find_duplicates(dd.from_pandas(mixed, npartitions=npartitions), **options)
        tables.append((found.counts(), found.groups(0.02), found.groups()))
    assert tables[0][0]["tier"].tolist() == ["exact", "perceptual", "semantic", "semantic"]
    assert tables[0][0]["dropped"].diff().iloc[1:3].gt(0).all()
    for other in tables[1:]:
        for left, right in zip(tables[0], other, strict=True):
            pd.testing.assert_frame_equal(left, right)


@pytest.mark.parametrize("rule", ["components", "semdedup"])
def test_a_random_row_stays(rule: Any) -> None:
    """Those that `sample` draws from each group, by the same seed; each of a group as often as the others."""
    n, copies = 600, 3
    sha = [f"{i % n:064x}" for i in range(n * copies)]
    shards = [f"{i % 5}.tar" for i in range(n * copies)]
    frame = frame_of(np.eye(4)[np.zeros(n * copies, int)], sha256=sha, shard=shards)
    kept = {}
    for seed, npartitions in ((7, 1), (7, 4), (8, 3)):
        mixed = dd.from_pandas(frame.sample(frac=1, random_state=npartitions).reset_index(drop=True), npartitions)
        found = find_duplicates(mixed, ["exact"], keep="random", seed=seed, rule=rule).drop(mixed).compute()
        drawn = dic.sample(mixed, 1, by="sha256", seed=seed).compute()
        assert sorted(found["key"]) == sorted(drawn["key"])
        assert kept.setdefault(seed, set(found["key"])) == set(found["key"])  # whatever the partitions
    order = {key: i // n for i, key in enumerate(frame["key"])}
    counts = np.bincount([order[key] for key in kept[7]], minlength=copies)
    assert np.abs(counts - n / copies).max() < 4 * (n / copies * (1 - 1 / copies)) ** 0.5  # four standard deviations
    assert len(kept[7] & kept[8]) < n / 2


def test_in_cells_neither_threads_nor_partitions_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are compared each with each; and what is told of the cells is true."""
    pytest.importorskip("faiss")
    vectors = clustered(21_000)
    frame = frame_of(vectors)
    eps = [0.01, 0.05]
    found = []
    for threads, npartitions in ((1, 1), (3, 4)):
        monkeypatch.setattr(in_cells, "CPU_COUNT", threads)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            mixed = frame.sample(frac=1, random_state=threads)
            df = dd.from_pandas(mixed, npartitions=npartitions, sort=False)
            found.append(find_duplicates(df, ["semantic"], eps=eps))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    one, other = found
    assert one.cells == other.cells
    pd.testing.assert_frame_equal(one.counts(), other.counts())
    pd.testing.assert_frame_equal(one.groups(), other.groups())
    cells = one.cells
    assert cells is not None
    assert (cells.cells, cells.probe) == (290, 3)
    assert 20 < cells.median < 21_000 / 290 < cells.largest < 1000
    group = one.groups().assign(at=lambda table: table["key"].astype(int)).set_index("at")["group"]
    x = vectors.astype(np.float64)
    rows = np.arange(0, 21_000, 40)
    for e in eps:
        i, j = np.nonzero(x[rows] @ x.T >= 1 - e)
        i = rows[i]
        together = group.reindex(i[i != j]).to_numpy() == group.reindex(j[i != j]).to_numpy()
        compared, pairs = cells.recall[e]
        assert pairs > 30
        # In a group with one another by way of others, some that were not compared are.
        assert compared / pairs - 0.03 < together.mean()
        assert together.mean() > 0.93
    assert find_duplicates(frame.iloc[:1000], ["semantic"]).cells is None


def test_cells_that_are_far_too_large_are_split() -> None:
    values = unit(np.abs(np.random.default_rng(0).standard_normal((300, WIDTH))))
    asked: list[tuple[int, int]] = []

    class Backend:
        device = "cpu"

        def kmeans(self, some: torch.Tensor, n: int, seed: int) -> np.ndarray:
            """First a centroid amid all rows, and others where nobody is."""
            asked.append((len(some), n))
            if len(asked) > 1:
                return some[:n].numpy()
            return np.concatenate([values.mean(0, keepdims=True), -np.eye(n - 1, WIDTH, dtype=np.float32)])

    table = pa.table({"id": pa.array(range(300), pa.uint64())})
    rows = Rows(table, 300, WIDTH, np.arange(300), [values])
    centroids = in_cells.train(rows, rows.with_vector, Backend(), 10, 0)  # type: ignore[arg-type]
    assert asked == [(300, 10), (300, 10)]
    assert len(centroids) == 9 + 10
    np.testing.assert_allclose(centroids[-10:], values[:10], rtol=1e-5)


def test_a_frame_is_read_once() -> None:
    read: list[int] = []

    def note(part: pd.DataFrame) -> pd.DataFrame:
        if len(part):
            read.append(len(part))
        return part

    frame = signed(300)
    df = dd.from_pandas(frame, npartitions=3).map_partitions(note, meta=frame.iloc[:0])
    found = find_duplicates(df, eps=[0.02, 0.06], n_cells=4)
    assert len(found.groups()) == len(found.groups())
    assert sum(read) == 300


def test_processes_find_what_one_thread_finds() -> None:
    from distributed import Client, LocalCluster

    frame = signed(600)
    df = dd.from_pandas(frame, npartitions=2)
    options: dict[str, Any] = {"eps": [0.02, 0.06], "keep": "aesthetic_score", "n_cells": 6}
    alone = find_duplicates(df, **options)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster),
        dask.config.set(scheduler="distributed"),
    ):
        found = find_duplicates(df, **options)
        pd.testing.assert_frame_equal(found.counts(), alone.counts())
        pd.testing.assert_frame_equal(found.groups(), alone.groups())
        left = found.drop(df, 0.02).compute()
    pd.testing.assert_frame_equal(left, alone.drop(frame, 0.02), check_dtype=False)


# --- who stays ------------------------------------------------------------------------------------


def chain(scores: list[float]) -> pd.DataFrame:
    """a ~ b ~ c at 20 degrees each: cosines 0.94, 0.94 and, of the ends, 0.77."""
    angles = np.radians([0, 20, 40])
    return frame_of(np.c_[np.cos(angles), np.sin(angles)], key=["a", "b", "c"], score=scores)


@pytest.mark.parametrize(
    ("rule", "scores", "stay"),
    [
        ("components", [3, 2, 1], ["a"]),
        ("components", [2, 3, 1], ["b"]),
        ("components", [3, 1, 2], ["a"]),
        ("semdedup", [3, 2, 1], ["a"]),  # c goes for b, though b has gone
        ("semdedup", [2, 3, 1], ["b"]),
        ("semdedup", [3, 1, 2], ["a", "c"]),
        ("nemo", [3, 2, 1], ["a"]),
        ("nemo", [2, 3, 1], ["b"]),
        ("nemo", [3, 1, 2], ["a", "c"]),
    ],
)
def test_the_rules_on_a_chain(rule: Any, scores: list[float], stay: list[str]) -> None:
    found = find_duplicates(chain(scores), ["semantic"], eps=0.1, rule=rule, keep="score")
    assert staying(found.drop(chain(scores))) == stay
    # Who stays for a row has itself stayed.
    assert set(found.groups()["kept_key"]) <= set(stay)


@pytest.mark.parametrize(("rule", "goes"), [("semdedup", 0), ("nemo", 1), ("components", 1)])
def test_exceeds_and_at_least(rule: Any, goes: int) -> None:
    """The cosine of these two is 1/2 without any rounding."""
    frame = frame_of([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    assert find_duplicates(frame, ["semantic"], eps=0.5, rule=rule).counts()["dropped"].tolist() == [goes]


@pytest.mark.parametrize(("keep", "stay"), [(None, ["a", "c"]), ("hard", ["a", "c"]), ("easy", ["b", "c"])])
def test_hard_and_easy(keep: str | None, stay: list[str]) -> None:
    """Of a at 0 and b at 5 degrees, b is nearer the mean, with c at 60."""
    angles = np.radians([0, 5, 60])
    frame = frame_of(np.c_[np.cos(angles), np.sin(angles)], key=["a", "b", "c"])
    assert staying(dedup(frame, eps=0.01, rule="semdedup", keep=keep)) == stay


@pytest.mark.parametrize(
    ("scores", "lowest", "stay"),
    [
        ([1.0, 3.0, 2.0], False, "00001"),
        ([1.0, 3.0, 2.0], True, "00000"),
        ([None, None, 0.5], False, "00002"),
        ([None, None, 0.5], True, "00002"),
        ([float("nan"), -1.0, -2.0], False, "00001"),
        ([2.0, 2.0, 1.0], False, "00000"),
        ([None, None, None], False, "00000"),
    ],
)
def test_ties_and_missing_values(scores: list[Any], lowest: bool, stay: str) -> None:
    frame = frame_of([[1, 0]] * 3, score=pa.array(scores, pa.float64()))
    assert staying(dedup(frame.iloc[::-1], keep="score", lowest=lowest)) == [stay]
    assert staying(dedup(frame, keep="first")) == ["00000"]


def test_keep_by_truth_values_and_times() -> None:
    frame = frame_of([[1, 0]] * 2, good=[False, True])
    frame["when"] = pd.to_datetime(["2020-01-01", "2021-01-01"])
    assert staying(dedup(frame, keep="good")) == staying(dedup(frame, keep="when")) == ["00001"]


def test_ties_go_by_shard_then_key_then_offset() -> None:
    frame = frame_of([[1, 0]] * 4, shard=["b", "a", "a", "a"], key=["x", "z", "y", "y"], sample_offset=[0, 0, 9, 5])
    table = duplicate_groups(frame)
    line = table[table["kept"]].iloc[0]
    assert (line["shard"], line["key"], line["sample_offset"]) == ("a", "y", 5)


def test_each_tier_works_on_what_the_one_before_left() -> None:
    """1 is 0's bytes, 2 is nearly 0's hash, 3 is nearly 0's embedding, 4 only near 2's, which has gone by then."""
    vectors = unit([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0.1, 0], [0, 1, 0.1]])
    hashes = [MIXED ^ bits for bits in (0, 0, 7, 2**20 - 1, 2**41 - 1)]
    frame = frame_of(vectors, sha256=["a", "a", "b", "c", "d"], phash=hashes)
    found = find_duplicates(frame, eps=0.05, max_distance=3)
    assert found.counts()["dropped"].tolist() == [1, 2, 3]
    table = found.groups()
    assert table["key"].tolist() == ["00000", "00001", "00002", "00003"]
    assert table["tier"].fillna("").tolist() == ["", "exact", "perceptual", "semantic"]
    assert table["distance"].tolist() == [0, 0, 3, 20]
    np.testing.assert_allclose(table["similarity"], [1, 1, 0, 1 / np.sqrt(1.01)], atol=1e-6)
    marked = found.mark(frame)
    assert marked["duplicate_of"].fillna("").tolist() == ["", "00000", "00000", "00000", ""]
    assert marked["duplicate_tier"].fillna("").tolist() == ["", "exact", "perceptual", "semantic", ""]
    assert marked["duplicate_group"].fillna(-1).tolist() == [0, 0, 0, 0, -1]
    assert staying(found.drop(frame)) == ["00000", "00004"]


def test_groups_of_the_light_tiers_tell_the_similarity_too() -> None:
    """Vectors are read for them alone, and where there are any."""
    frame = signed(300)
    df = dd.from_pandas(frame, npartitions=3)
    table = find_duplicates(df, ["exact", "perceptual"]).groups()
    there = frame["embedding"].notna()
    x = dict(zip(frame["key"][there], frame["embedding"][there], strict=True))
    expected = [
        float(np.dot(x[a], x[b])) if a in x and b in x else np.nan
        for a, b in zip(table["key"], table["kept_key"], strict=True)
    ]
    assert len(table) > 40
    np.testing.assert_allclose(table["similarity"], expected, atol=1e-6)
    half, reference = frame.iloc[:150], frame.iloc[150:]
    for against, known in ((reference, True), (reference.drop(columns="embedding"), False)):
        table = find_duplicates(half, ["exact"], against=against).groups()
        own = table[~table["kept"]]
        assert len(own) > 5
        assert own["similarity"].notna().all() == known


def test_marks_say_at_which_eps_a_row_goes() -> None:
    angles = np.radians([0, 5, 20])
    frame = frame_of(np.c_[np.cos(angles), np.sin(angles)])
    df = dd.from_pandas(frame, npartitions=2)
    found = find_duplicates(df, eps=[0.1, 0.01])
    marked = found.mark(df)
    assert marked.dtypes.to_dict() == marked.compute().dtypes.to_dict()
    np.testing.assert_allclose(marked.compute()["duplicate_eps"].astype(float), [np.nan, 0.01, 0.1], rtol=1e-6)
    assert found.mark(frame, eps=0.01)["duplicate_tier"].isna().tolist() == [True, False, True]
    assert staying(found.drop(df, eps=0.01)) == ["00000", "00002"]
    assert found.drop(df).columns.tolist() == df.columns.tolist()


def test_rows_that_failed_stay_and_take_no_part() -> None:
    frame = frame_of(
        [None, None, [1, 0], [1, 0], [0, 0], [0, 0], [np.nan, 1], [np.nan, 1]],
        sha256=["x", "x", "y", "z", *"abcd"],
        status=["decode_error"] * 2 + ["ok"] * 6,
    )
    frame.index = [f"row {i}" for i in range(len(frame))]
    left = dedup(frame)
    assert left.index.tolist() == [f"row {i}" for i in (0, 1, 2, 4, 5, 6, 7)]
    pd.testing.assert_frame_equal(left, frame.drop("row 3"))


def test_nothing_to_find() -> None:
    hashes = [MIXED ^ bits for bits in (0, 2**20 - 1, 2**40 - 1, 2**60 - 1, 2**63 - 2**30)]
    frame = frame_of(np.eye(5), sha256=[*"abcde"], phash=hashes)
    for df in (frame, dd.from_pandas(frame, npartitions=2), frame.iloc[:1], frame.iloc[:0]):
        found = find_duplicates(df, eps=[0.01, 0.1])
        assert found.counts()["dropped"].tolist() == [0, 0, 0, 0]
        assert len(found.groups()) == 0
        assert staying(found.mark(df)) == staying(found.drop(df)) == staying(df)


# --- hashes ---------------------------------------------------------------------------------------


def planted_hashes(n: int, seed: int) -> np.ndarray:
    """Random hashes, some of which differ from others in 0 to 9 bits, and some that are all alike but for few bits."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, np.uint64)
    for i in range(n // 2, n):
        flips = rng.choice(64, rng.integers(0, 10), replace=False)
        of = hashes[rng.integers(0, n // 2)] if i % 3 else np.uint64(MIXED)
        hashes[i] = of ^ np.uint64(sum(1 << int(b) for b in flips))
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 4, 8, 16])
def test_hashes_against_brute_force(distance: int) -> None:
    hashes = planted_hashes(1500, distance)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= distance
    expected = partition(connected_components(near, directed=False)[1])
    frame = frame_of([None] * 1500, phash=hashes)
    df = dd.from_pandas(frame, npartitions=3)
    assert groups_by_key(find_duplicates(df, ["perceptual"], max_distance=distance).groups()) == expected


@pytest.mark.parametrize(("n", "distance"), [(10, 3), (10**6, 4), (10**9, 4), (10**9, 8), (10**7, 1)])
def test_no_table_misses_a_near_pair(n: int, distance: int) -> None:
    masks = hashes.hamming_masks(n, distance)
    rng = np.random.default_rng(n + distance)
    for _ in range(300):
        flips = sum(1 << int(b) for b in rng.choice(64, distance, replace=False))
        assert any(flips & mask == 0 for mask in masks)


def test_more_tables_for_more_hashes() -> None:
    few, many = hashes.hamming_masks(10**4, 4), hashes.hamming_masks(10**9, 4)
    assert len(few) < len(many)
    assert min(m.bit_count() for m in few) < min(m.bit_count() for m in many)


def test_pairs_of_hashes_are_found_once() -> None:
    values = np.unique(planted_hashes(60, 1))
    masks = hashes.hamming_masks(len(values), 3)
    i, j, bits = hashes.hamming_pairs(values, masks, 3, np.zeros(len(values), bool))
    found = [tuple(sorted((int(values[a]), int(values[b])))) for a, b in zip(i, j, strict=True)]
    expected = [p for p in itertools.combinations(values.tolist(), 2) if (p[0] ^ p[1]).bit_count() <= 3]
    assert sorted(found) == sorted(expected)
    assert bits.tolist() == [(a ^ b).bit_count() for a, b in found]


@pytest.mark.parametrize(
    "make",
    [
        lambda v: pa.array(v, pa.uint64()),
        lambda v: pa.array([None if x is None else x - 2**64 if x >= 2**63 else x for x in v], pa.int64()),
        lambda v: pa.array([None if x is None else f"{x:016x}" for x in v]),
        lambda v: pa.array([None if x is None else f"{x:016X}" for x in v]),
    ],
    ids=["uint64", "int64", "hexadecimal", "capitals"],
)
def test_kinds_of_hashes(make: Any) -> None:
    high = MIXED << 1
    values = [high, None, high ^ 1, MIXED ^ (2**53 + 1), MIXED ^ 2**53, None, MIXED ^ (5 << 40)]
    frame = frame_of([None] * 7, phash=make(values))
    assert groups_by_key(duplicate_groups(frame, max_distance=1)) == {frozenset({0, 2}), frozenset({3, 4})}


def test_plain_pictures_of_any_colour_are_no_duplicates() -> None:
    imagehash = pytest.importorskip("imagehash")
    from PIL import Image

    colours = ["white", "black", "red", "#123456", "white"]
    hashes = [str(imagehash.phash(Image.new("RGB", (90, 60), colour))) for colour in colours]
    assert len(set(hashes)) <= 2  # so the hash does not tell them apart
    frame = frame_of([None] * 5, phash=hashes, sha256=[*colours[:4], "white"])
    assert staying(dedup(frame, ["perceptual"])) == staying(frame)
    assert staying(dedup(frame)) == ["00000", "00001", "00002", "00003"]  # the same bytes are duplicates still


# --- a reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frame", "float32", "float16"])
def test_rows_that_are_in_the_reference_go(kind: str, tmp_path: Path) -> None:
    vectors = clustered(900, seed=5)
    whole = frame_of(vectors, sha256=[f"{i // 2:x}" for i in range(900)], score=np.arange(900.0))
    new, reference = whole.iloc[::2], whole.iloc[1::2]
    against: Any = reference
    if kind != "frame":
        against = tmp_path / "index"
        build_index(dd.from_pandas(reference, npartitions=3), against, dtype=kind)
    found = find_duplicates(new, ["exact"], against=against, keep="score")
    assert found.counts()["dropped"].tolist() == [450]
    table = found.groups()
    assert (table["in_reference"] == table["kept"]).all()
    assert (table["key"].astype(int) | 1 == table["kept_key"].astype(int)).all()
    # Semantic: who is connected to the reference goes; pairs within it count for nothing.
    near = (vectors @ vectors.T) >= 1 - 0.04
    near[np.ix_(range(1, 900, 2), range(1, 900, 2))] = False
    np.fill_diagonal(near, True)
    labels = connected_components(near, directed=False)[1]
    stay, seen = [], set(labels[1::2])
    for i in range(898, -1, -2):  # the highest score first
        if labels[i] not in seen:
            seen.add(labels[i])
            stay.append(f"{i:05d}")
    left = dedup(new, ["semantic"], against=against, eps=0.04, keep="score")
    assert 0 < len(stay) < 450
    assert staying(left) == sorted(stay)


def test_a_set_that_grows(tmp_path: Path) -> None:
    """Each batch against what is there, then into it: as if all had come at once, first come first served."""
    angles = np.radians([0, 1, 30, 31, 60, 2, 90, 61])
    frame = frame_of(np.c_[np.cos(angles), np.sin(angles)])
    path = tmp_path / "index"
    build_index(dedup(frame.iloc[:3], eps=0.01), path)
    for batch in (frame.iloc[3:5], frame.iloc[5:]):
        build_index(dedup(batch, eps=0.01, against=path), path, append=True)
    index = open_index(path)
    assert index.about["rows"] == 4
    assert staying(index.frame()) == ["00000", "00002", "00004", "00006"] == staying(dedup(frame, eps=0.01))
    # What is in the set already is a duplicate of itself.
    assert len(dedup(frame, eps=0.01, against=index)) == 0


def test_an_index_in_an_object_store() -> None:
    vectors = clustered(300)
    frame = frame_of(vectors, sha256=[f"{i:x}" for i in range(300)])
    build_index(frame.iloc[:150], "memory://set/index", n_cells=3)
    build_index(frame.iloc[150:200], "memory://set/index", append=True)
    with pytest.raises(FileExistsError, match="append=True"):
        build_index(frame, "memory://set/index")
    index = open_index("memory://set/index")
    assert (index.about["rows"], index.about["cells"], index.about["parts"]) == (200, 3, 2)
    left = dedup(frame, ["exact"], against="memory://set/index")
    assert staying(left) == [f"{i:05d}" for i in range(200, 300)]
    again = find_duplicates(frame.iloc[:200], ["semantic"], against=index, eps=0.01)
    assert again.counts()["remaining"].tolist() == [0]
    assert (again.groups()["similarity"] > 0.9999).sum() >= 200


@pytest.mark.parametrize("rule", ["semdedup", "nemo"])
def test_the_reference_stays_in_front(rule: Any) -> None:
    angle = np.radians(-2)
    reference = frame_of([[np.cos(angle), np.sin(angle)]], key=["bench"], shard=["b.tar"])
    found = find_duplicates(chain([1, 2, 3]), against=reference, eps=0.1, rule=rule, keep="score")
    # b, at 20 degrees, is near both, and nearer to c; c, at 40, is near b only, before which it stands.
    assert found.groups().set_index("key")["kept_key"].to_dict() == {"bench": "bench", "a": "bench", "c": "c", "b": "c"}
    assert staying(found.drop(chain([1, 2, 3]))) == ["c"]


def test_index_of_another_model(tmp_path: Path) -> None:
    build_index(frame_of(np.eye(3)), tmp_path, provenance={"model": "ViT-B-32", "pretrained": "openai"})
    with pytest.raises(DedupError, match="holds embeddings of 3 numbers, the rows have 4"):
        find_duplicates(frame_of(np.eye(4)), against=tmp_path)
    with pytest.raises(DedupError, match="built with model 'ViT-B-32', the rows were made with 'starter'"):
        find_duplicates(frame_of(np.eye(3)), against=tmp_path, provenance={"model": "starter", "dtype": "float32"})
    with pytest.raises(DedupError, match="of 3 numbers, the rows have 4"):
        build_index(frame_of(np.eye(4)), tmp_path, append=True)
    same = {"model": "ViT-B-32", "dtype": "bfloat16"}
    assert len(dedup(frame_of(np.eye(3)), against=tmp_path, provenance=same)) == 0


def test_index_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no index at .*build_index"):
        find_duplicates(frame_of(np.eye(3)), against=tmp_path / "nowhere")
    build_index(frame_of(np.eye(3)), tmp_path / "a")
    with pytest.raises(FileExistsError, match="append=True"):
        build_index(frame_of(np.eye(3)), tmp_path / "a")
    about = json.loads((tmp_path / "a" / "index.json").read_text())
    assert about["columns"] == ["embedding"]
    with pytest.raises(ValueError, match="tier exact needs the column sha256 in the reference"):
        find_duplicates(frame_of(np.eye(3), sha256=[*"abc"]), against=tmp_path / "a")
    (tmp_path / "a" / "index.json").write_text(json.dumps({**about, "format": 1}))
    with pytest.raises(DedupError, match="format 1; this version reads 2"):
        open_index(tmp_path / "a")
    with pytest.raises(ValueError, match="dtype='int8': use float32 or float16"):
        build_index(frame_of(np.eye(3)), tmp_path / "b", dtype="int8")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": ["fuzzy"]}, "unknown tier 'fuzzy': use exact, perceptual, semantic"),
        ({"tiers": []}, "tiers is empty"),
        ({"tiers": "perceptual"}, "tier perceptual needs the column phash: .* adds it .*, or name yours with phash="),
        ({"tiers": ["exact"]}, "tier exact needs the column sha256: embed adds it .on the command line: score."),
        ({"embedding": "clip"}, "no column to find duplicates by: embed adds sha256 and embedding"),
        ({"rule": "union"}, "unknown rule 'union': use components, semdedup, nemo"),
        ({"eps": -0.1}, r"eps=-0.1: 1 - cosine lies between 0 and 2"),
        ({"eps": [0.1, 2.1]}, r"eps=2.1: 1 - cosine lies between 0 and 2"),
        ({"eps": []}, r"eps=\[\]"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"max_distance": -1}, "max_distance=-1: it must be 0 to 16"),
        ({"probe": 0}, "probe=0: it must be 1"),
        ({"n_cells": 0}, "n_cells=0: it must be at least 1"),
        ({"keep": "beauty"}, "keep='beauty': no such column .*or 'first', 'random'"),
        ({"keep": "hard"}, "keep='hard' is an order of the rules semdedup and nemo"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_duplicates(frame_of(np.eye(3)), **options)


def test_other_errors() -> None:
    frame = frame_of(np.eye(3))
    with pytest.raises(TypeError, match="keep='shard' is a column of string: name one of numbers"):
        find_duplicates(frame, keep="shard")
    with pytest.raises(ValueError, match="dedup needs the column key"):
        find_duplicates(frame.drop(columns="key"))
    with pytest.raises(TypeError, match="expected a Dask, pandas or cuDF frame"):
        find_duplicates([1, 2])
    with pytest.raises(DedupError, match=r"different lengths: \[2, 3\]"):
        find_duplicates(dd.concat([dd.from_pandas(frame_of(np.eye(n)), npartitions=1) for n in (2, 3)]))
    with pytest.raises(DedupError, match=r"embeddings have 3 numbers, those of the reference \(against=\) 2"):
        find_duplicates(frame, against=frame_of(np.eye(2)))
    with pytest.raises(DedupError, match="holds 'zz', not a 64-bit hash"):
        find_duplicates(frame.assign(phash="zz"))
    with pytest.raises(ValueError, match="name one, or mark=True"):
        dedup(frame, eps=[0.1, 0.2])
    found = find_duplicates(frame, eps=0.1)
    with pytest.raises(ValueError, match=r"eps=0.2 was not tried: there are 0.1"):
        found.groups(0.2)
    with pytest.raises(ValueError, match="identified by shard, key, sample_offset, but this frame has key"):
        found.drop(frame[["key"]])


@pytest.mark.parametrize("tier", ["exact", "perceptual", "semantic"])
def test_rows_that_cannot_be_told_apart(tier: str) -> None:
    frame = frame_of([[1, 0]] * 2, sha256=["a"] * 2, phash=[MIXED, MIXED], key=["k", "k"], sample_offset=[0, 512])
    assert len(dedup(frame, [tier])) == 1
    with pytest.raises(DedupError, match=r"two rows have shard 'a\.tar', key 'k' and sample_offset 0"):
        dedup(frame.drop(columns="sample_offset"), [tier])


def test_a_frame_with_keys_alone() -> None:
    frame = frame_of([[1, 0], [1, 0], [0, 1]])[["key", "embedding"]]
    assert staying(dedup(frame)) == ["00000", "00002"]
    frame["embedding"] = [np.array([1.0, 0.0]), np.array([1.0, 0.0]), np.array([0.0, 1.0])]  # as users make them
    assert staying(dedup(frame)) == ["00000", "00002"]


# --- the seam -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pandas", pytest.param("cudf", marks=pytest.mark.gpu)])
def test_kmeans(name: str) -> None:
    """Four clumps far apart: their means are found, whatever the seed, and twice the same."""
    backend = get_backend(name)
    corners = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9], [-9, -9, -9]], np.float32)
    values = np.repeat(corners, 50, axis=0) + np.random.default_rng(0).normal(0, 0.1, (200, 3)).astype(np.float32)
    means = values.reshape(4, 50, 3).mean(1)
    tensor = torch.from_numpy(values).to(backend.device)
    found = backend.kmeans(tensor, 4, seed=0)
    assert found.shape == (4, 3) and found.dtype == np.float32
    distances = np.linalg.norm(found[:, None] - means[None], axis=2)
    assert sorted(distances.argmin(1)) == [0, 1, 2, 3]
    assert distances.min(1).max() < 0.1
    np.testing.assert_array_equal(found, backend.kmeans(tensor, 4, seed=0))


@pytest.mark.gpu
def test_a_card_finds_the_same() -> None:
    import cudf

    frame = signed(800)
    on_card = cudf.DataFrame.from_arrow(get_backend("pandas").to_arrow(frame))
    options: dict[str, Any] = {"eps": [0.02, 0.06], "keep": "aesthetic_score"}
    expected, found = find_duplicates(frame, **options), find_duplicates(on_card, **options)
    pd.testing.assert_frame_equal(found.counts(), expected.counts())
    assert staying(found.drop(on_card).to_pandas()) == staying(expected.drop(frame))
