"""Pages about any score table: what they count and show, against plain Python on the same rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import Node, Run, make_run, read

import dask_imgcurator as dic
from dask_imgcurator.runs.plan import model_notes
from dask_imgcurator.schema import METADATA_KEY
from dask_imgcurator.select.syntax import WhereError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run's tables in a folder of their own, with sample_offset, which tells rows apart."""
    made = make_run(tmp_path)
    (tmp_path / "scores").mkdir()
    for i, url in enumerate(made.tables):
        table = pq.read_table(url)
        table = table.append_column("sample_offset", pa.array(range(0, 512 * len(table), 512), pa.int64()))
        pq.write_table(table, tmp_path / "scores" / f"{i}.parquet")
        Path(url).unlink()
        for at, row in enumerate(made.rows[32 * i : 32 * (i + 1)]):
            row["sample_offset"] = 512 * at
    return made


def cards(page: Node, section: str = "counts") -> dict[str, str]:
    (found,) = page.section(section).all("dl", class_="cards")
    return {d.all("dt")[0].text: d.all("dd")[0].text.split()[0] for d in found.all("div")}


def keys(nodes: list[Node]) -> list[str]:
    return [card.all("code")[0].text for card in nodes]


# --- one table ------------------------------------------------------------------------------------


def test_report_of_a_selection(run: Run) -> None:
    """Counts, funnel and the cut of a rank, by sorting in plain Python."""
    out = run.folder / "look.html"
    assert dic.write_report(run.folder / "scores", out, ["width >= 100", "top 50% by aesthetic_score"]) == str(out)
    page = read(str(out))
    ok = [r for r in run.rows if r["status"] == "ok"]
    wide = [r for r in ok if r["width"] >= 100]
    ranked = sorted((r for r in wide if r["aesthetic_score"] is not None), key=lambda r: -r["aesthetic_score"])
    kept = ranked[: len(ranked) // 2]
    alone = len([r for r in ok if r["aesthetic_score"] is not None]) // 2
    counts = cards(page)
    assert (counts["samples"], counts["readable"], counts["kept"]) == ("64", str(len(ok)), str(len(kept)))
    funnel = {name: cells for name, *cells in page.table("What each condition leaves, in order")}
    assert funnel["width >= 100"][:2] == [str(len(wide))] * 2
    assert funnel["top 50% by aesthetic_score"][:2] == [str(alone), str(len(kept))]
    bound = kept[-1]["aesthetic_score"]
    (label,) = page.figure("aesthetic_score").all("text", class_="cut")
    assert label.text == f"top 50% by aesthetic_score (>= {bound:.5g})"
    just = keys(page.wall(f"Just kept by {label.text}"))
    assert just == [r["key"] for r in reversed(kept)][:6]
    assert "this library did not write it" in page.all("p", role="note")[0].text  # the tables here were made by hand


def test_report_without_a_selection(run: Run) -> None:
    page = read(dic.write_report(run.folder / "scores", run.folder / "look.html"))
    assert page.section("selection").tag == "missing"
    assert set(cards(page)) == {"samples", "readable", "failed"}
    assert page.table("decode_error: the first 5 of 14")


def test_report_of_a_table_in_parts_is_that_of_the_whole(run: Run) -> None:
    whole = pa.concat_tables(pq.read_table(p) for p in sorted((run.folder / "scores").glob("*.parquet")))
    (run.folder / "one").mkdir()
    pq.write_table(whole, run.folder / "one" / "all.parquet")
    pages = [
        read(dic.write_report(run.folder / name, run.folder / f"{name}.html", "aesthetic_score >= 5"))
        for name in ("scores", "one")
    ]
    for name in ("counts", "selection", "errors"):
        assert pages[0].section(name).text == pages[1].section(name).text


def test_mistakes_are_told_before_anything_is_read(run: Run) -> None:
    scores, out = run.folder / "scores", run.folder / "look.html"
    with pytest.raises(WhereError, match="did you mean 'aesthetic_score'"):
        dic.write_report(scores, out, "aesthetic_scor >= 5")
    with pytest.raises(ValueError, match=r"'look' is not an HTML file: use a name, such as 'report.html'"):
        dic.write_report(scores, "look")
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        dic.write_report(scores, run.folder / "nowhere" / "look.html")
    with pytest.raises(FileNotFoundError, match="no score table"):
        dic.write_report(run.folder / "none", out)
    with pytest.raises(ValueError, match=r"is not a table of duplicates: it lacks .*similarity.*dedup --groups"):
        dic.write_report(scores, out, groups=scores / "0.parquet")
    assert not out.exists()


def test_what_a_reader_must_know_stands_first(run: Run) -> None:
    for i, encoder in enumerate(({"model": "starter"}, {"model": "ViT-B-32", "pretrained": "random:1"})):
        path = run.folder / "scores" / f"{i}.parquet"
        about = json.dumps({"encoder": encoder, "selected": {"steps": ["width >= 10"]}})
        pq.write_table(pq.read_table(path).replace_schema_metadata({METADATA_KEY: about}), path)
    page = read(dic.write_report(run.folder / "scores", run.folder / "look.html"))
    notes = [note.text for note in page.all("p", role="note")]
    assert "starter model is a preview" in notes[0]
    assert "not all made by the same model and weights (ViT-B-32, starter)" in notes[1]
    assert ["Selected before by", "width >= 10"] in page.table("Settings")


def test_a_checkpoint_of_an_architecture_with_two_activations_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_bytes(b"")
    (note,) = model_notes("ViT-L-14", str(tmp_path / "mine.pt"))
    assert "use ViT-L-14-quickgelu" in note
    for model, pretrained in (("ViT-L-14-quickgelu", str(tmp_path / "mine.pt")), ("ViT-L-14", "openai")):
        assert model_notes(model, pretrained) == []


# --- duplicates -----------------------------------------------------------------------------------


def test_groups_stand_side_by_side_with_the_one_that_stays(run: Run) -> None:
    ok = [r for r in run.rows if r["status"] == "ok" and r["key"].startswith(("0/", "1/"))]
    chosen = [ok[0:2], ok[10:13], [ok[20], ok[30]]]
    lines = [
        {"group": g, "key": r["key"], "shard": r["shard"], "sample_offset": r["sample_offset"], "kept": i == 0}
        | {"in_reference": False, "tier": None if i == 0 else "perceptual"}
        | {"similarity": 1.0 if i == 0 else 0.9 + g / 100, "distance": None if i == 0 else g}
        for g, rows in enumerate(chosen)
        for i, r in enumerate(rows)
    ]
    groups = pd.DataFrame(lines).astype({"distance": "Int64", "tier": "string"})
    groups.to_parquet(run.folder / "groups.parquet")
    out = dic.write_report(run.folder / "scores", run.folder / "look.html", groups=run.folder / "groups.parquet")
    section = read(out).section("duplicates")
    (held,) = section.all("ul", class_="groups")
    shown = [
        [(card.all("code")[0].text, card.all("span", class_="yes") != []) for card in item.all("ul")[0].all("li")]
        for item in (child for child in held.children if isinstance(child, Node))
    ]
    assert sorted(shown) == sorted([(r["key"], i == 0) for i, r in enumerate(rows)] for rows in chosen)
    assert "3 groups, 4 images dropped" in section.text
    assert "cosine 0.9200, 2 bits apart" in section.text


def test_groups_of_another_table_are_told(run: Run) -> None:
    line = {"group": 0, "shard": "x.tar", "sample_offset": 0, "in_reference": False, "tier": "exact"}
    pair = [line | {"key": k, "kept": k == "a", "similarity": 1.0, "distance": 0} for k in "ab"]
    out = dic.write_report(run.folder / "scores", run.folder / "look.html", groups=pd.DataFrame(pair))
    assert "2 images of them are not in this table" in read(out).section("duplicates").text
    empty = pd.DataFrame(pair).iloc[:0]
    out = dic.write_report(run.folder / "scores", run.folder / "look.html", groups=empty)
    assert "None were found" in read(out).section("duplicates").text


# --- two selections -------------------------------------------------------------------------------


def sides(run: Run) -> tuple[set[str], set[str], dict[str, dict]]:
    rows = {f"{r['shard']} {r['key']}": r for r in run.rows if r["status"] == "ok"}
    a = {k for k, r in rows.items() if (r["aesthetic_score"] or 0) >= 5}
    b = {k for k, r in rows.items() if r["width"] >= 100}
    return a, b, rows


def test_comparison_of_two_expressions(run: Run) -> None:
    a, b, rows = sides(run)
    out = run.folder / "both.html"
    found = dic.compare_selections("aesthetic_score >= 5", "width >= 100", out, run.folder / "scores")
    assert (found.both, found.only_a, found.only_b) == (len(a & b), len(a - b), len(b - a))
    assert min(found.both, found.only_a, found.only_b) > 0
    page = read(str(out))
    assert cards(page) == {"in both": str(len(a & b)), "only in A": str(len(a - b)), "only in B": str(len(b - a))}
    best = sorted((rows[k] for k in b - a), key=lambda r: -(r["aesthetic_score"] or -9))
    best = [r for r in best if r["aesthetic_score"] is not None][:12]
    assert keys(page.wall("Only in B: best")) == [r["key"] for r in best]
    known = {r["key"]: k for k, r in rows.items()}
    for wall, members in (("Only in A: random", a - b), ("In both: random", a & b)):
        shown = [known[k] for k in keys(page.wall(wall)) if k in known]
        assert shown and set(shown) <= members
    figure = page.figure("aesthetic_score")
    for kind, members in (("in", a & b), ("own", a - b), ("out", b - a)):
        total = sum(int(str(r.attrs["data_count"])) for r in figure.all("rect", class_=kind))
        assert total == sum(rows[k]["aesthetic_score"] is not None for k in members)


def test_comparison_of_two_folders_equals_that_of_their_expressions(run: Run) -> None:
    for name, where in (("a", "aesthetic_score >= 5"), ("b", "width >= 100")):
        dic.select_rows(run.folder / "scores", run.folder / name, where)
    found = dic.compare_selections(run.folder / "a", run.folder / "b", run.folder / "both.html")
    a, b, _ = sides(run)
    assert (found.both, found.only_a, found.only_b) == (len(a & b), len(a - b), len(b - a))
    rows = read(str(run.folder / "both.html")).table("The two selections")
    assert "selected by aesthetic_score >= 5" in rows[0][0] and rows[1][0].startswith("B: ")
    same = dic.compare_selections(
        run.folder / "a", "aesthetic_score >= 5", run.folder / "x.html", run.folder / "scores"
    )
    assert (same.both, same.only_a, same.only_b) == (len(a), 0, 0)


def test_an_expression_needs_its_table(run: Run) -> None:
    with pytest.raises(FileNotFoundError, match="if it is an expression, name the score table"):
        dic.compare_selections(run.folder / "scores", "width >= 100", run.folder / "x.html")


# --- the command line -----------------------------------------------------------------------------


def command(*args: object) -> subprocess.CompletedProcess[str]:
    code = "from dask_imgcurator.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, "report", *map(str, args)], capture_output=True, text=True)


def test_command(run: Run) -> None:
    scores = run.folder / "scores"
    done = command(scores, "--min-aesthetic", "5", "--top", "5 by aesthetic_score", "--out", run.folder / "r.html")
    assert (done.returncode, done.stdout) == (0, f"report: {run.folder / 'r.html'}\n"), done.stderr
    assert cards(read(str(run.folder / "r.html")))["kept"] == "5"
    a, b, _ = sides(run)
    done = command(scores, "--compare", "aesthetic_score >= 5", "width >= 100", "--out", run.folder / "c.html")
    words = f"{len(a & b)} in both, {len(a - b)} only in A, {len(b - a)} only in B: {run.folder / 'c.html'}\n"
    assert (done.returncode, done.stdout) == (0, words), done.stderr
    for args, message in (
        (["--out", "x.html"], "name a score table, or two selections with --compare A B"),
        ([scores, "--compare", "a", "b", "--top", "5 by width"], "--compare takes two selections and nothing else"),
    ):
        done = command(*args)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
