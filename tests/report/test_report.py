"""The report, read as a browser would: parsed, not matched as text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import HOSTILE, WHERE, Node, Run, colour, encode, make_run, make_tar, picture, read, write_run_report
from PIL import Image

from dask_imgcurator.report.histograms import KEPT, LINEAR, LOG, OTHER, OWN, PROBABILITY, Histogram
from dask_imgcurator.results import ConditionCount, RunResult


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


# --- what a stranger may write --------------------------------------------------------------------


def test_nothing_from_outside_and_one_script(run: Run):
    page = run.page(notes=[HOSTILE])
    every = [n for tag in ("iframe", "object", "link", "base", "form") for n in page.all(tag)]
    assert every == []
    for link in page.all("a"):  # of the contents
        assert page.all("h2", id=str(link.attrs.pop("href")).removeprefix("#"))
    policies = [m.attrs["content"] for m in page.all("meta", http_equiv="Content-Security-Policy")]
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert script.attrs == {} and len(policies) == 1
    assert str(policies[0]).startswith(f"default-src 'none'; script-src 'sha256-{digest}'; img-src data:;")

    def walk(node: Node) -> None:
        for name, value in node.attrs.items():
            assert not name.startswith("on"), f"{name} in <{node.tag}>"
            if name in ("src", "href", "srcset", "poster", "data", "action"):
                assert str(value).startswith("data:image/webp;base64,")
            assert name != "style" or "url(" not in str(value)
        for child in node.children:
            if isinstance(child, Node):
                walk(child)

    walk(page)
    assert "url(" not in page.all("style")[0].text and "@import" not in page.all("style")[0].text


def test_hostile_text_is_shown_as_text(run: Run):
    page = run.page(notes=[HOSTILE])
    shown = HOSTILE.replace("\u202e", "\ufffd")  # the sign that turns what follows around is not passed on
    assert shown in page.all("p", class_="notice")[0].text
    best = page.wall("Best kept")[0]
    assert best.all("img")[0].attrs["alt"] == shown == best.all("img")[0].attrs["title"]
    assert best.all("code")[0].text == shown[:79] + "…"
    assert shown in {cell for row in page.table("decode_error: the first 5 of 14") for cell in row}
    assert "\u202e" not in page.text


def test_where_and_columns_are_escaped_too(run: Run, tmp_path: Path):
    for url in run.tables:
        table = pq.read_table(url)
        pq.write_table(table.append_column("<b>&_score", table["aesthetic_score"]), url)
    where = "`<b>&_score` >= 5 and caption != '<script>'"
    page = run.page(where, funnel=[ConditionCount(where, 1, 1)], kept=None)
    assert page.figure("<b>&_score").all("text", class_="cut")[0].text == "`<b>&_score` >= 5"
    assert len(page.all("script")) == 1 and page.all("b") == []


def test_secrets_of_urls_are_not_shown(run: Run):
    table = pq.read_table(run.tables[0])
    at = table.schema.get_field_index("shard")
    signed = "s3://ann:pa55@host/bucket/0.tar?X-Signature=deadbeef"
    table = table.set_column(at, "shard", pa.array([signed] * len(table)))
    failed = table.filter(pa.compute.not_equal(table["status"], "ok"))
    pq.write_table(failed, run.tables[0])
    text = Path(write_run_report(str(run.folder), run.tables[:1], None, run.result(), {})).read_text()
    assert "s3://host/bucket/0.tar" in text
    assert "pa55" not in text and "deadbeef" not in text


# --- the numbers ----------------------------------------------------------------------------------


def test_funnel_and_counts_are_those_given(run: Run):
    result = run.result()
    page = run.page()
    rows = {name: cells for name, *cells in page.table("What each condition leaves, in order")}
    assert rows["all samples"][1] == "64" and rows["readable"][1] == "50"
    before = 50
    for step in result.funnel:
        assert rows[step.condition][:3] == [str(step.alone), str(step.left), str(before - step.left)]
        before = step.left
    cards = {d.all("dt")[0].text: d.all("dd")[0].text.split()[0] for d in page.all("dl", class_="cards")[0].all("div")}
    assert cards == {
        "samples": "64",
        "readable": "50",
        "kept": str(result.kept),
        "dropped by the conditions": str(50 - result.kept),
        "failed": "14",
    }
    (funnel,) = (t for t in page.all("table") if t.all("caption")[0].text == "What each condition leaves, in order")
    widths = [span.attrs["style"] for bar in funnel.all("span", class_="bar") for span in bar.all("span")]
    assert widths[-1] == f"width:{100 * result.kept / 64:.2f}%"


@pytest.mark.parametrize("name", ["aesthetic_score", "nsfw_score", "width", "height"])
def test_histogram_counts_every_finite_value(run: Run, name: str):
    figure = run.page().figure(name)
    with_value = [r for r in run.rows if r[name] is not None]
    kept = [r for r in run.kept if r[name] is not None]

    def total(kind: str) -> int:
        return sum(int(str(r.attrs["data_count"])) for r in figure.all("rect", class_=kind))

    assert total("in") == len(kept)
    assert total("own") + total("out") == len(with_value) - len(kept)
    assert sum(int(row[1]) for row in figure.table(f"Images by {name}")) == len(with_value)
    assert f"{64 - len(with_value)} without a value" in figure.text


def test_values_that_are_no_numbers_are_counted_as_missing(run: Run):
    table = pq.read_table(run.tables[0])
    at = table.schema.get_field_index("nsfw_score")
    odd = pa.array([float("nan"), float("inf"), -float("inf"), *[0.25] * 29], pa.float32())
    pq.write_table(table.set_column(at, "nsfw_score", odd), run.tables[0])
    figure = read(write_run_report(str(run.folder), run.tables[:1], None, run.result(), {})).figure("nsfw_score")
    assert sum(int(row[1]) for row in figure.table("Images by nsfw_score")) == 29
    assert "3 without a value" in figure.text


def test_cut_is_marked_at_its_place(run: Run):
    figure = run.page("5 <= aesthetic_score and width >= 100").figure("aesthetic_score")
    (line,) = figure.all("path", class_="cut")
    at = float(str(line.attrs["d"])[1:].split()[0])
    assert figure.all("text", class_="cut")[0].text == "5 <= aesthetic_score"
    ticks = {
        float(t.text): float(str(t.attrs["x"])) for t in figure.all("text", text_anchor="middle") if t.text in "468"
    }
    (a, x_a), (b, x_b) = list(ticks.items())[:2]
    assert at == pytest.approx(x_a + (5 - a) * (x_b - x_a) / (b - a), abs=0.2)
    assert run.page("aesthetic_score >= 5 or width > 3").figure("aesthetic_score").all("path", class_="cut") == []


@pytest.mark.parametrize(("name", "below"), [("aesthetic_score", False), ("nsfw_score", True), ("width", False)])
def test_slider_and_table_say_what_another_cut_would_keep(run: Run, name: str, below: bool):
    figure = run.page().figure(name)
    (box,) = figure.all("div", class_="try")
    assert "hidden" in box.attrs  # until the script shows it
    ok = [r for r in run.rows if r[name] is not None]
    others = [r for r in ok if (name == "width" or r["width"] >= 100)]
    others = [r for r in others if name == "aesthetic_score" or (r["aesthetic_score"] or 0) >= 5]

    def kept(rows: list[dict], cut: float) -> int:
        # The axis of probabilities ends at 1e-10 and 1 - 1e-8.
        values = [min(max(r[name], 1e-10), 1 - 1e-8) if below else r[name] for r in rows]
        return sum(v < cut if below else v >= cut for v in values)

    tries = json.loads(str(box.attrs["data_tries"]))
    assert len(tries) > 5
    low, high = (f(r[name] for r in ok) for f in (min, max))
    for value, _, alone, both in tries:
        cut = float(value.replace(",", ""))
        near = abs(cut) * 2e-3 + 1e-12  # the cut is shown in few digits
        counts = [int(words.split()[at]) for words, at in ((alone, 0), (both, -1))]
        for rows, count in zip((ok, others), counts, strict=True):
            assert min(kept(rows, cut - near), kept(rows, cut + near)) <= count
            assert count <= max(kept(rows, cut - near), kept(rows, cut + near))
        assert alone.split()[2] == str(len(ok)) and low * 0.5 - 1 <= cut <= high * 1.1
    table = figure.table(f"Images by {name}")
    ends = table[-1] if below else table[0]
    assert ends[-2:] == [str(len(ok)), str(len(others))]  # the last cut, or the first, keeps all


def test_texts_that_repeat_are_counted(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dask_imgcurator.steps.score_table._BATCH", 32)
    monkeypatch.setattr("dask_imgcurator.report.survey._TEXTS", 20)
    kinds = ["cat", "dog", None]
    for at, url in enumerate(run.tables):
        table = pq.read_table(url)
        rows = run.rows[32 * at : 32 * at + 32]
        for i, row in enumerate(rows):
            row["kind"], row["name"] = kinds[i % 3], f"name {32 * at + i}"
        # Few texts in the first file, many in the second: not counted, and no mistake.
        late = ["one"] * 32 if at == 0 else [r["name"] for r in rows]
        for name, values in (("kind", [r["kind"] for r in rows]), ("name", [r["name"] for r in rows]), ("late", late)):
            table = table.append_column(name, pa.array(values, pa.string()))
        pq.write_table(table, url)
    page = run.page()
    ok = Counter(r["kind"] for r in run.rows if r["status"] == "ok")
    kept = Counter(r["kind"] for r in run.kept)
    shown = {name: cells[:2] for name, *cells in page.table("Images by kind")}
    assert shown == {(kind or "no value"): [str(n), str(kept[kind])] for kind, n in ok.items()}
    captions = [t.all("caption")[0].text for t in page.section("texts").all("table")]
    assert "Images by name" not in captions and "Images by late" not in captions
    status = Counter(r["status"] for r in run.rows)
    assert {r[0]: r[1] for r in page.table("Samples by status")} == {s: str(n) for s, n in status.items()}


def test_dropped_images_are_counted_once_by_what_they_fail(run: Run):
    where = "aesthetic_score >= 5 and width >= 100 and nsfw_score < 0.5"
    ok = [r for r in run.rows if r["status"] == "ok"]
    failed = Counter(
        (
            (r["aesthetic_score"] or 0) < 5,
            r["width"] < 100,
            not (r["nsfw_score"] is not None and r["nsfw_score"] < 0.5),
        )
        for r in ok
    )
    del failed[False, False, False]
    texts = where.split(" and ")
    expected = {
        ("only " if sum(fails) == 1 else "") + " and ".join(t for t, f in zip(texts, fails, strict=True) if f): str(n)
        for fails, n in failed.items()
    }
    rows = run.page(where, kept=None).section("selection")
    assert rows.tag == "missing"  # nothing was selected, so nothing is said of it
    kept = len(ok) - sum(failed.values())
    page = run.page(where, kept=kept)
    assert {r[0]: r[1] for r in page.table("What the dropped images fail: each is counted once")} == expected
    assert len(expected) >= 5


@pytest.mark.parametrize("scale", [LINEAR, LOG, PROBABILITY])
@pytest.mark.parametrize("first", [1, 100, 1000])
def test_histogram_in_batches_equals_numpy(scale, first: int):
    # The first batch is narrow, so that what follows lies outside of the first bins, on both sides.
    rng = np.random.default_rng(first)
    values = np.concatenate([rng.uniform(0.30, 0.31, first), rng.uniform(0.001, 0.999, 3000), [np.nan, np.inf]])
    values = values * 1000 if scale is LOG else values
    fates = rng.integers(0, 3, len(values))
    histogram = Histogram(scale)
    for part in (slice(0, first), slice(first, 2000), slice(2000, None)):
        histogram.add(values[part], fates[part])
    edges, bars = histogram.bars([])
    finite = np.isfinite(values)
    x = scale.forward(values[finite])
    assert 20 <= len(edges) - 1 <= 40
    for fate in (OTHER, OWN, KEPT):
        expected, _ = np.histogram(x[fates[finite] == fate], edges)
        assert bars[fate].tolist() == expected.tolist()
    assert bars.sum() == finite.sum() and histogram.missing == 2
    assert abs(scale.forward(histogram.median()) - np.median(x)) < (x.max() - x.min()) / 500


def test_one_value_only():
    histogram = Histogram(LINEAR)
    histogram.add(np.full(10, 5.0), np.full(10, KEPT))
    edges, bars = histogram.bars([4.0])
    assert edges[0] <= 4.0 and edges[-1] > 5.0 and bars.sum() == 10


# --- the pictures ---------------------------------------------------------------------------------


def test_each_picture_is_that_of_its_row(run: Run):
    page = run.page()
    by_key = {r["key"]: i for i, r in enumerate(run.rows)}
    cards = [card for card in page.section("pictures").all("li") if card.all("code")[0].text in by_key]
    assert len(cards) > 40
    for card in cards:
        key = card.all("code")[0].text
        image = picture(card.all("img")[0]).convert("RGB")
        middle = image.getpixel((image.width // 2, image.height // 2))
        assert np.abs(np.subtract(middle, colour(by_key[key]))).max() < 12, key
        row = run.rows[by_key[key]]
        assert card.all("img")[0].attrs["alt"] == row["caption"] or row["caption"] is None
        score = row["aesthetic_score"]
        assert card.all("dd")[0].text == ("none" if score is None else f"{score:.5g}")
        assert (card.all("span", class_="yes") != []) == (row in run.kept)


def test_walls_hold_the_right_rows(run: Run):
    page = run.page()
    scored = [r for r in run.rows if r["status"] == "ok" and r["aesthetic_score"] is not None]
    dropped = [r for r in run.rows if r["status"] == "ok" and r not in run.kept]

    def keys(rows: list[dict]) -> list[str]:
        return [r["key"] if r["key"] != HOSTILE else HOSTILE.replace("\u202e", "\ufffd")[:79] + "…" for r in rows[:12]]

    def shown(title: str) -> list[str]:
        return [card.all("code")[0].text for card in page.wall(title)]

    by_score = sorted(scored, key=lambda r: r["aesthetic_score"])
    assert shown("Worst") == keys(by_score)
    assert shown("Just kept by aesthetic_score >= 5") == keys([r for r in by_score if r in run.kept])[:6]
    below = [r for r in reversed(by_score) if r["aesthetic_score"] < 5 and r["width"] >= 100]
    assert shown("Just dropped by aesthetic_score >= 5") == keys(below)[:6] and len(below) > 3
    best = [r for r in reversed(by_score) if r in run.kept]
    assert shown("Best kept")[2:] == keys(best)[2:]  # the two hostile rows share a score
    assert set(shown("Random dropped")) <= set(keys_of(dropped)) and len(shown("Random dropped")) == 12
    assert shown("Random dropped") == [c.all("code")[0].text for c in run.page().wall("Random dropped")]
    assert shown("Random dropped") != keys(dropped)


def keys_of(rows: list[dict]) -> list[str]:
    return [r["key"] for r in rows]


def test_nsfw_pictures_are_behind_a_veil(run: Run):
    by_key = {r["key"]: r for r in run.rows}
    veiled = []
    for card in run.page().section("pictures").all("li"):
        row = by_key.get(card.all("code")[0].text)
        if row is not None:
            boxes = card.all("label", class_="veil")
            nsfw = row["nsfw_score"]
            assert bool(boxes) == (nsfw is None or nsfw >= 0.5)
            veiled += boxes
    assert veiled
    for label in veiled:
        # The style sheet's selector needs the picture right after its box.
        assert [c.tag for c in label.children if isinstance(c, Node)] == ["input", "img", "span"]
        assert label.children[0].attrs["type"] == "checkbox" and "checked" not in label.children[0].attrs
        assert label.children[0].attrs["aria_label"]


def test_pictures_that_cannot_be_made_are_counted(run: Run):
    with Path(run.rows[0]["shard"]).open("r+b") as file:  # the first shard becomes zeros
        file.write(bytes(Path(run.rows[0]["shard"]).stat().st_size))
    Path(run.rows[40]["shard"]).unlink()
    page = run.page()
    assert page.section("pictures").all("img") == []
    assert "12 left out: no thumbnail could be made" in page.section("pictures").text


def test_odd_pictures(tmp_path: Path):
    rng = np.random.default_rng(0)
    big = Image.fromarray(rng.integers(0, 255, (3000, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    clear = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    images = [
        encode(big, "JPEG", exif=exif, comment=b"secret-in-metadata"),
        encode(clear, "PNG"),
        encode(Image.new("CMYK", (30, 60), (0, 255, 255, 0)), "JPEG"),
        encode(Image.new("1", (1, 1), 1), "PNG"),
        encode(Image.new("P", (20, 20)), "GIF"),
    ]
    offsets = make_tar(tmp_path / "odd.tar", images)
    rows = [
        {"key": str(i), "shard": str(tmp_path / "odd.tar"), "offset": o, "nbytes": len(d), "status": "ok"}
        | {"aesthetic_score": 9.0 - i}
        for i, (o, d) in enumerate(zip(offsets, images, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "odd.parquet")
    for upright in (False, True):
        made = {"decode": {"adjust_orientation": upright}}
        result = RunResult(str(tmp_path), 5, {"ok": 5}, 5, provenance=made)
        page = read(write_run_report(str(tmp_path), [str(tmp_path / "odd.parquet")], None, result, {}))
        shown = [picture(card.all("img")[0]) for card in page.wall("Best kept")]
        assert len(shown) == 5
        tall = shown[0].height > shown[0].width
        assert tall is not upright  # as the model saw it
        assert min(shown[1].convert("RGB").getpixel((10, 10))) > 245  # clear, so white and not the hidden red
        assert "Without NSFW scores, nothing is blurred" in page.text


def test_page_is_bounded(tmp_path: Path):
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (160, 160, 3), np.uint8)) for _ in range(80)]
    images = [encode(image, "PNG") for image in noise]
    offsets = make_tar(tmp_path / "noise.tar", images)
    long = '"' * 5000
    rows = [
        {"key": long, "shard": str(tmp_path / "noise.tar"), "offset": o, "nbytes": len(d), "status": "ok"}
        | {"aesthetic_score": float(i), "caption": long, **{f"{c}_score": float(i) for c in "abcdefg"}}
        for i, (o, d) in enumerate(zip(offsets, images, strict=True))
    ]
    rows += [{**rows[0], "status": f"strange {i}", "error_message": long} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "noise.parquet")
    result = RunResult(str(tmp_path), 100, {"ok": 80, "strange 1": 20}, 40)
    where = "aesthetic_score >= 40 and " + " and ".join(f"{c}_score >= 40" for c in "abcdefg")
    url = write_run_report(str(tmp_path), [str(tmp_path / "noise.parquet")], where, result, {})
    assert Path(url).stat().st_size < 4_000_000
    # Best, worst and random walls are full, and those just above each of six cuts; none is dropped by one alone.
    assert len(read(url).section("pictures").all("img")) == 4 * 12 + 6 * 6


# --- the rest -------------------------------------------------------------------------------------


def test_notice_stands_before_the_counts(run: Run):
    text = Path(
        write_run_report(str(run.folder), run.tables, WHERE, run.result(notes=["only a preview"]), {})
    ).read_text()
    assert text.index("only a preview") < text.index("<h2")
    assert len(read(str(run.folder / "report.html")).all("p", role="note")) == 1


def test_counts_that_differ_from_the_files_are_told(run: Run):
    assert run.page().all("p", role="note") == []
    (note,) = run.page(kept=3).all("p", role="note")
    assert f"64 samples and would keep {len(run.kept)}; the run counted 64 and 3" in note.text


def test_embeddings_are_not_read(run: Run):
    # Their bytes in the file are destroyed: who reads them fails.
    for url in run.tables:
        group = pq.read_metadata(url).row_group(0)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith("embedding"))
        with Path(url).open("r+b") as file:
            file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
            file.write(b"\xff" * chunk.total_compressed_size)
        with pytest.raises((OSError, pa.ArrowException)):
            pq.read_table(url)
    assert run.page().wall("Best kept")


def test_batches_make_no_difference(run: Run, monkeypatch: pytest.MonkeyPatch):
    whole = run.page()
    monkeypatch.setattr("dask_imgcurator.steps.score_table._BATCH", 7)
    parts = run.page()
    cut = "by aesthetic_score >= 5"
    for title in ("Best kept", "Worst", f"Just kept {cut}", f"Just dropped {cut}", "Random kept", "Random dropped"):
        assert [c.text for c in parts.wall(title)] == [c.text for c in whole.wall(title)]
    for name in ("errors", "selection"):
        assert parts.section(name).text == whole.section(name).text


def test_nothing_selected(run: Run):
    page = run.page(None, kept=None, funnel=[])
    assert page.section("selection").tag == "missing"
    assert {h.text for h in page.section("pictures").all("h3")} == {"Best", "Worst", "Random"}


def test_no_scores_and_no_tables(tmp_path: Path):
    pq.write_table(pa.table({"key": ["a"], "shard": ["x.tar"], "status": ["no_image"]}), tmp_path / "a.parquet")
    result = RunResult(str(tmp_path), 1, {"no_image": 1}, 0)
    page = read(write_run_report(str(tmp_path), [str(tmp_path / "a.parquet")], None, result, {}))
    assert page.table("no_image: the first 1 of 1") == [["a", "x.tar", ""]]
    assert "No image could be read" in page.text
    page = read(write_run_report(str(tmp_path), [], None, RunResult(str(tmp_path), kept=0), {}))
    assert "every sample was readable" in page.text


def test_other_file_systems(run: Run):
    import fsspec

    fs = fsspec.filesystem("memory")
    for i, url in enumerate(run.tables):
        fs.pipe_file(f"/report/scores/{i}.parquet", Path(url).read_bytes())
    tables = [f"memory://report/scores/{i}.parquet" for i in range(2)]
    url = write_run_report("memory://report", tables, WHERE, run.result(), {})
    assert url == "memory://report/report.html"
    assert fs.cat_file("/report/report.html").startswith(b"<!DOCTYPE html>")
