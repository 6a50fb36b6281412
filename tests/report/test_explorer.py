"""The threshold explorer: its counts against NumPy's and the table's own filter, its pictures against a sort."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pictures import make_rows, read

import dask_imgcurator as dic
from dask_imgcurator.report.explorer import spread
from dask_imgcurator.select.ranks import SelectionError

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed (the extra notebook)")

RNG = np.random.default_rng(11)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """63 shuffled rows; scores with ties, null and NaN."""
    frame = make_rows(tmp_path_factory.mktemp("shards"))
    score = RNG.normal(5, 1, len(frame)).astype("float32")
    score[:20] = score[20:40]  # ties
    score[[3, 40]] = np.nan
    frame["aesthetic_score"] = pd.array(score, dtype=pd.ArrowDtype(pa.float32()))
    frame.loc[[7, 50], "aesthetic_score"] = pd.NA
    frame["nsfw_score"] = RNG.random(len(frame)).astype("float32") ** 4
    frame["width"] = pd.array(RNG.integers(100, 1000, len(frame)), dtype="Int32")
    frame["my score"] = RNG.normal(0, 1e-6, len(frame))
    return frame.sample(frac=1, random_state=0, ignore_index=True)


def partitioned(rows: pd.DataFrame) -> Any:
    parts = [rows.iloc[:0], rows.iloc[:5], rows.iloc[5:6], rows.iloc[6:40], rows.iloc[40:]]
    return dd.from_map(lambda part: part, parts, meta=rows.iloc[:0], enforce_metadata=False)


def numbers(column: Any) -> np.ndarray:
    return column.astype("float64").where(column.notna(), np.nan).to_numpy("float64")


COLUMNS = ["aesthetic_score", "nsfw_score", "width", "my score"]


@pytest.mark.parametrize("dask_", [False, True], ids=["pandas", "dask"])
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("keep", [">=", "<"])
def test_counts_are_numpys_and_the_filters(rows: pd.DataFrame, dask_: bool, column: str, keep: Any) -> None:
    cut = dic.explore(partitioned(rows) if dask_ else rows, column, keep=keep, n=1)
    values = numbers(rows[column])
    single = rows[column].dtype in ("float32", pd.ArrowDtype(pa.float32()))
    chosen = RNG.uniform(np.nanmin(values), np.nanmax(values), 25)
    there = RNG.choice(values[~np.isnan(values)], 5)
    for value in [*chosen.tolist(), *chosen.round(2).tolist(), *there.tolist(), -1e9, 1e9, 0]:
        cut.value = value
        bound = float(np.float32(value)) if single else value
        expected = int((values >= bound).sum() if keep == ">=" else (values < bound).sum())
        assert (cut.value, cut.kept) == (value, expected)
        assert len(dic.filter_frame(rows, cut.where)) == expected
        assert repr(cut) == f"{cut.where} keeps {expected:,} of 63 rows"
    assert cut.spread.missing == np.isnan(values).sum()
    assert cut.spread.exact


def test_which_side_is_kept(rows: pd.DataFrame) -> None:
    assert dic.explore(rows, "nsfw_score").where == "nsfw_score < 0.5"
    assert dic.explore(rows, threshold=5).where == "aesthetic_score >= 5"
    assert dic.explore(rows, threshold=5.25, keep="<").where == "aesthetic_score < 5.25"
    assert dic.explore(rows, "my score", 1e-7).where == "`my score` >= 1e-07"
    median = np.nanmedian(numbers(rows["aesthetic_score"]))
    start = dic.explore(rows)
    assert abs(start.value - median) < 0.1
    assert 20 < start.kept < 40


@pytest.mark.parametrize("keep", [">=", "<"])
def test_pictures_are_the_nearest_on_each_side(rows: pd.DataFrame, keep: Any) -> None:
    values = numbers(rows["nsfw_score"])
    order = np.argsort(values, kind="stable")
    order = order[~np.isnan(values[order])]
    keys = rows["key"].to_numpy()
    cut = dic.explore(partitioned(rows), "nsfw_score", keep=keep, n=4)
    for value in [0.001, 0.1, 0.5, 0.9, 2.0, -1.0]:
        cut.value = value
        at = int(np.searchsorted(values[order], float(np.float32(value))))
        low, high = keys[order[max(0, at - 4) : at][::-1]].tolist(), keys[order[at : at + 4]].tolist()
        html = cut._walls.value
        assert html.index("Just kept") < html.index("Just dropped")
        shown = [card for card in read(html).cards if card.key]
        assert [card.key for card in shown] == (high + low if keep == ">=" else low + high)
        for card in shown:
            assert card.is_of(int(card.key))
            assert card.veiled == (values[keys.tolist().index(card.key)] >= 0.5)


def test_controls_move_together(rows: pd.DataFrame) -> None:
    cut = dic.explore(rows, "aesthetic_score", n=2)
    _, slider, number, _ = cut.widget.children
    values = numbers(rows["aesthetic_score"])
    for place in [0.0, 0.13, 0.5, 0.77, 1.0]:
        slider.value = place
        assert number.value == cut.value
        assert cut.kept == (values >= float(np.float32(cut.value))).sum()
        assert f"<b>{cut.kept:,}</b> of 63 rows" in cut._words.value
    assert cut.kept == 0  # at the right end
    slider.value = 0.0
    assert cut.kept == (~np.isnan(values)).sum()
    number.value = 5.125
    assert (cut.value, cut.where) == (5.125, "aesthetic_score >= 5.125")
    low, high = cut._axis.low, cut._axis.high
    assert slider.value == pytest.approx((5.125 - low) / (high - low))
    assert low < np.nanmin(values) and high > np.nanmax(values)
    assert read(cut._words.value).tags >= {"svg", "rect"}


def test_the_histogram_counts_and_colours(rows: pd.DataFrame) -> None:
    """Areas of the bars are in proportion to the rows, those of the kept ones in the kept colour."""
    cut = dic.explore(rows, "width", 500, n=1)
    shapes = re.findall(
        r'<rect class="(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', cut._words.value
    )
    split = {kind: {float(x) for k, x, *_ in shapes if k == kind} for kind in ("in", "out")}
    assert max(split["out"]) < min(split["in"])
    heights = cut._bars
    assert heights.sum() == 63
    x = np.log10(numbers(rows["width"]))
    edges = np.linspace(cut._axis.low, cut._axis.high, len(heights) + 1)
    assert heights.tolist() == np.histogram(x, edges)[0].tolist()


def test_the_table_is_read_once(rows: pd.DataFrame) -> None:
    reads: list[int] = []

    def part(i: int) -> pd.DataFrame:
        reads.append(i)
        return rows.iloc[21 * i : 21 * (i + 1)]

    with dask.config.set(scheduler="synchronous"):
        cut = dic.explore(dd.from_map(part, [0, 1, 2], meta=rows.iloc[:0], enforce_metadata=False))
        for value in [4.0, 5.0, 6.0]:
            cut.value = value
    assert sorted(reads) == [0, 1, 2]


def test_thumbnails_are_made_once(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    from dask_imgcurator.report import gallery

    made: list[Any] = []
    original = gallery.make_thumbnails

    def counting(new: Any, **options: Any) -> Any:
        made.extend(row["key"] for row in new)
        return original(new, **options)

    monkeypatch.setattr(gallery, "make_thumbnails", counting)
    cut = dic.explore(rows, n=3)
    assert len(made) == 6
    for value in [4.0, 5.0, 4.0, 5.0]:
        cut.value = value
    assert len(made) == len(set(made))


def test_pictures_wait_until_the_slider_rests(rows: pd.DataFrame) -> None:
    """In a running loop, as a kernel's, counts come at once and pictures a little later, for the last value only."""

    async def drag() -> tuple[list[int], list[str], list[str]]:
        cut = dic.explore(rows, n=2)
        before, counts = cut._walls.value, []
        drawn: list[str] = []
        cut._walls.observe(lambda change: drawn.append(change["new"]), "value")
        for value in [4.0, 4.5, 5.5, 6.0]:
            cut.value = value
            counts.append(cut.kept)
        assert cut._walls.value == before
        for _ in range(100):
            await asyncio.sleep(0.05)
            if drawn:
                break
        await asyncio.sleep(0.5)
        return counts, drawn, [card.key for card in read(cut._walls.value).cards]

    counts, drawn, keys = asyncio.run(drag())
    values = numbers(rows["aesthetic_score"])
    assert counts == [(values >= v).sum() for v in (4.0, 4.5, 5.5, 6.0)]
    assert len(drawn) == 1
    assert keys == [card.key for card in read(dic.explore(rows, threshold=6.0, n=2)._walls.value).cards]


@pytest.mark.parametrize("most", [2000, 300, 60])
def test_many_values_are_counted_within_bounds(most: int) -> None:
    """Beyond a number of values, a count is wrong by those that share the threshold's first bits, at most."""
    x = np.r_[RNG.normal(5, 1, 3000), -RNG.random(1000), np.zeros(7), np.nan].astype("float64")
    RNG.shuffle(x)
    parts = [x[:100], x[100:2500], x[2500:]]
    df = dd.from_map(lambda v: pd.DataFrame({"s": v}), parts, meta=pd.DataFrame({"s": x[:0]}))
    found = spread(df, "s", values=most, rows=50)
    assert not found.exact and len(found.values) <= most
    assert (found.total, found.missing) == (4008, 1)
    assert (np.diff(found.values) > 0).all()
    worst = found.counts.max()
    assert worst < 40 * 4008 / most
    for value in RNG.uniform(-1, 8, 200):
        assert abs(found.below(value) - (x < value).sum()) <= worst
    exact = spread(df, "s", values=5000, rows=50)
    assert exact.exact
    assert all(exact.below(v) == (x < v).sum() for v in RNG.uniform(-1, 8, 200))


def test_rows_to_show_cover_the_whole_range() -> None:
    x = RNG.permutation(5000).astype("float64")
    df = dd.from_map(
        lambda v: pd.DataFrame({"s": v, "n": (v * 2).astype(int)}),
        [x[:100], x[100:2000], x[2000:]],
        meta=pd.DataFrame({"s": x[:0], "n": np.arange(0)}),
    )
    found = spread(df, "s", ["n"], rows=200)
    near = found.near
    assert len(near) == found.rows.num_rows == 200
    assert (near[0], near[-1]) == (0, 4999)
    assert np.diff(near).max() < 10 * 5000 / 200
    assert found.rows["n"].to_pylist() == (near * 2).astype(int).tolist()
    low, high = found.beside(2500, 3)
    assert [row["s"] for row in low] == near[near < 2500][::-1][:3].tolist()
    assert [row["s"] for row in high] == near[near >= 2500][:3].tolist()


def test_what_a_notebook_gets(rows: pd.DataFrame) -> None:
    cut = dic.explore(rows, threshold=5)
    bundle = cut._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == cut.widget.model_id
    assert bundle["text/plain"] == repr(cut)


def test_names_of_columns_stay_text(rows: pd.DataFrame) -> None:
    name = "<img src=x onerror=alert(1)>"
    cut = dic.explore(rows.rename(columns={"my score": name}), name, 0.0, n=2)
    assert "img" not in read(cut._words.value).tags
    assert name in read(cut._words.value).text
    assert all(card.names == [name] for card in read(cut._walls.value).cards)
    assert len(dic.filter_frame(rows.rename(columns={"my score": name}), cut.where)) == cut.kept


def test_mistakes(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelectionError, match="no column 'beauty'"):
        dic.explore(rows, "beauty")
    with pytest.raises(SelectionError, match="'key' holds"):
        dic.explore(rows, "key")
    with pytest.raises(ValueError, match="explore needs the column shard"):
        dic.explore(rows.drop(columns="shard"))
    with pytest.raises(ValueError, match="'nsfw_score' has no finite value in 2 rows"):
        dic.explore(rows.head(2).assign(nsfw_score=np.nan), "nsfw_score")
    with pytest.raises(ValueError, match="keep='>'"):
        dic.explore(rows, keep=">")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=0"):
        dic.explore(rows, n=0)
    with pytest.raises(ValueError, match="finite"):
        dic.explore(rows).value = float("nan")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'explore needs ipywidgets.*pip install "dask-imgcurator\[notebook\]"'
    ):
        dic.explore(rows)
