"""Pages of pictures: the rows and order of a plain pandas sort, each picture that of its row."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import cards, make_rows, read

import dask_imgcurator as dic
from dask_imgcurator.schema import arrow_schema
from dask_imgcurator.select.ranks import SelectionError
from dask_imgcurator.select.syntax import WhereError

HOSTILE = '"><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\u202egnp.exe\x1b[2J'


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """63 shuffled rows with ties, nulls and NaN in their scores."""
    frame = make_rows(tmp_path_factory.mktemp("shards"))
    rng = np.random.default_rng(3)
    score = rng.integers(0, 9, len(frame)).astype("float32") / 2  # ties
    score[rng.random(len(frame)) < 0.15] = np.nan
    score[[5, 6]] = -np.inf, np.inf
    frame["aesthetic_score"] = pd.array(score, dtype=pd.ArrowDtype(pa.float32()))
    frame.loc[[1, 30], "aesthetic_score"] = pd.NA
    frame["blur"] = rng.random(len(frame)).astype("float32")
    frame["width"] = pd.array(rng.integers(0, 3, len(frame)), dtype="Int32")
    frame.loc[[2, 40], "width"] = pd.NA
    frame["kind"] = np.where(rng.random(len(frame)) < 0.5, "a", "b")
    frame["embedding"] = [np.ones(4, "float32")] * len(frame)
    return frame.sample(frac=1, random_state=0, ignore_index=True)


def frames(rows: pd.DataFrame) -> list[Any]:
    """The same rows as one frame, and in partitions of several sizes, one of them empty."""
    parts = [rows.iloc[:0], rows.iloc[:5], rows.iloc[5:6], rows.iloc[6:40], rows.iloc[40:]]
    return [
        rows,
        dd.from_pandas(rows, npartitions=1, sort=False),
        dd.from_map(lambda part: part, parts, meta=rows.iloc[:0], enforce_metadata=False),
    ]


def sorted_keys(rows: pd.DataFrame, column: str, ascending: bool) -> list[str]:
    """By pandas; a stable sort that puts what has no value last."""
    values = rows[column].astype("float64").where(rows[column].notna(), np.nan).to_numpy("float64")
    order = pd.Series(values).sort_values(ascending=ascending, kind="stable", na_position="last").index
    return rows["key"].iloc[order].tolist()


def shown(gallery: Any) -> list[str]:
    return [row["key"] for row in gallery.rows]


@pytest.mark.parametrize("form", [0, 1, 2], ids=["pandas", "one partition", "partitions"])
@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("column", ["aesthetic_score", "width", "blur"])
def test_pages_are_those_of_a_pandas_sort(rows: pd.DataFrame, form: int, ascending: bool, column: str) -> None:
    expected = sorted_keys(rows, column, ascending)
    gallery = dic.show(frames(rows)[form], n=5, sort_by=column, ascending=ascending)
    found = []
    for number in range(13):
        assert (gallery.number, gallery.total) == (number, 63)
        found += shown(gallery)
        gallery = gallery.next()
    assert found == expected
    assert gallery.number == 12  # after the last page comes the last
    assert shown(gallery) == expected[60:]
    assert shown(gallery.page(3).previous()) == expected[10:15]
    assert shown(gallery.page(0).previous()) == expected[:5]
    assert shown(dic.show(frames(rows)[form], n=7, sort_by=column, ascending=ascending, page=8)) == expected[56:63]


def test_the_best_come_first(rows: pd.DataFrame) -> None:
    assert shown(dic.show(rows, sort_by="aesthetic_score")) == sorted_keys(rows, "aesthetic_score", False)[:24]
    assert shown(dic.show(rows, sort_by="blur")) == sorted_keys(rows, "blur", True)[:24]
    assert "lowest first" in dic.show(rows, sort_by="blur")._repr_html_()


@pytest.mark.parametrize("form", [0, 1, 2], ids=["pandas", "one partition", "partitions"])
def test_without_a_sort_the_order_of_the_table(rows: pd.DataFrame, form: int) -> None:
    gallery = dic.show(frames(rows)[form], n=10)
    found = shown(gallery)
    while len(found) < 63:
        gallery = gallery.next()
        found += shown(gallery)
    assert found == rows["key"].tolist()
    assert gallery.next().number == gallery.number == 6
    assert gallery.next().total == 63


def test_partitions_are_read_as_far_as_needed_and_once(rows: pd.DataFrame) -> None:
    read_ones: list[int] = []

    def part(i: int) -> pd.DataFrame:
        read_ones.append(i)
        return rows.iloc[21 * i : 21 * (i + 1)]

    def lazy() -> Any:
        return dd.from_map(part, [0, 1, 2], meta=rows.iloc[:0], enforce_metadata=False)

    import dask

    with dask.config.set(scheduler="synchronous"):
        gallery = dic.show(lazy(), n=6)
        assert (read_ones, gallery.total) == ([0], None)
        gallery.page(4).next().previous()
        assert sorted(read_ones) == [0, 1]
        read_ones.clear()
        by_score = dic.show(lazy(), n=6, sort_by="blur")
        by_score.next().next().previous()._repr_html_()
        assert sorted(read_ones) == [0, 1, 2]


def test_each_picture_is_that_of_its_row(rows: pd.DataFrame) -> None:
    for frame in frames(rows):
        found = cards(dic.show(frame, n=40, sort_by="blur", columns=["aesthetic_score", "kind"])._repr_html_())
        assert [card.key for card in found] == sorted_keys(rows, "blur", True)[:40]
        by_key = rows.set_index("key")
        for card in found:
            row = by_key.loc[card.key]
            assert card.is_of(int(card.key)), card.key
            assert not card.is_of(int(card.key) ^ 3)  # one can tell
            assert card.names == ["blur", "aesthetic", "kind"]
            assert float(card.values[0]) == pytest.approx(row["blur"], rel=1e-3)
            missing = pd.isna(row["aesthetic_score"]) or not np.isfinite(row["aesthetic_score"])
            assert card.values[1] == "none" if missing else float(card.values[1]) == row["aesthetic_score"]
            assert card.values[2] == row["kind"]


def test_where(rows: pd.DataFrame) -> None:
    expected = [key for key in sorted_keys(rows, "blur", True) if key in set(rows["key"][rows["kind"] == "a"])]
    for frame in frames(rows):
        gallery = dic.show(frame, n=50, sort_by="blur", where="kind == 'a'")
        assert shown(gallery) == expected
        assert gallery.total == len(expected)


def test_embeddings_are_not_read(rows: pd.DataFrame, tmp_path: Path) -> None:
    """Their bytes in the file are spoilt: whoever reads them fails."""
    schema = arrow_schema(["key", "shard", "offset", "nbytes", "aesthetic_score", "embedding"])
    table = pa.Table.from_pandas(rows[schema.names], schema, preserve_index=False)
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    (chunk,) = (
        c
        for i in range(6)
        for c in [pq.read_metadata(path).row_group(0).column(i)]
        if c.path_in_schema.startswith("embedding")
    )
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    scores = dic.read_scores(path, backend="pandas")
    with pytest.raises(OSError):
        scores["embedding"].compute()
    assert shown(dic.show(scores, n=9, sort_by="aesthetic_score")) == sorted_keys(rows, "aesthetic_score", False)[:9]
    assert shown(dic.show(scores, n=9)) == rows["key"].tolist()[:9]


def test_what_strangers_wrote_stays_text(rows: pd.DataFrame) -> None:
    bad = rows.assign(caption=HOSTILE, kind=HOSTILE, license=HOSTILE, error_message=HOSTILE, nsfw_score=0.9)
    bad["key"] = HOSTILE
    bad.loc[3, "nbytes"] = 7  # no picture: its message is shown
    gallery = dic.show(bad, n=6, columns=["kind"])
    found = read(gallery._repr_html_())
    assert len(found.cards) == 6
    assert all("<script>alert(1)" in card.text and "\u202e" not in card.text for card in found.cards)
    assert all(str(card.source).startswith("data:image/webp;base64,") for card in found.cards if card.source)
    assert "\x1b" not in repr(gallery) and "\u202e" not in repr(gallery)


def test_nsfw_pictures_are_veiled(rows: pd.DataFrame) -> None:
    scores = pd.array([0.0, 0.49, 0.5, 0.9, None, float("nan")], dtype=pd.ArrowDtype(pa.float32()))
    found = cards(dic.show(rows.head(6).assign(nsfw_score=scores), n=6)._repr_html_())
    assert [card.veiled for card in found] == [False, False, True, True, True, True]
    # Untrusted, a notebook drops the styles: then such a picture is one pixel.
    assert [card.attributes.get("width") for card in found] == [None, None, "1", "1", "1", "1"]
    html = dic.show(rows.head(6).assign(nsfw_score=scores), n=6)._repr_html_()
    assert re.search(r"\.veil input:not\(:checked\) \+ img \{ filter: blur", html)
    assert not any(card.veiled for card in cards(dic.show(rows.head(6))._repr_html_()))


def test_rows_without_a_picture_say_why(rows: pd.DataFrame, tmp_path: Path) -> None:
    few = rows.head(4).assign(status="ok", error_message=None)
    few.loc[1, ["status", "error_message", "nbytes"]] = ["no_image", "the sample has no image", 0]
    few.loc[2, "shard"] = str(tmp_path / "gone.tar")
    found = read(dic.show(few)._repr_html_())
    assert [card.source is None for card in found.cards] == [False, True, True, False]
    assert "the sample has no image" in found.cards[1].text
    assert "cannot be read or decoded" in found.cards[2].text
    assert "2 rows without a picture" in found.text


def test_styles_stay_within_the_fragment(rows: pd.DataFrame) -> None:
    """Every rule stands inside the block of one class."""
    (style,) = re.findall(r"<style>(.*?)</style>", dic.show(rows, n=1)._repr_html_(), re.S)
    depth, outside = 0, ""
    for character in style:
        depth += (character == "{") - (character == "}")
        outside += character if depth == 0 else ""
    assert depth == 0
    assert outside.replace("}", "").split() == [".imgcurator"]
    assert "@import" not in style and "url(" not in style


def test_text_elsewhere(rows: pd.DataFrame) -> None:
    lines = repr(dic.show(rows, n=3, sort_by="blur")).splitlines()
    assert lines[0] == "rows 1 to 3 of 63, page 0 (last: 20), by blur, lowest first"
    assert [line.split()[0] for line in lines[2:]] == sorted_keys(rows, "blur", True)[:3]
    assert repr(dic.show(rows.iloc[:0])) == "no rows"
    assert "no rows" in dic.show(dd.from_pandas(rows.iloc[:0], npartitions=1), sort_by="blur")._repr_html_()


def test_mistakes(rows: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="show needs the column offset"):
        dic.show(rows.drop(columns="offset"))
    with pytest.raises(ValueError, match="n=0"):
        dic.show(rows, n=0)
    with pytest.raises(ValueError, match="show needs the column beauty"):
        dic.show(rows, sort_by="beauty")
    with pytest.raises(SelectionError, match="'kind' holds"):
        dic.show(rows, sort_by="kind")
    with pytest.raises(ValueError, match="'embedding' holds vectors"):
        dic.show(rows, columns=["embedding"])
    with pytest.raises(ValueError, match="page=3: no such page, the last one is 2"):
        dic.show(rows, n=24, page=3)
    with pytest.raises(ValueError, match="page=-1: no such page"):
        dic.show(rows).page(-1)
    with pytest.raises(WhereError):
        dic.show(rows, where="beauty > 1")


def test_pager(rows: pd.DataFrame) -> None:
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed (the extra notebook)")
    expected = sorted_keys(rows, "blur", True)
    box = dic.show(frames(rows)[2], n=25, sort_by="blur").pager()
    (back, on), content = box.children[0].children, box.children[1]

    def keys() -> list[str]:
        return [card.key for card in cards(content.value)]

    assert (keys(), back.disabled, on.disabled) == (expected[:25], True, False)
    on.click()
    assert (keys(), back.disabled, on.disabled) == (expected[25:50], False, False)
    on.click()
    assert (keys(), back.disabled, on.disabled) == (expected[50:], False, True)
    back.click()
    assert keys() == expected[25:50]


def test_without_ipywidgets(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dask-imgcurator\[notebook\]"'):
        dic.show(rows).pager()
    assert len(cards(dic.show(rows)._repr_html_())) == 24
