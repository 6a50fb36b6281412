"""Whole jobs on a score table: choosing, duplicates, adding, other layouts; in Python and by the command line."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from distributed import Client

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.cli.main import cli
from dask_imgcurator.select.ranks import SelectionError
from dask_imgcurator.select.syntax import WhereError
from dask_imgcurator.steps.score_table import file_provenance
from dask_imgcurator.storage import files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=96, per_shard=24)


@pytest.fixture(scope="module")
def table(made: SampleShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A score table without a cluster: the job's own steps, file by file, with its metadata."""
    out = tmp_path_factory.mktemp("run") / "scores"
    dic.score_shards([str(p) for p in made.shards], out, model="starter", client=1, backend="pandas")
    return out


def read(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(p).to_pandas() for p in sorted(folder.glob("*.parquet"))], ignore_index=True)


def test_the_best_and_a_sample_of_them(table: Path, client: Client, tmp_path: Path) -> None:
    counts = dic.select_rows(
        table, tmp_path / "out", ["width >= 160", "top 50% by aesthetic_score", "sample 10 seed 3"], client=client
    )
    everything = read(table)
    ok = everything[everything["status"] == "ok"]
    wide = ok[ok["width"] >= 160]
    best = wide.nlargest(len(wide) // 2, "aesthetic_score")
    got = read(tmp_path / "out")
    assert len(got) == counts.kept == 10
    assert set(got["key"]) <= set(best["key"])
    assert counts.rows == len(everything)
    assert counts.by_status == everything["status"].value_counts().to_dict()
    assert [(s.condition, s.left) for s in counts.funnel] == [
        ("width >= 160", len(wide)),
        ("top 50% by aesthetic_score", len(best)),
        ("sample 10 seed 3", 10),
    ]
    assert counts.funnel[1].alone == len(ok) // 2
    for path in sorted((tmp_path / "out").glob("*.parquet")):
        before, after = file_provenance(str(table / path.name)), file_provenance(str(path))
        assert after is not None
        assert after.pop("selected") == {"steps": [s.condition for s in counts.funnel]}
        assert after == before


def test_mistakes_are_told_before_anything_is_written(table: Path, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(WhereError, match="aesthetic_scor"):
        dic.select_rows(table, out, "aesthetic_scor > 5", client=client)
    with pytest.raises((WhereError, SelectionError)):
        dic.select_rows(table, out, "top 140% by aesthetic_score", client=client)
    with pytest.raises((WhereError, SelectionError), match="beauty"):
        dic.select_rows(table, out, "top 10% by beauty", client=client)
    with pytest.raises(ValueError, match="is the score table itself"):
        dic.select_rows(table, table, "width > 1", client=client)
    with pytest.raises(ValueError, match="name one"):
        dic.drop_duplicates(table, out, eps=[0.1, 0.2], client=client)
    assert not out.exists() or not list(out.iterdir())


def test_duplicates_that_were_planted_go(table: Path, made: SampleShards, client: Client, tmp_path: Path) -> None:
    found = dic.drop_duplicates(
        table,
        tmp_path / "unique",
        tiers=["exact", "perceptual"],
        keep="aesthetic_score",
        groups=tmp_path / "groups.parquet",
        index=tmp_path / "index",
        client=client,
    )
    left = read(tmp_path / "unique")
    ok = read(table).query("status == 'ok'")
    assert found.rows == len(read(table))
    assert len(left) == found.kept
    # Of each image's bytes one stays, as pandas tells.
    assert left["sha256"].is_unique
    planted = {k: v["of"] for k, v in made.manifest.items() if v["kind"] == "duplicate"}
    assert planted
    for copy, original in planted.items():
        assert len({copy, original} & set(left["key"])) <= 1
    groups = pq.read_table(tmp_path / "groups.parquet").to_pandas()
    dropped = set(ok["key"]) - set(left["key"])
    assert dropped == set(groups.loc[groups["key"] != groups["kept_key"], "key"])
    scores = ok.set_index("key")["aesthetic_score"]
    for _, group in groups.groupby("group"):
        assert scores[group["kept_key"].iloc[0]] == scores[group["key"]].max()
    # What is in the index already is no news.
    again = dic.drop_duplicates(tmp_path / "unique", tiers=["exact"], against=str(tmp_path / "index"), client=client)
    assert again.kept == 0


def test_columns_are_added_without_images(table: Path, made: SampleShards, client: Client, tmp_path: Path) -> None:
    embeddings = read(table).query("status == 'ok'")["embedding"]
    width = len(embeddings.iloc[0])
    weights = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
    dic.save_head(tmp_path / "mine.safetensors", [(weights, np.zeros(1, np.float32))], column="mine_score", name="mine")
    added = dic.add_columns(
        table, tmp_path / "more", heads=[tmp_path / "mine.safetensors"], caption_stats=True, client=client
    )
    assert set(added) == {"mine_score", "caption_words", "caption_chars"}
    before, after = read(table), read(tmp_path / "more")
    pd.testing.assert_frame_equal(after[before.columns.drop("embedding")], before.drop(columns="embedding"))
    for row in after.itertuples():
        if row.status == "ok":
            assert row.mine_score == pytest.approx(float(weights[0] @ row.embedding), abs=1e-4)
        else:
            assert np.isnan(row.mine_score)
        if isinstance(row.caption, str):
            assert row.caption_words == len(row.caption.split())
    with pytest.raises(ValueError, match="nothing to add"):
        dic.add_columns(tmp_path / "more", tmp_path / "x", caption_stats=True, client=client)
    with pytest.raises(ValueError, match="starter"):
        dic.add_columns(table, tmp_path / "x", clip_score=True, client=client)


def test_a_registered_head_is_added_and_its_column_then_left_alone(
    table: Path, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = len(read(table).query("status == 'ok'")["embedding"].iloc[0])
    about = tmp_path / "dic_heads_for_tables-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dic-heads\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dask_imgcurator.heads]\nones = dic_heads_for_tables:ONES\n")
    (tmp_path / "dic_heads_for_tables.py").write_text(f"ONES = {str(tmp_path / 'ones.safetensors')!r}\n")
    ones = [(np.ones((1, width), np.float32), np.zeros(1, np.float32))]
    dic.save_head(tmp_path / "ones.safetensors", ones, column="ones_score", name="ones")
    dic.save_head(tmp_path / "other.safetensors", ones, column="ones_score", name="other")
    monkeypatch.syspath_prepend(tmp_path)
    assert dic.add_columns(table, tmp_path / "more", heads=["ones"], client=client) == ["ones_score"]
    row = next(read(tmp_path / "more").query("status == 'ok'").itertuples())
    assert row.ones_score == pytest.approx(float(np.sum(row.embedding, dtype=np.float64)), abs=1e-4)
    for url in (tmp_path / "more").glob("*.parquet"):  # values that no head gives
        whole = pq.read_table(url)
        at = whole.schema.get_field_index("ones_score")
        pq.write_table(whole.set_column(at, whole.schema.field(at), [np.full(len(whole), 7, np.float32)]), url)
    added = dic.add_columns(tmp_path / "more", tmp_path / "again", heads=["ones"], caption_stats=True, client=client)
    assert added == ["caption_words", "caption_chars"]
    assert (read(tmp_path / "again")["ones_score"] == 7).all()
    with pytest.raises(ValueError, match="two heads give the column 'ones_score'"):
        dic.add_columns(table, tmp_path / "x", heads=["ones", tmp_path / "other.safetensors"], client=client)


def test_a_selection_of_many_steps_reads_each_column_at_most_twice(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to find all bounds, once to apply them; the rest of a file only where it keeps something."""
    reads: list[tuple[str, str]] = []

    class Counted:
        def __init__(self, name: str, file: pq.ParquetFile) -> None:
            self.name, self.schema_arrow, self.metadata, self._file = name, file.schema_arrow, file.metadata, file

        def read(self, names: list[str], **options: Any) -> pa.Table:
            reads.extend((self.name, name) for name in names)
            return self._file.read(names, **options)

    @contextlib.contextmanager
    def counted(url: str, *args: Any) -> Iterator[Counted]:
        with opened(url, *args) as file:
            yield Counted(Path(url).name, file)

    opened = files.opened_parquet
    monkeypatch.setattr(files, "opened_parquet", counted)
    first = str(sorted(table.glob("*.parquet"))[0])
    shard = pq.read_table(first, columns=["shard"])["shard"][0].as_py()
    counts = dic.select_rows(
        table,
        tmp_path / "out",
        [
            f"aesthetic_score >= 3 and shard == '{shard}'",
            *("top 80% by aesthetic_score", "top 50% by width", "sample 3"),
        ],
    )
    assert counts.kept == 3
    times = Counter(reads)
    used = {"status", "aesthetic_score", "width", "shard", "sample_offset"}
    assert {column for (_, column), n in times.items() if n > 1} <= used
    assert max(times.values()) <= 3  # with the ties of `width`
    assert {name for name, column in times if column == "embedding"} == {Path(first).name}


def test_a_condition_on_a_column_that_begins_with_status_is_counted(table: Path, tmp_path: Path) -> None:
    for path in sorted(table.glob("*.parquet")):
        whole = pq.read_table(path)
        codes = pa.array([200 if i % 2 else 404 for i in range(len(whole))])
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(whole.append_column("status_code", codes), tmp_path / "in" / path.name)
    counts = dic.select_rows(tmp_path / "in", tmp_path / "out", "status_code == 200 and width > 50")
    ok = read(tmp_path / "in").query("status == 'ok'")
    good = ok["status_code"] == 200
    assert [(s.condition, s.left) for s in counts.funnel] == [
        ("status_code == 200", good.sum()),
        ("width > 50", (good & (ok["width"] > 50)).sum()),
    ]


def test_other_layouts(table: Path, client: Client, tmp_path: Path) -> None:
    written = dic.export_scores(table, tmp_path / "keys.txt", "list", "aesthetic_score >= 5", client=client)
    good = read(table).query("status == 'ok' and aesthetic_score >= 5")
    assert (tmp_path / "keys.txt").read_text().splitlines() == good["key"].tolist()
    assert written.rows == len(good)


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    code = "from dask_imgcurator.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_by_the_command_line(table: Path, tmp_path: Path) -> None:
    done = run("select", table, "--min-aesthetic", "4", "--top", "10 by blur", "--out", tmp_path / "selected")
    assert done.returncode == 0, done.stderr
    assert "top 10 by blur" in done.stdout
    assert len(read(tmp_path / "selected")) == 10
    done = run("dedup", table, "--tier", "exact", "--out", tmp_path / "unique")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "unique")["sha256"].is_unique
    assert f"of {len(read(table))} rows" in done.stdout
    done = run("add", table, "--prompt", "no-equals-sign", "--out", tmp_path / "more")
    assert (done.returncode, "NAME=TEXT" in done.stderr) == (2, True)
    done = run("select", table, "--top", "most by blur", "--out", tmp_path / "x")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    provenance = file_provenance(str(next((tmp_path / "unique").glob("*.parquet"))))
    assert provenance is not None and json.dumps(provenance["deduplicated"]["tiers"]) == '["exact"]'


# --- what is no score table -----------------------------------------------------------------------


def img2dataset_table(folder: Path) -> Path:
    """What img2dataset writes beside 00000.tar."""
    names = ["url", "caption", "key", "status", "error_message", "width", "height", "original_width", "sha256"]
    rows = {name: pd.array([None, None], dtype="string") for name in names}
    rows |= {"key": ["000000000", "000000001"], "status": ["success", "failed_to_download"]}
    folder.mkdir()
    pd.DataFrame(rows).to_parquet(folder / "00000.parquet")
    return folder


COMMANDS = {
    "select": ("--where", "width > 1"),
    "write": (),
    "dedup": (),
    "export": ("--format", "list"),
    "add": ("--caption-stats",),
    "report": (),
    "search": ("--like", "000000000"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", ["img2dataset", "pointer", "page"])
def test_what_is_no_score_table_is_told(command: str, what: str, tmp_path: Path) -> None:
    folder = img2dataset_table(tmp_path / "in")
    file = folder / "00000.parquet"
    expected = rf"{file} is not a score table: .*'shard' .*dask-imgcurator score '{folder}/\*\.tar' --out SCORES"
    if what == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        expected = rf"{file} is not a readable Parquet file; it is a Git LFS pointer, .* git lfs pull"
    if what == "page":
        file.write_text("<!DOCTYPE html>\n<html><body>404</body></html>\n")
        expected = rf"{file} is not a readable Parquet file; it is a web page"
    out = str(tmp_path / ("out.html" if command == "report" else "out.parquet"))
    result = CliRunner().invoke(cli, [command, str(folder), *COMMANDS[command], "--out", out])
    assert result.exit_code == 2, result.output
    assert re.match(rf"dask-imgcurator: {expected}", result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_groups_that_are_no_table(table: Path, tmp_path: Path) -> None:
    (tmp_path / "groups.parquet").write_text("<html>")
    with pytest.raises(ValueError, match=r"groups\.parquet is not a readable Parquet file; it is a web page"):
        dic.write_report(table, tmp_path / "out.html", groups=tmp_path / "groups.parquet")


def test_tables_of_other_origin_need_samples_or_embeddings(tmp_path: Path) -> None:
    for name, column in {"shard": ["a.tar"], "vectors": [[0.6, 0.8]]}.items():
        pq.write_table(pa.table({"key": ["a"], "rating": [3], name: column}), tmp_path / f"{name}.parquet")
        assert dic.select_rows(tmp_path / f"{name}.parquet", tmp_path / name, "rating > 2").kept == 1
