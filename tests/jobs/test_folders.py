"""Folders of results: what lies there, who may write there, and that nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from distributed import Client

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.jobs.score import MissingShardsError
from dask_imgcurator.monitor import Monitor
from dask_imgcurator.schema import METADATA_KEY
from dask_imgcurator.storage import files

duckdb = pytest.importorskip("duckdb")


CODE = "from dask_imgcurator.cli.main import main; main()"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images in four shards, and as many in another folder, called the same."""
    base = tmp_path_factory.mktemp("samples")
    make_sample_shards(base / "a", count=16, per_shard=4)
    make_sample_shards(base / "b", count=16, per_shard=4, seed=1)
    return base


@pytest.fixture(scope="module")
def scored(shards: Path, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score tables of both."""
    base = tmp_path_factory.mktemp("scored")
    for name in ("a", "b"):
        score(shards / name, base / name, client)
    return base


def score(shards: Any, out: Path, client: Client, **options: Any) -> Any:
    return dic.score_shards(shards, out, model="starter", dtype="float32", client=client, backend="pandas", **options)


def keys(folder: Path) -> list[str]:
    """Keys of all rows, with their shards, as DuckDB reads the folder."""
    query = f"select parse_filename(shard) || ' ' || coalesce(key, '') from '{folder}/*.parquet' order by 1"
    return [row[0] for row in duckdb.connect().execute(query).fetchall()]


def tree(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for what is only remembered of it."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in (".files.json", ".written.json")}


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(given, capture_output=True, text=True, timeout=300)


# --- tables that are written whole ----------------------------------------------------------------


def test_another_selection_is_refused_or_replaces_the_older_one_whole(scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "S"
    for path in (scored / "a").glob("*.parquet"):
        (tmp_path / "five").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "five")
    shutil.copy(scored / "b" / "00000.parquet", tmp_path / "five" / "more.parquet")
    dic.select_rows(tmp_path / "five", out, "width >= 1")
    before = tree(out)
    with pytest.raises(FileExistsError, match=r"the result of `select` of .*five: width >= 1 \(5 files\).*--overwrite"):
        dic.select_rows(scored / "a", out, "width >= 2")
    assert tree(out) == before
    counts = dic.select_rows(scored / "a", out, "width >= 2", overwrite=True)
    ok = f"select count(*) from '{scored}/a/*.parquet' where status = 'ok' and width >= 2"
    assert len(keys(out)) == counts.kept == duckdb.connect().execute(ok).fetchall()[0][0]
    # The same command may be given again.
    assert dic.select_rows(scored / "a", out, "width >= 2").kept == counts.kept
    record = json.loads((out / ".table.json").read_text())
    assert (record["command"], record["inputs"]) == ("select", [str(scored / "a")])


def test_the_scores_of_a_night_are_not_replaced_by_a_selection(scored: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(scored / "b", tmp_path / "b")
    before = tree(tmp_path / "b")
    jobs: list[Any] = [
        lambda **more: dic.select_rows(scored / "a", tmp_path / "b", "width > 10", **more),
        lambda **more: dic.drop_duplicates(scored / "a", tmp_path / "b", tiers=["exact"], **more),
        lambda **more: dic.add_columns(scored / "a", tmp_path / "b", caption_stats=True, **more),
    ]
    for job in jobs:
        with pytest.raises(FileExistsError, match="the result of `score` by starter"):
            job()
        assert tree(tmp_path / "b") == before
    for job in jobs:
        job(overwrite=True)
        assert set(keys(tmp_path / "b")) <= set(keys(scored / "a"))
        assert not list(tmp_path.glob("b/.unfinished-*"))


def test_files_of_others_are_never_removed(scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pa.table({"url": ["x"]}), out / "00000.parquet")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"00000\.parquet was not written by this library"):
            dic.select_rows(scored / "a", out, "width > 1", overwrite=overwrite)
    assert pq.read_table(out / "00000.parquet").to_pylist() == [{"url": "x"}]
    assert [p.name for p in out.iterdir()] == ["00000.parquet"]


def test_a_result_without_a_record_is_known_by_its_files(scored: Path, tmp_path: Path) -> None:
    dic.select_rows(scored / "a", tmp_path / "S", "width > 1")
    (tmp_path / "S" / ".table.json").unlink()
    with pytest.raises(FileExistsError, match=r"the result of `select` \(4 files\)"):
        dic.select_rows(scored / "a", tmp_path / "S", "width > 1")


def test_a_job_that_was_stopped_leaves_a_mark(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def full(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().name.endswith("00003.parquet"):
            raise OSError(28, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JobError, match="No space"):
            dic.select_rows(scored / "a", tmp_path / "S", "width > 1")
    shutil.copy(scored / "a" / "00000.parquet", tmp_path / "S")  # whatever was finished by then
    monitor = Monitor()
    dic.select_rows(tmp_path / "S", tmp_path / "T", "width > 1", monitor=monitor)
    assert [f"process {os.getpid()}" in note and "not finished" in note for note in monitor.notes] == [True]
    dic.select_rows(scored / "a", tmp_path / "S", "width > 1")
    dic.select_rows(tmp_path / "S", tmp_path / "T", "width > 1", monitor=(again := Monitor()))
    assert again.notes == []


def test_records_are_no_files_of_the_table(scored: Path) -> None:
    import dask.dataframe as dd
    import pandas as pd

    rows = len(keys(scored / "a"))
    assert (scored / "a" / ".table.json").exists()
    columns = ["key", "width"]
    assert pa.dataset.dataset(scored / "a").count_rows() == rows
    assert len(pd.read_parquet(scored / "a", columns=columns)) == rows
    assert len(dd.read_parquet(str(scored / "a"), columns=columns)) == rows


def test_files_of_one_name_from_several_folders_are_told_apart(scored: Path, tmp_path: Path) -> None:
    both = [scored / "a", scored / "b"]
    counts = dic.select_rows(both, tmp_path / "top", "top 5 by aesthetic_score")
    query = f"select key from read_parquet(['{scored}/a/*.parquet', '{scored}/b/*.parquet']) where status = 'ok' "
    query += "order by aesthetic_score desc limit 5"
    best = [row[0] for row in duckdb.connect().execute(query).fetchall()]
    assert counts.kept == 5
    assert sorted(key.partition(" ")[2] for key in keys(tmp_path / "top")) == sorted(best)
    assert len(list((tmp_path / "top").glob("*.parquet"))) == 8
    found = dic.drop_duplicates(both, tmp_path / "unique", tiers=["exact"])
    query = f"select count(distinct sha256) from read_parquet(['{scored}/a/*.parquet', '{scored}/b/*.parquet']) "
    assert found.kept == duckdb.connect().execute(query + "where status = 'ok'").fetchall()[0][0]
    assert dic.select_rows([scored / "a", scored / "a"], tmp_path / "once", "width > 0").rows == len(keys(scored / "a"))


def test_curated_shards_of_other_sources_are_not_replaced(scored: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dic.write_selection(scored / "a", out, client=1)
    before = tree(out)
    with pytest.raises(FileExistsError, match=r"shards made from other shards \(.*a/0000\d\.tar\).*--overwrite"):
        dic.write_selection(scored / "b", out, client=1)
    assert tree(out) == before
    dic.write_selection(scored / "b", out, client=1, overwrite=True)
    sources = json.loads((out / "00000_stats.json").read_text())["sources"]
    assert sources.keys() <= {str(path) for path in (shards / "b").glob("*.tar")}
    mark = {"command": "write", "host": os.uname().nodename, "pid": os.getppid(), "since": "now"}
    (out / ".unfinished-x.json").write_text(json.dumps(mark))
    with pytest.raises(FileExistsError, match=f"is being written by process {os.getppid()}"):
        dic.write_selection(scored / "b", out, client=1)


# --- several models -------------------------------------------------------------------------------


def test_values_of_several_models_are_not_compared(scored: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(scored / "a", mixed)
    last = mixed / "00003.parquet"
    table = pq.read_table(last)
    about = json.loads(table.schema.metadata[METADATA_KEY.encode()])
    about["encoder"] |= {"model": "ViT-B-32", "pretrained": "openai"}
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), last)
    out = tmp_path / "out"
    jobs: dict[str, Any] = {
        "where": lambda: dic.select_rows(mixed, out, "aesthetic_score > 4"),
        "top": lambda: dic.select_rows(mixed, out, "top 50% by nsfw_score"),
        "dedup": lambda: dic.drop_duplicates(mixed, out),
        "best": lambda: dic.drop_duplicates(mixed, out, tiers=["exact"], keep="aesthetic_score"),
        "vectors": lambda: dic.export_scores(mixed, out, "clip-retrieval"),
        "list": lambda: dic.export_scores(mixed, out, "list", "aesthetic_score > 4"),
        "add": lambda: dic.add_columns(mixed, out, aesthetic_head="aesthetic-starter", nsfw_head=None, heads=["x"]),
        "report": lambda: dic.write_report(mixed, tmp_path / "report.html"),
        "write": lambda: dic.write_selection(mixed, out, "aesthetic_score > 4", client=1),
        "search": lambda: dic.search(mixed, embedding=[1.0] * 512),
    }
    for name, job in jobs.items():
        with pytest.raises(ValueError, match=r"00000\.parquet .*'starter', those of .*00003\.parquet with 'ViT-B-32'"):
            job()
        assert not out.exists(), name
    assert dic.select_rows(mixed, out, "width > 1").kept > 0  # which no model made
    assert dic.drop_duplicates(mixed, tiers=["exact", "perceptual"]).kept > 0


# --- score tables ---------------------------------------------------------------------------------


def test_another_model_or_setting_is_refused(scored: Path, shards: Path, client: Client, tmp_path: Path) -> None:
    shutil.copytree(scored / "a", tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"encoder\.dtype is 'float32' there and 'bfloat16' here.*--overwrite"):
        dic.score_shards(shards / "a", tmp_path / "a", model="starter", dtype="bfloat16", client=client)
    with pytest.raises(FileExistsError, match=r"heads\.nsfw_score"):
        score(shards / "a", tmp_path / "a", client, nsfw_head="none")
    (tmp_path / "a" / ".table.json").unlink()  # the files know it too
    with pytest.raises(FileExistsError, match=r"heads\.nsfw_score"):
        score(shards / "a" / "00000.tar", tmp_path / "a", client, nsfw_head="none")
    assert tree(tmp_path / "a") == {name: data for name, data in before.items() if name != ".table.json"}
    one = score(shards / "a" / "00000.tar", tmp_path / "a", client, nsfw_head="none", overwrite=True)
    assert (one.shards_scored, len(keys(tmp_path / "a"))) == (1, 4)
    assert "nsfw_score" not in pq.read_schema(tmp_path / "a" / "00000.parquet").names


def test_shards_of_other_folders_are_another_table(scored: Path, shards: Path, client: Client, tmp_path: Path) -> None:
    shutil.copytree(scored / "a", tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"holds the scores of other shards \(.*a/00000\.tar\)"):
        score(shards / "b", tmp_path / "a", client)
    assert keys(tmp_path / "a") == keys(scored / "a")
    # Together they are one table.
    both = score([shards / "a", shards / "b"], tmp_path / "a", client)
    assert (both.shards_scored, both.shards_taken_over) == (4, 4)
    assert sorted(keys(tmp_path / "a")) == sorted(keys(scored / "a") + keys(scored / "b"))
    score(shards / "b", tmp_path / "a", client, overwrite=True)
    assert keys(tmp_path / "a") == keys(scored / "b")


def test_shards_that_were_moved_do_not_count_twice(shards: Path, client: Client, tmp_path: Path) -> None:
    shutil.copytree(shards / "a", tmp_path / "in", copy_function=shutil.copy2)
    score(tmp_path / "in", tmp_path / "out", client)
    rows = keys(tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "moved")
    with pytest.raises(FileExistsError, match="move them back, or link the old name"):
        score(tmp_path / "moved", tmp_path / "out", client)
    (tmp_path / "in").symlink_to(tmp_path / "moved")
    assert score(tmp_path / "in", tmp_path / "out", client).shards_taken_over == 4
    (tmp_path / "moved" / "00003.tar").rename(tmp_path / "moved" / "last.tar")
    with pytest.raises(FileExistsError, match=r"last\.tar looks like .*00003\.tar, renamed"):
        score(tmp_path / "in", tmp_path / "out", client)
    assert keys(tmp_path / "out") == rows


def test_finished_scores_stay_while_their_shards_are_away(shards: Path, client: Client, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "run"
    shutil.copytree(shards / "a", source, copy_function=shutil.copy2)
    names = [str(source / f"{i:05d}.tar") for i in range(4)]
    options: dict[str, Any] = {"model": "starter", "client": client, "backend": "pandas", "dtype": "float32"}
    first = dic.curate(names, out, **options)
    before = tree(out / "scores"), tree(out / "shards")
    (tmp_path / "away").mkdir()
    for name in names[2:]:
        shutil.move(name, tmp_path / "away")
    for given in (names, source / "*.tar"):
        for resume in (True, False):
            with pytest.raises(
                MissingShardsError, match=r"2 shards .*00002\.tar, and 1 more.*are left unchanged"
            ) as told:
                dic.curate(given, out, resume=resume, **options)
            assert told.value.result.shards_missing == names[2:]
            assert {n for n, data in tree(out / "scores").items() if data != before[0].get(n)} == set()
            assert tree(out / "shards") == before[1]
    shutil.move(tmp_path / "away" / "00002.tar", source)
    shutil.move(tmp_path / "away" / "00003.tar", source)
    again = dic.curate(names, out, **options)
    assert (again.kept, again.shards_missing, again.shards_scored) == (first.kept, [], 0)


def test_missing_shards_are_no_images(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("00000.tar", "00002.tar"):
        shutil.copy(shards / "a" / name, tmp_path / "in")
    arguments = ["score", tmp_path / "in" / "{00000..00003}.tar", "--model", "starter", "--n-workers", "1"]
    done = command(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "2 shards cannot be read now" in done.stderr
    assert "00001.tar, and 1 more" in done.stderr
    assert "Traceback" not in done.stderr
    assert "missing: 2 shards" in done.stdout
    assert len(keys(tmp_path / "out")) == 8
    assert files.list_files(str(tmp_path / "out"), ".json", prefix=".unfinished-") == []
    done = command(*arguments, "--out", tmp_path / "out", "--allow-missing")
    assert done.returncode == 0, done.stderr
    assert "reused from an earlier run: 2 shards" in done.stdout


@pytest.mark.slow
def test_jobs_of_an_array_fill_one_folder(shards: Path, tmp_path: Path) -> None:
    """Two processes with shards of their own, and one with the same as another, at the same time."""
    options = ["--model", "starter", "--dtype", "float32", "--n-workers", "1", "--quiet"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def start(pattern: str, out: Path) -> subprocess.Popen[str]:
        given = [sys.executable, "-c", CODE, "score", str(shards / "a" / pattern), "--out", str(out), *options]
        return subprocess.Popen(given, stderr=subprocess.PIPE, text=True)

    jobs = [start("{00000..00001}.tar", parts), start("{00002..00003}.tar", parts), start("{00002..00003}.tar", parts)]
    for job in [*jobs, start("*.tar", whole)]:
        _, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors
    assert tree(parts) == tree(whole)
