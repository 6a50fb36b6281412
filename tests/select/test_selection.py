"""Rows by rank, at random and step by step: against NumPy, pandas and DuckDB, and whatever the partitions."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.select import ranks
from dask_imgcurator.select.ranks import SelectionError
from dask_imgcurator.select.selection import (
    apply_steps,
    funnel,
    quantile,
    sample,
    settle,
    top_count,
    top_fraction,
)
from dask_imgcurator.select.steps import RandomSample, Top, parse_sample, parse_step, parse_top
from dask_imgcurator.select.syntax import WhereError
from dask_imgcurator.select.where import parse_where
from dask_imgcurator.steps.score_table import read_scores


@pytest.fixture(autouse=True)
def one_thread_at_a_time() -> Iterator[None]:
    with dask.config.set(scheduler="sync"):
        yield


def named(values: Any, **columns: Any) -> pd.DataFrame:
    """Rows with a score, and by what a row is known; each key is in two shards."""
    n = len(values)
    frame = {"shard": [f"{i % 2}.tar" for i in range(n)], "key": [f"{i // 2:05d}" for i in range(n)]}
    return pd.DataFrame({**frame, "sample_offset": np.arange(n) * 512, "score": values, **columns})


def table(n: int = 900, seed: int = 0) -> pd.DataFrame:
    """Rows as a score table has them, with ties, nulls and columns of many types."""
    rng = np.random.default_rng(seed)
    score = rng.choice(np.linspace(0, 1, 60), n).astype(np.float32)
    score[rng.random(n) < 0.1] = np.nan
    width = pd.array(rng.integers(1, 9, n) * 64, dtype="Int32")
    width[rng.random(n) < 0.1] = pd.NA
    frame = named(score, width=width, big=2**60 + rng.integers(0, 99, n), cluster=rng.integers(0, 12, n))
    frame["aesthetic"] = rng.normal(5, 1, n)
    frame["status"] = np.where(rng.random(n) < 0.1, "decode_error", "ok")
    frame["caption"] = rng.choice(["a cat", "a dog", ""], n)
    return frame


def split(frame: pd.DataFrame, parts: int, seed: int | None = None, empty: bool = True) -> dd.DataFrame:
    """The rows shuffled and in partitions of different sizes, the first of which is empty."""
    if seed is not None:
        frame = frame.sample(frac=1, random_state=seed)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, len(frame) + 1, parts - 1))
    pieces = [frame.iloc[a:b] for a, b in zip([0, *cuts], [*cuts, len(frame)], strict=True)]
    pieces = [frame.iloc[:0], *pieces] if empty else pieces
    return dd.from_map(lambda i: pieces[i], range(len(pieces)), meta=frame.iloc[:0])


def keys(frame: Any) -> list[tuple[str, str]]:
    frame = frame.compute() if dask.is_dask_collection(frame) else frame
    return sorted(zip(frame["shard"], frame["key"], strict=True))


# --- top ------------------------------------------------------------------------------------------


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.5, 2.0]), st.floats(allow_nan=True)
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(FLOATS, max_size=40),
    share=st.sampled_from([0, 0.1, 0.3, 0.5, 0.75, 1]),
    largest=st.booleans(),
    dtype=st.sampled_from(["f4", "f8"]),
)
def test_top_of_floats_is_that_of_a_sort(values: list[float], share: float, largest: bool, dtype: str) -> None:
    with np.errstate(over="ignore"):
        frame = named(np.array(values, "f8").astype(dtype))
    kept = top_fraction(frame, "score", share, largest=largest)
    known = np.sort(frame["score"].dropna().to_numpy())
    n = int(Fraction(str(share)) * len(known))
    expected = known[len(known) - n :] if largest else known[:n]
    assert np.sort(kept["score"].to_numpy()).tolist() == expected.tolist()


INTS = {"int64": (-(2**63), 2**63 - 1), "uint64": (0, 2**64 - 1), "int8": (-128, 127), "uint32": (0, 2**32 - 1)}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(INTS)), n=st.integers(0, 30), largest=st.booleans())
def test_top_of_integers_is_that_of_a_sort(data: st.DataObject, dtype: str, n: int, largest: bool) -> None:
    low, high = INTS[dtype]
    near = st.integers(max(low, high - 4), high) | st.integers(low, min(high, low + 4))
    values = data.draw(st.lists(near | st.integers(low, high), max_size=25))
    kept = top_count(named(np.array(values, dtype)), "score", n, largest=largest)
    assert sorted(kept["score"].tolist()) == sorted(sorted(values, reverse=largest)[:n])


STORED = ["Int32", "UInt8", "Int64", "Float32", "int16[pyarrow]", "float[pyarrow]", pd.ArrowDtype(pa.float16()), object]


@pytest.mark.parametrize("dtype", STORED)
def test_top_of_every_way_to_store_numbers(dtype: Any) -> None:
    frame = named(pd.array([3, None, 1, 2, 5, None, 4], dtype=dtype))
    assert top_count(frame, "score", 3)["score"].tolist() == [3, 5, 4]
    assert top_count(frame, "score", 2, largest=False)["score"].tolist() == [1, 2]
    assert len(top_fraction(frame, "score", 1)) == 5


def test_nan_beside_null_is_never_kept() -> None:
    array = pa.array([1.0, float("nan"), None, 2.0])
    frame = named(pd.array(array, dtype=pd.ArrowDtype(pa.float64())))
    assert keys(top_fraction(frame, "score", 1)) == keys(frame.iloc[[0, 3]])


@pytest.mark.parametrize("parts", [1, 3, 17])
@pytest.mark.parametrize("ties", ["exact", "include", "exclude"])
def test_top_does_not_depend_on_partitions(parts: int, ties: Any) -> None:
    frame = table()
    where = "aesthetic >= 4.5"
    once = top_fraction(frame, "score", 0.3, where=where, ties=ties)
    eligible = frame[(frame["aesthetic"] >= 4.5) & frame["score"].notna()]
    n = int(Fraction("0.3") * len(eligible))
    last = np.sort(eligible["score"])[-n]
    above, at = (eligible["score"] > last).sum(), (eligible["score"] == last).sum()
    assert above < n < above + at  # there are ties to break
    assert len(once) == {"exact": n, "include": above + at, "exclude": above}[ties]
    assert set(keys(once)) >= set(keys(eligible[eligible["score"] > last]))
    assert once["score"].min() >= last
    for seed in (None, 1, 2):
        assert keys(top_fraction(split(frame, parts, seed), "score", 0.3, where=where, ties=ties)) == keys(once)


def test_ties_prefer_no_shard() -> None:
    frame = named(np.ones(4000))
    kept = top_fraction(frame, "score", 0.5)
    assert len(kept) == 2000
    assert 900 < (kept["shard"] == "0.tar").sum() < 1100  # 6 standard deviations
    assert 900 < (kept.index < 2000).sum() < 1100


def test_many_passes_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = table()
    expected = {c: keys(top_fraction(frame, c, 0.2)) for c in ("score", "big", "aesthetic", "width")}
    monkeypatch.setattr(ranks, "_GATHER", 1)  # as with far more rows
    for column, kept in expected.items():
        assert keys(top_fraction(split(frame, 5, 0), column, 0.2)) == kept


def test_the_result_has_the_frame_s_order_columns_and_index() -> None:
    frame = table().sample(frac=1, random_state=3)
    kept = top_fraction(frame, "aesthetic", 0.5)
    pd.testing.assert_frame_equal(kept, frame.sort_values("aesthetic").iloc[len(frame) // 2 :].loc[kept.index])
    assert kept.index.tolist() == [i for i in frame.index if i in set(kept.index)]


def test_a_fraction_is_the_number_that_is_written() -> None:
    frame = named(np.arange(100))
    assert 0.07 * 100 > 7 > 0.29 * 100 - 22  # floating point would round both to the other side of 7 and 29
    for share in (0.29, "0.29", Decimal("0.29"), Fraction(29, 100), np.float64(0.29)):
        assert len(top_fraction(frame, "score", share)) == 29
    assert len(top_fraction(frame.iloc[:3], "score", 0.3)) == 0
    assert len(top_fraction(frame.iloc[:3], "score", Fraction(1, 3))) == 1


@pytest.mark.parametrize("parts", [0, 4])
def test_nothing_to_rank(parts: int) -> None:
    frame = named(np.full(20, np.nan))
    df: Any = split(frame, parts) if parts else frame
    assert keys(top_fraction(df, "score", 1)) == keys(top_count(df, "score", 5)) == []
    assert quantile(df, "score", 0.5) is None
    assert quantile(df, "score", [0, 1]) == [None, None]
    assert len(top_fraction(named(np.array([], "f4")), "score", 0.5)) == 0


def test_partitions_of_other_types() -> None:
    pieces = [named([1.0, 2.0]), named(np.array([None, None], object)), named(pd.array([4, None], "Int64"))]
    df = dd.from_map(lambda i: pieces[i], range(3), meta=pieces[0].iloc[:0])
    assert top_count(df, "score", 2).compute()["score"].tolist() == [2, 4]


def test_a_partition_of_wider_floats() -> None:
    pieces = [named(np.array([1.0, 2.0], "f4")), named(np.array([0.5, np.nan, 2**-30, math.inf], "f8"))]
    df = dd.from_map(lambda i: pieces[i], range(2), meta=pieces[0].iloc[:0])
    assert top_count(df, "score", 2).compute()["score"].tolist() == [2, math.inf]
    assert quantile(df, "score", [0, 0.4, 0.6, 0.8, 1]) == [2**-30, 0.5, 1, 2, math.inf]


@pytest.mark.parametrize(
    ("dtype", "values", "told"),
    [
        ("f8", [2**53 + 1], "float64"),
        ("f8", ["4"], "float64"),
        ("f4", [2**24 + 1], "float32"),
        ("f4", [0.5, 0.1], "float32.*0.1 as double"),
        ("f4", pd.array([Decimal("0.1")], pd.ArrowDtype(pa.decimal128(5, 2))), "float32.*0.1 as decimal"),
    ],
)
def test_a_value_that_cannot_be_compared_exactly_is_told(dtype: str, values: Any, told: str) -> None:
    pieces = [named(np.array([1.0], dtype)), named(np.array(values) if isinstance(values, list) else values)]
    df = dd.from_map(lambda i: pieces[i], range(2), meta=pieces[0].iloc[:0])
    with pytest.raises(SelectionError, match=rf"'score'.*{told}.*Give it one type"):
        top_count(df, "score", 1)


def test_copies_of_a_row_are_told_where_they_matter() -> None:
    frame = pd.concat([named([1.0, 2.0, 3.0])] * 2, ignore_index=True)
    assert len(top_count(frame, "score", 2)) == 2  # both 3.0
    with pytest.raises(SelectionError, match=r"2 rows.*shard '0.tar', key '00001', sample_offset 1024"):
        top_count(frame, "score", 1)
    with pytest.raises(SelectionError, match="Drop rows that are there twice"):
        sample(frame, 1)
    with pytest.raises(SelectionError, match="2 rows"):
        sample(frame.assign(g=0), 1, by="g")
    assert len(sample(frame.assign(g=0), 6, by="g")) == 6
    assert len(top_count(frame, "score", 1, ties="include")) == 2


def test_ties_can_be_broken_with_what_there_is() -> None:
    frame = named([1.0, 1.0, 1.0, 0.0])
    assert len(top_count(frame[["key", "sample_offset", "score"]], "score", 2)) == 2
    assert top_count(frame[["score"]], "score", 3)["score"].tolist() == [1, 1, 1]
    with pytest.raises(SelectionError, match=r"ties to break.*shard, key, sample_offset.*available: score"):
        top_count(frame[["score"]], "score", 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: top_fraction(f, "scor", 0.5),
            r"no column 'scor'; did you mean 'score'\? \(available: shard, key, sample_offset, score",
        ),
        (lambda f: top_fraction(f, "caption", 0.5), "'caption' holds string"),
        (lambda f: top_fraction(f, "score", 30), "fraction=30: it must be from 0 to 1; 30% is 0.3"),
        (lambda f: top_fraction(f, "score", -0.1), "fraction=-0.1: it must be"),
        (lambda f: top_fraction(f, "score", math.nan), "fraction=nan: give a number"),
        (lambda f: top_fraction(f, "score", "all"), "fraction='all': give a number"),
        (lambda f: top_fraction(f, "score", 0.5, ties="first"), "ties='first': use exact, include, exclude"),
        (lambda f: top_count(f, "score", -1), "n=-1: give a whole number"),
        (lambda f: top_count(f, "score", 0.5), "n=0.5: give a whole number"),
        (lambda f: quantile(f, "score", 1.5), "q=1.5: it must be from 0 to 1; 1.5% is 0.015"),
        (lambda f: quantile(f, "status", 0.5), "'status' holds string"),
        (lambda f: sample(f), "n=None, fraction=None: give one of them"),
        (lambda f: sample(f, 5, 0.5), "n=5, fraction=0.5: give one of them"),
        (lambda f: sample(f, 5, seed="x"), "seed='x': give a whole number"),
        (lambda f: sample(f, fraction=0.5, by="cluster"), "by='cluster' takes n"),
        (lambda f: sample(f, 5, by="nothing"), "no column 'nothing'"),
        (lambda f: sample(f[["score"]], 5), "needs the columns that identify a row"),
        (lambda f: sample(f.assign(v=[[1.0]] * len(f)), 5, by="v"), "'v' holds list"),
    ],
)
def test_mistakes_are_told_at_once(call: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        call(table(20))


# --- quantile -------------------------------------------------------------------------------------

EIGHTHS = [0, 0.125, 0.25, 0.5, 0.625, 0.875, 1]  # exact in binary, so that NumPy takes the same ranks


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=40))
def test_quantile_is_numpy_s_inverted_cdf(values: list[float]) -> None:
    expected = np.quantile(np.array(values), EIGHTHS, method="inverted_cdf")
    assert quantile(named(values), "score", EIGHTHS) == expected.tolist()


@pytest.mark.parametrize("parts", [1, 3, 17])
@pytest.mark.parametrize("column", ["score", "aesthetic", "width", "big"])
def test_quantile_of_partitions_is_duckdb_s(parts: int, column: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    frame = table()
    known = pd.DataFrame({"v": frame[column].dropna().astype("int64" if column in ("width", "big") else "float64")})
    shares = [0.01, 0.1, 0.33, 0.5, 0.9, 1]
    rows = duckdb.sql("select v from known order by v").fetchall()
    expected = [rows[max(1, math.ceil(Fraction(str(q)) * len(known))) - 1][0] for q in shares]
    assert quantile(split(frame, parts, 5), column, shares) == expected
    assert quantile(frame, column, 0.33) == expected[2]
    assert type(expected[2]) is type(quantile(frame, column, 0.33))
    assert duckdb.sql("select quantile_disc(v, 0.5) from known").fetchall() == [(expected[3],)]


def test_quantile_under_a_condition() -> None:
    frame = table()
    expected = np.quantile(frame["aesthetic"][frame["score"] > 0.5], 0.25, method="inverted_cdf")
    assert quantile(split(frame, 4), "aesthetic", 0.25, where="score > 0.5") == expected


def test_rows_above_a_quantile_are_the_top() -> None:
    frame = table()
    at = quantile(frame, "aesthetic", 0.7)
    assert keys(frame[frame["aesthetic"] > at]) == keys(top_fraction(frame, "aesthetic", 0.3))


# --- sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_a_sample_does_not_depend_on_partitions(parts: int) -> None:
    frame = table()
    for options in ({"n": 100}, {"fraction": 0.1}, {"n": 7, "by": "cluster"}, {"n": 7, "by": "caption"}):
        once = keys(sample(frame, seed=4, **options))
        assert len(once) == len(set(once))
        for seed in (None, 1):
            assert keys(sample(split(frame, parts, seed), seed=4, **options)) == once


def test_a_sample_has_as_many_rows_as_were_asked_for() -> None:
    frame = table(901)
    assert [len(sample(frame, n)) for n in (0, 1, 900, 901, 5000)] == [0, 1, 900, 901, 901]
    assert [len(sample(frame, fraction=f)) for f in (0, 0.1, 0.999, 1)] == [0, 90, 900, 901]
    assert len(sample(frame, 50, where="score > 0.9")) == 50
    assert sample(frame, 50, where="score > 0.9")["score"].min() > 0.9


def test_each_group_gives_its_share() -> None:
    frame = table().assign(group=lambda f: f["cluster"].astype("Int64").where(f["cluster"] != 3))
    for column in ("cluster", "group", "caption"):
        kept = sample(split(frame, 6, 2), 80, by=column).compute()
        assert kept.groupby(column).size().to_dict() == frame.groupby(column).size().clip(upper=80).to_dict()
    assert kept["caption"].value_counts()[""] == 80
    assert len(sample(frame, 0, by="cluster")) == 0
    assert len(sample(frame.assign(g=np.nan), 5, by="g")) == 0


def test_a_larger_sample_contains_the_smaller() -> None:
    frame = table()
    small, large = set(keys(sample(frame, 50))), set(keys(sample(frame, 60)))
    assert small < large
    more = pd.concat([frame, table(500, 9).assign(shard="new.tar")])
    assert set(keys(sample(more, 60))) & set(keys(frame)) <= large


def test_a_sample_is_as_random_as_chance() -> None:
    n, draws, k = 300, 400, 60
    frame = named(np.zeros(n))
    chosen = np.zeros(n)
    together = 0
    for seed in range(draws):
        kept = sample(frame, k, seed=seed).index
        chosen[kept] += 1
        together += len({0, 1} & set(kept)) == 2
    # Each row is in a share k/n of the samples: a chi-squared value of 299 degrees of freedom, scaled.
    p = k / n
    statistic = ((chosen - draws * p) ** 2 / (draws * p * (1 - p))).sum()
    assert abs(statistic - n) < 6 * math.sqrt(2 * n)
    pair = p * (k - 1) / (n - 1)
    assert abs(together - draws * pair) < 6 * math.sqrt(draws * pair)


def test_seeds_differ_also_where_they_are_large() -> None:
    frame = table()
    samples = {seed: tuple(keys(sample(frame, 20, seed=seed))) for seed in (0, 1, -1, 2**64, 2**64 + 1, np.int64(7))}
    assert len(set(samples.values())) == len(samples)
    assert samples[7] == tuple(keys(sample(frame, 20, seed=7)))


def test_a_sample_does_not_depend_on_how_text_is_stored() -> None:
    frame = table()
    arrow = frame.assign(**{c: frame[c].astype(pd.ArrowDtype(pa.large_string())) for c in ("shard", "key")})
    objects = frame.assign(**{c: frame[c].astype(object) for c in ("shard", "key")})
    assert keys(sample(frame, 30)) == keys(sample(arrow, 30)) == keys(sample(objects, 30))


# --- steps and funnel -----------------------------------------------------------------------------


def by_hand(frame: pd.DataFrame) -> pd.DataFrame:
    left = frame[(frame["status"] == "ok") & (frame["aesthetic"] >= 4.5)]
    return left.sort_values("big").iloc[-int(Fraction("0.4") * len(left)) :]


STEPS = ["where aesthetic >= 4.5", "top 40% by unique"]


def unique(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(unique=np.random.default_rng(8).permutation(len(frame)))


@pytest.mark.parametrize("parts", [0, 3])
def test_steps_work_on_what_those_before_them_left(parts: int) -> None:
    frame = unique(table())
    df: Any = split(frame, parts) if parts else frame
    ok = frame[(frame["status"] == "ok") & (frame["aesthetic"] >= 4.5)]
    best = ok.nlargest(int(Fraction("0.4") * len(ok)), "unique")
    assert keys(apply_steps(df, STEPS)) == keys(best)
    assert keys(apply_steps(df, "top 40% by unique among aesthetic >= 4.5")) == keys(best)
    assert keys(apply_steps(df, [*STEPS, "sample 20 seed 3"])) == keys(sample(best, 20, seed=3))
    assert keys(apply_steps(df, [*STEPS, "sample 2 by cluster"])) == keys(sample(best, 2, by="cluster"))
    assert keys(apply_steps(df, [RandomSample(20), Top("unique", n=3)])) == keys(
        sample(frame[frame["status"] == "ok"], 20).nlargest(3, "unique")
    )
    assert len(keys(apply_steps(df, Top("unique", 1), ok_only=False))) == len(frame)
    assert keys(apply_steps(df, [])) == keys(frame[frame["status"] == "ok"])


def test_settled_steps_travel_and_work_on_any_partition() -> None:
    frame = table()
    settled = settle(frame, ["top 30% by score", "sample 5 by cluster", "width > 64"]).settled
    settled = pickle.loads(pickle.dumps(settled))
    assert settled.columns == ["status", "score", "shard", "sample_offset", "cluster", "width"]
    pieces = [settled.filter(frame.iloc[i : i + 100]) for i in range(0, len(frame), 100)]
    pd.testing.assert_frame_equal(pd.concat(pieces), settled.filter(frame))
    assert len(settled.filter(frame)) > 20


@pytest.mark.parametrize("parts", [0, 1, 5])
def test_the_funnel_counts_what_each_condition_removes(parts: int) -> None:
    frame = unique(table())
    ok, good = frame["status"] == "ok", frame["aesthetic"] >= 4.5
    wide = (frame["width"] >= 200).fillna(False).astype(bool)
    left = ok & good & wide
    n = int(Fraction("0.3") * left.sum())
    df: Any = split(frame, parts, 4) if parts else frame
    found = funnel(df, ["aesthetic >= 4.5 and width >= 200", "top 30% by unique", "sample 10"])
    assert found["condition"].tolist() == [
        *("all rows", "status == 'ok'", "aesthetic >= 4.5", "width >= 200", "top 30% by unique", "sample 10 seed 0")
    ]
    alone = [900, ok.sum(), (ok & good).sum(), (ok & wide).sum(), int(Fraction("0.3") * ok.sum()), 10]
    assert found["alone"].tolist() == alone
    assert found["left"].tolist() == [900, ok.sum(), (ok & good).sum(), left.sum(), n, 10]
    assert found["removed"].tolist() == [0, *(-np.diff(found["left"])).tolist()]
    assert found["removed_alone"].tolist() == [0, 900 - ok.sum(), *(ok.sum() - np.array(alone[2:])).tolist()]


def test_the_funnel_without_steps_or_status() -> None:
    assert funnel(table()[["score"]], [])["left"].tolist() == [900]
    assert funnel(table()[["score"]], "score > 0.5", ok_only=False)["condition"].tolist() == ["all rows", "score > 0.5"]


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("top 30% by clip_score", Top("clip_score", Fraction(3, 10))),
        ("TOP 12.5 %  BY clip_score", Top("clip_score", Fraction(1, 8))),
        ("top 1_000 by `my score` ties include", Top("my score", n=1000, ties="include")),
        ("bottom 5:nsfw_score", Top("nsfw_score", n=5, largest=False)),
        (
            "top 1 by a ties EXCLUDE among b >= 2 or c is null",
            Top("a", n=1, ties="exclude", among="b >= 2 or c is null"),
        ),
        ("sample 10000", RandomSample(10_000)),
        ("sample 0.1% seed -7", RandomSample(fraction=Fraction(1, 1000), seed=-7)),
        ("sample 100 per cluster seed 2", RandomSample(100, seed=2, by="cluster")),
        ("where a > 1", parse_where("a > 1")),
        ("a > 1", parse_where("a > 1")),
        ("top > 1 and sample is null", parse_where("top > 1 and sample is null")),
        ("topic == 'x'", parse_where("topic == 'x'")),
    ],
)
def test_steps_are_read(text: str, step: Any) -> None:
    assert parse_step(text) == step
    assert parse_step(step.text) == step


def test_flags_leave_out_the_first_word() -> None:
    assert parse_top("30%:clip_score") == parse_step("top 30% by clip_score")
    assert parse_top("3 by x", largest=False) == Top("x", n=3, largest=False)
    assert parse_sample("50 by cluster") == RandomSample(50, by="cluster")


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("top", "", "expected a number of rows or a percentage, as in `top 30% by clip_score`"),
        ("top ten by x", "ten", "expected a number of rows or a percentage"),
        ("top 0.3 by x", "0.3", "0.3 is not a number of rows; 30% is that share"),
        ("top 130% by x", "130%", "130% is more than all rows"),
        ("bottom 30% of x", "of", "expected `by` and a column, as in `bottom 30% by clip_score`"),
        ("top 30% by 7", "7", "expected a column"),
        ("top 30% by x ties first", "first", "after `ties` comes one of exact, include, exclude"),
        ("top 30% by x please", "please", "this cannot stand here; expected `ties`, `among` or nothing more"),
        ("top 30% by x among", "", "the expression is empty"),
        ("sample -5", "-5", None),
        ("sample 5 seed x", "x", "after `seed` comes a whole number"),
        ("sample 5% by x", "x", "of each group a number of rows is taken"),
        ("sample 5 where x", "where", "this cannot stand here; expected `seed`, `by` or nothing more"),
        ("where", "", "the expression is empty"),
        ("a >", ">", "expected a value after `>`"),
    ],
)
def test_mistakes_are_shown_where_they_stand(text: str, place: str, message: str | None) -> None:
    with pytest.raises(WhereError) as caught:
        parse_step(text)
    error = caught.value
    if message is not None:
        assert message in error.message
        assert error.text[error.start : error.end].strip() == place


def test_a_step_must_be_one() -> None:
    with pytest.raises(TypeError, match="not int: 3"):
        apply_steps(table(), [3])  # type: ignore[list-item]


# --- files and clusters ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score files whose embeddings cannot be read: their pages are overwritten."""
    path = tmp_path_factory.mktemp("scores")
    frame = table()
    for i in range(6):
        part = frame.iloc[i * 150 : (i + 1) * 150]
        vectors = pa.array(np.random.default_rng(i).random((150, 8), "f4").tolist(), pa.list_(pa.float32()))
        arrow = get_backend("pandas").to_arrow(part).append_column("embedding", vectors)
        file = path / f"{i}.parquet"
        pq.write_table(arrow, file, compression="zstd")
        chunk = pq.ParquetFile(file).metadata.row_group(0).column(arrow.num_columns - 1)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        with file.open("r+b") as f:
            f.seek(start)
            f.write(b"\xff" * chunk.total_compressed_size)
    return path


def test_columns_that_are_not_needed_are_not_read(folder: Path) -> None:
    df = read_scores(folder)
    with pytest.raises(OSError):
        pq.read_table(folder / "0.parquet")
    assert df["key"].count().compute() == 900
    frame = table()
    kept = apply_steps(df, ["aesthetic >= 4.5", "top 30% by score", "sample 5 by cluster"])
    expected = apply_steps(frame, ["aesthetic >= 4.5", "top 30% by score", "sample 5 by cluster"])
    assert keys(kept[["shard", "key"]]) == keys(expected)
    assert quantile(df, "score", 0.5) == quantile(frame, "score", 0.5)
    assert funnel(df, STEPS[0])["left"].tolist() == funnel(frame, STEPS[0])["left"].tolist()


def test_threads_and_a_cluster_come_to_the_same(folder: Path) -> None:
    from distributed import Client, LocalCluster

    df, frame = read_scores(folder), table()
    steps = ["aesthetic >= 4.5", "top 50% by score", "top 200 by width", "sample 9 by cluster seed 2", "sample 60"]
    expected = keys(apply_steps(frame, steps))
    assert len(expected) == 60
    with dask.config.set(scheduler="threads"):
        assert keys(apply_steps(df, steps)[["shard", "key"]]) == expected
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
        dask.config.set(scheduler="distributed"),
    ):
        assert keys(apply_steps(df, steps)[["shard", "key"]]) == expected


@pytest.mark.gpu
def test_a_gpu_comes_to_the_same() -> None:
    frame = table()
    steps = ["aesthetic >= 4.5", "top 50% by score", "top 200 by width", "sample 9 by cluster seed 2", "sample 60"]
    on_gpu = get_backend("cudf").from_arrow(get_backend("pandas").to_arrow(frame))
    kept = apply_steps(on_gpu, steps)
    assert keys(get_backend("cudf").to_arrow(kept).to_pandas()) == keys(apply_steps(frame, steps))
    assert quantile(on_gpu, "score", 0.3) == quantile(frame, "score", 0.3)
