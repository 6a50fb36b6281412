"""What a run with nothing left to do costs, and that it notices whatever changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from distributed import Client
from servers import S3, s3_server

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.engine.run import waves
from dask_imgcurator.jobs.score import score_graph
from dask_imgcurator.monitor import Monitor
from dask_imgcurator.runs.measured import Last
from dask_imgcurator.runs.plan import ScoreOptions, Target, make_plan
from dask_imgcurator.select.settle import settled_where
from dask_imgcurator.storage import urls


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=8, per_shard=1)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def score(shards: Any, out: Any, client: Client, **options: Any) -> Any:
    return dic.score_shards(
        shards, out, model="starter", dtype="float32", measures=False, client=client, backend="pandas", **options
    )


def test_a_rerun_lists_folders_and_opens_nothing(
    made: SampleShards, s3: S3, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_MANY", len(made.shards))
    fs = s3.file_system()
    fs.mkdir("rerun")
    fs.put([str(p) for p in made.shards], "rerun/in/")
    options = {"storage_options": s3.options, "out_options": s3.options}
    first = score("s3://rerun/in/*.tar", "s3://rerun/out", client, **options)
    since = len(s3.requests)
    again = score("s3://rerun/in/*.tar", "s3://rerun/out", client, **options)
    assert (again.shards_scored, again.shards_taken_over) == (0, len(made.shards))
    assert (again.samples, again.by_status) == (first.samples, first.by_status)
    asked = s3.requests[since:]
    assert not [r for r in asked if r.method == "GET" and r.path.endswith(".parquet")]
    assert len({r.path for r in asked if r.path.endswith(".tar")}) <= 2  # whether it is a tar, and its version
    # One that was replaced is scored again, alone.
    fs.put(str(made.shards[1]), "rerun/in/" + made.shards[0].name)
    assert score("s3://rerun/in/*.tar", "s3://rerun/out", client, **options).shards_scored == 1


def test_what_is_remembered_of_a_file_holds_while_it_is_the_same(
    made: SampleShards, tmp_path: Path, client: Client
) -> None:
    shards, out = [str(p) for p in made.shards[:4]], tmp_path / "scores"
    assert score(shards, out, client).samples == 4
    one, two = sorted(out.glob("*.parquet"))[:2]
    pq.write_table(pq.read_table(one).slice(0, 0), one)  # keeps what the file is of
    assert score(shards, out, client).samples == 3
    # The footer too: a file of other settings is no file of this run.
    table = pq.read_table(two)
    metadata = json.loads(table.schema.metadata[b"imgcurator"])
    metadata["fingerprint"] = "size=1 mtime_ns=1"
    pq.write_table(table.replace_schema_metadata({b"imgcurator": json.dumps(metadata).encode()}), two)
    again = score(shards, out, client)
    assert (again.shards_scored, again.samples) == (1, 3)


def test_a_rerun_writes_nothing_and_notices_what_changed(made: SampleShards, tmp_path: Path, client: Client) -> None:
    shards, out = [tmp_path / p.name for p in made.shards[:3]], tmp_path / "run"
    for shard, path in zip(shards, made.shards, strict=False):
        shutil.copy(path, shard)

    def again(**options: Any) -> Any:
        given = {"model": "starter", "dtype": "float32", "measures": False, "backend": "pandas", **options}
        return dic.curate([str(p) for p in shards], out, client=client, max_count=2, **given)

    def files() -> dict[Path, int]:
        names = [p for p in out.rglob("*") if p.is_file() and p.name != "run.json"]
        return {p.relative_to(out): p.stat().st_mtime_ns for p in names}

    def tars() -> list[bytes]:
        return [p.read_bytes() for p in sorted((out / "shards").glob("*.tar"))]

    again()
    before, content = files(), tars()
    assert len(content) == 2
    assert [one["resumed"] for one in again().written] == [True, True]
    assert files() == before
    for name in ("00000.tar", "00001.parquet", "sizes.json", "../report.html", ".written.json"):
        (out / "shards" / name).unlink()
        again()
        assert files().keys() == before.keys()
        assert tars() == content
    with (out / "shards" / "00000.tar").open("r+b") as file:
        file.truncate(512)
    again(resume=False)
    assert tars() == content
    assert again(where="width < 0").written == []
    assert tars() == []
    again()
    assert tars() == content
    shutil.copy(made.shards[4], shards[0])
    assert again().shards_scored == 1
    assert tars()[0] != content[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"footers": {"00000.parquet": 1}}', '{"schemas": ["AAAA"]}'])
def test_a_damaged_memory_costs_nothing(content: str, made: SampleShards, tmp_path: Path, client: Client) -> None:
    shards, out = [str(p) for p in made.shards[:2]], tmp_path / "scores"
    score(shards, out, client)
    (out / ".files.json").write_text(content)
    again = score(shards, out, client)
    assert (again.shards_scored, again.samples) == (0, 2)


def test_many_shards_are_a_task_each() -> None:
    """In graphs made as a run makes them; `benchmarks/driver.py` measures how long that takes."""
    names = [f"/data/{i:06d}.tar" for i in range(10_000)]
    plan, _ = make_plan(names, ScoreOptions(model="starter", backend="pandas"), None, Monitor())
    targets = {name: Target(name, name + ".parquet", "size=1 mtime_ns=1") for name in names}
    last = Last(settled_where(None))
    tasks = 0
    for wave in waves(names, lambda part: score_graph([targets[name] for name in part], plan, last)):
        tasks += len(wave.frame.optimize().__dask_graph__())
    assert tasks == len(names)
