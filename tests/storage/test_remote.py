"""Remote shards, tables and results: a real S3 server over HTTP, with faults; plain HTTP with and without ranges."""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from servers import OPTIONS, S3, Request, plain_server, s3_server

import dask_imgcurator as dic
from dask_imgcurator.checks import verify
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.storage import files, remote
from dask_imgcurator.storage.tar_index import open_shard
from dask_imgcurator.storage.urls import HEAD

WHERE = "aesthetic_score >= 5 and width >= 160"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=64, per_shard=16)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server: S3, made: SampleShards) -> Iterator[S3]:
    """The server with the sample shards in ``s3://source`` and an empty ``s3://target``."""
    server.fault = lambda _request: None
    fs = server.file_system()
    for bucket in ("source", "target"):
        if fs.exists(bucket):
            fs.rm(bucket, recursive=True)
        fs.mkdir(bucket)
    for path in made.shards:
        fs.pipe_file(f"source/{path.name}", path.read_bytes())
    server.requests.clear()
    yield server
    server.fault = lambda _request: None


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """One worker with one thread, so that whatever goes on beside a computation was prefetched."""
    with dic.start_client(n_workers=1, backend="pandas") as client:
        yield client


@pytest.fixture(scope="module")
def local(made: SampleShards, client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on local files."""
    out = tmp_path_factory.mktemp("local")
    dic.curate([str(p) for p in made.shards], out, where=WHERE, model="starter", client=client, max_count=10)
    return out


def rows(table: pd.DataFrame) -> pd.DataFrame:
    """A score table without what differs by where the shards lie."""
    table = table.copy()
    table["shard"] = [url.rpartition("/")[2] for url in table["shard"]]
    table["embedding"] = [str(e) for e in table["embedding"]]
    return table.sort_values(["shard", "sample_offset"], ignore_index=True)


def scores(url: Any, storage_options: dict[str, Any] | None = None) -> pd.DataFrame:
    df = dic.read_scores(url, storage_options=storage_options, backend="pandas")
    return rows(df.compute(scheduler="synchronous"))


def same_as_local(s3: S3, local: Path) -> None:
    """The curated tars are the local run's byte for byte, and the score tables hold the same rows."""
    fs = s3.file_system()
    names = sorted(p.name for p in (local / "shards").glob("*.tar"))
    assert names
    assert sorted(n.rpartition("/")[2] for n in fs.glob("target/run/shards/*.tar")) == names
    for name in names:
        assert fs.cat_file(f"target/run/shards/{name}") == (local / "shards" / name).read_bytes()
    pd.testing.assert_frame_equal(scores("s3://target/run/scores", s3.options), scores(local / "scores"))


def curate(s3: S3, client: Any, **options: Any) -> Any:
    return dic.curate(
        "s3://source/*.tar",
        "s3://target/run",
        where=WHERE,
        model="starter",
        client=client,
        max_count=10,
        storage_options=s3.options,
        out_options=s3.options,
        **options,
    )


# --- the whole job on S3 --------------------------------------------------------------------------


def test_from_s3_to_s3_is_the_local_run(s3: S3, client: Any, local: Path, made: SampleShards) -> None:
    result = curate(s3, client)
    same_as_local(s3, local)
    fs = s3.file_system()
    assert {n.rpartition("/")[2] for n in fs.ls("target/run", detail=False)} == {
        "scores",
        "shards",
        "report.html",
        "run.json",
    }
    assert fs.cat_file("target/run/report.html").count(b"data:image/webp") > 0
    # Options may hold credentials: they are in no file.
    assert b"endpoint_url" not in fs.cat_file("target/run/run.json")
    problems = verify.verify("s3://target/run", storage_options=s3.options, source_options=s3.options)
    assert {problem for _, problem in problems} == {None}

    since = len(s3.requests)
    again = curate(s3, client)
    assert (again.shards_taken_over, again.shards_scored) == (len(made.shards), 0)
    assert all(shard["resumed"] for shard in again.written)
    assert result.kept == again.kept
    # Only the thumbnails of the report are fetched from the sources then, by ranges.
    sizes = {p.stat().st_size for p in made.shards}
    assert not [
        r for r in s3.requests[since:] if r.method == "GET" and r.path.startswith("/source/") and r.sent in sizes
    ]
    assert [r.path for r in s3.requests[since:] if r.method == "PUT" and "/scores/" in r.path] == []


def score_all(s3: S3, client: Any) -> Any:
    return dic.score_shards(
        "s3://source/*.tar",
        "s3://target/scores",
        model="starter",
        client=client,
        storage_options=s3.options,
        out_options=s3.options,
    )


def test_each_shard_is_read_once_and_the_next_one_meanwhile(s3: S3, client: Any, made: SampleShards) -> None:
    score_all(s3, client)
    for path in made.shards:
        looked = HEAD if path == made.shards[0] else 0  # the client, whether it is a tar
        assert s3.sent(f"/source/{path.name}") == path.stat().st_size + looked
    # The worker has one thread. Each shard but the first was there before the scores of the one before it.
    got = {
        r.path: i for i, r in enumerate(s3.requests) if r.method == "GET" and r.path.startswith("/source/") and r.sent
    }
    put = [i for i, r in enumerate(s3.requests) if r.method == "PUT" and r.path.endswith(".parquet")]
    order = sorted(got.values())
    assert len(order) == len(put) == len(made.shards)
    assert all(read < written for read, written in zip(order[1:], put, strict=False))


def test_the_steps_of_a_user_s_graph_share_one_copy(s3: S3, made: SampleShards) -> None:
    df = dic.read_webdataset("s3://source/*.tar", storage_options=s3.options, backend="pandas")
    df = dic.embed(df, model="starter", storage_options=s3.options)
    assert len(df.compute(scheduler="synchronous")) == len(made.manifest)
    for path in made.shards:
        assert s3.sent(f"/source/{path.name}") == path.stat().st_size


def test_writing_reads_only_the_ranges_that_it_needs(s3: S3, made: SampleShards, tmp_path: Path) -> None:
    df = dic.read_webdataset("s3://source/*.tar", storage_options=s3.options, backend="pandas")
    table = df.compute(scheduler="synchronous").iloc[3::5].sample(frac=1, random_state=0)
    since = len(s3.requests)
    dic.to_webdataset(table, tmp_path / "out", source_options=s3.options)
    wanted = int(table["sample_nbytes"].sum())
    assert wanted <= s3.sent(".tar", since) <= wanted + remote.GAP * len(table)
    sources = {f"s3://source/{p.name}": p.read_bytes() for p in made.shards}
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        copied = [tar.extractfile(info).read() for info in tar]  # type: ignore[union-attr]
    expected = []
    for row in table.itertuples():
        data = sources[row.shard][row.sample_offset : row.sample_offset + row.sample_nbytes]
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            expected += [tar.extractfile(info).read() for info in tar if info.isfile()]  # type: ignore[union-attr]
    assert copied == expected


def test_a_filtered_frame_fetches_its_images_only(s3: S3, made: SampleShards) -> None:
    df = dic.read_webdataset(f"s3://source/{made.shards[0].name}", storage_options=s3.options, backend="pandas")
    table = df.compute(scheduler="synchronous")
    with remote.hold_copy(f"s3://source/{made.shards[1].name}", s3.options):
        pass  # the copy that was left of the first is gone now
    few = table[table["nbytes"] == table["nbytes"].median().round()]
    few = table.iloc[[5]] if few.empty else few
    since = len(s3.requests)
    dic.embed(few, model="starter", storage_options=s3.options)
    assert s3.sent(f"/source/{made.shards[0].name}", since) == few["nbytes"].sum()


# --- faults ---------------------------------------------------------------------------------------


def test_every_fifth_request_fails(s3: S3, client: Any, local: Path) -> None:
    count = Counter[str]()

    def fault(request: Request) -> str | None:
        count[request.method] += 1
        return "500" if sum(count.values()) % 5 == 0 else None

    s3.fault = fault
    curate(s3, client)
    s3.fault = lambda _request: None
    same_as_local(s3, local)
    assert set(count) >= {"GET", "HEAD", "PUT"}


def test_connections_that_are_cut_and_slow(s3: S3, client: Any, local: Path) -> None:
    chance = random.Random(0)

    def fault(request: Request) -> str | None:
        return chance.choice(["cut", "slow", None]) if request.method == "GET" and "/source/" in request.path else None

    s3.fault = fault
    curate(s3, client)
    s3.fault = lambda _request: None
    same_as_local(s3, local)


def test_a_shard_that_never_comes_is_no_data(s3: S3, client: Any, made: SampleShards) -> None:
    lost = "lost.tar"
    s3.file_system().pipe_file(f"source/{lost}", made.shards[0].read_bytes())
    s3.fault = lambda request: "500" if request.method == "GET" and request.path == f"/source/{lost}" else None
    with pytest.raises(JobError, match=rf"{lost} failed: .*s3://source/{lost}: .*\({files.ATTEMPTS} attempts\)"):
        score_all(s3, client)
    assert set(scores("s3://target/scores", s3.options)["shard"]) == {p.name for p in made.shards}

    # The next run takes over the others, and tries this one again.
    s3.fault = lambda _request: None
    result = score_all(s3, client)
    assert (result.shards_taken_over, result.shards_scored) == (len(made.shards), 1)
    table = scores("s3://target/scores", s3.options)
    assert "read_error" not in set(table["status"])


def test_a_table_that_cannot_be_written_stops_the_run_and_the_next_goes_on(
    s3: S3, client: Any, local: Path, made: SampleShards
) -> None:
    stem = made.shards[2].stem
    s3.fault = lambda request: "500" if request.method == "PUT" and f"/{stem}.parquet" in request.path else None
    with pytest.raises(JobError, match=rf"{stem}\.parquet: .*{files.ATTEMPTS} attempts"):
        curate(s3, client)
    s3.fault = lambda _request: None
    fs = s3.file_system()
    done = [n for n in fs.glob("target/run/scores/*.parquet")]
    assert 0 < len(done) < len(made.shards)
    result = curate(s3, client)
    assert result.shards_taken_over == len(done)
    same_as_local(s3, local)


@pytest.mark.parametrize("methods", [("GET",), ("PUT",), ("GET", "HEAD")])
def test_credentials_that_expire(
    methods: tuple[str, ...], s3: S3, client: Any, local: Path, made: SampleShards
) -> None:
    stems = {path.stem for path in made.shards[2:]}

    def fault(request: Request) -> str | None:
        here = request.method in methods and ("/source/" in request.path or request.method == "PUT")
        return "403" if here and any(stem in request.path for stem in stems) else None

    s3.fault = fault
    where = "target" if "PUT" in methods else "source"
    with pytest.raises(JobError, match=rf"s3://{where}/\S+: .*(?i:expired|forbidden)"):
        curate(s3, client)
    s3.fault = lambda _request: None
    done = s3.file_system().glob("target/run/scores/0*.parquet")
    result = curate(s3, client)
    assert len(done) <= result.shards_taken_over <= 2  # what was being written is finished after the error
    same_as_local(s3, local)


def test_an_error_that_will_not_pass_is_told_at_once(s3: S3) -> None:
    with pytest.raises(FileNotFoundError), remote.hold_copy("s3://source/no-such.tar", s3.options):
        pass
    assert len([r for r in s3.requests if "no-such" in r.path]) < files.ATTEMPTS


# --- large files ----------------------------------------------------------------------------------


def test_large_results_go_up_in_parts_and_large_shards_come_in_pieces(s3: S3, tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(20):
            info = tarfile.TarInfo(f"{i:03d}.jpg")
            info.size = 3_000_000
            tar.addfile(info, io.BytesIO(chance.randbytes(info.size)))
    s3.file_system().put_file(str(path), "source/large.tar")
    part = Counter[str]()

    def fault(request: Request) -> str | None:
        # Each part fails once, too.
        if request.method == "PUT" and "partNumber" in request.query:
            part[request.query] += 1
            return "500" if part[request.query] == 1 else None
        return None

    since = len(s3.requests)
    df = dic.read_webdataset("s3://source/large.tar", storage_options=s3.options, backend="pandas")
    table = df.compute(scheduler="synchronous")
    pieces = [r for r in s3.requests[since:] if r.method == "GET" and r.path == "/source/large.tar"]
    assert len(pieces) == -(-path.stat().st_size // remote.PIECE)
    s3.fault = fault
    dic.to_webdataset(table, "s3://target/large", storage_options=s3.options, source_options=s3.options)
    s3.fault = lambda _request: None
    assert len([q for q, n in part.items() if n > 1]) >= 3
    data = s3.file_system().cat_file("target/large/00000.tar")
    stats = json.loads(s3.file_system().cat_file("target/large/00000_stats.json"))
    assert hashlib.sha256(data).hexdigest() == stats["sha256"]
    with tarfile.open(fileobj=io.BytesIO(data)) as ours, tarfile.open(path) as theirs:
        for a, b in zip(ours, theirs, strict=True):
            assert ours.extractfile(a).read() == theirs.extractfile(b).read()  # type: ignore[union-attr]


def test_a_shard_that_is_written_anew_is_read_anew(s3: S3, made: SampleShards) -> None:
    url, fs = "s3://source/changing.tar", s3.file_system()
    for path in made.shards[:2]:
        fs.pipe_file(url, path.read_bytes())
        table = dic.read_webdataset(url, storage_options=s3.options, backend="pandas").compute(scheduler="synchronous")
        assert sorted(table["key"]) == sorted(k for k, v in made.manifest.items() if v["shard"] == path.name)


def test_a_copy_is_shared_and_its_room_given_back(s3: S3, made: SampleShards) -> None:
    url, size = f"s3://source/{made.shards[0].name}", made.shards[0].stat().st_size

    def held() -> int:
        found = 0
        for link in Path("/proc/self/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if "(deleted)" in target and link.stat().st_size == size:
                found += 1
        return found

    before = held()
    with remote.hold_copy(url, s3.options), remote.hold_copy(url, s3.options):
        assert held() == before + 1
        with open_shard(url, s3.options) as a, open_shard(url, s3.options) as b:
            a.seek(1000)
            assert b.read() == made.shards[0].read_bytes()
    assert s3.sent(f"/source/{made.shards[0].name}") == size
    with remote.hold_copy(f"s3://source/{made.shards[1].name}", s3.options):
        assert held() == before


# --- HTTP -----------------------------------------------------------------------------------------


def test_http_with_ranges(s3: S3, made: SampleShards, tmp_path: Path) -> None:
    """Moto serves public objects by plain HTTP, with ranges."""
    fs = s3.file_system()
    for path in made.shards:
        fs.chmod(f"source/{path.name}", "public-read")
    names = [f"{s3.url}/source/{p.name}" for p in made.shards]
    since = len(s3.requests)
    df = dic.read_webdataset(names, backend="pandas").compute(scheduler="synchronous")
    assert sorted(df["key"]) == sorted(made.manifest)
    assert s3.sent(".tar", since) == sum(p.stat().st_size for p in made.shards)
    since = len(s3.requests)
    few = df.iloc[::7]
    dic.to_webdataset(few, tmp_path / "out")
    assert s3.sent(".tar", since) <= few["sample_nbytes"].sum() + remote.GAP * len(few)
    assert {problem for _, problem in verify.verify(str(tmp_path / "out"))} == {None}


def test_http_without_ranges(made: SampleShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 100_000)  # smaller than a shard, so that a second piece is asked for
    with plain_server(made.shards[0].parent) as address:
        names = [f"{address}/{p.name}" for p in made.shards]
        df = dic.read_webdataset(names, backend="pandas").compute(scheduler="synchronous")
        assert sorted(df["key"]) == sorted(made.manifest)
        dic.to_webdataset(df.iloc[::7], tmp_path / "out")
        assert {problem for _, problem in verify.verify(str(tmp_path / "out"))} == {None}
        missing = dic.read_webdataset([f"{address}/none.tar", names[0]], backend="pandas")
        first = missing.compute(scheduler="synchronous").iloc[0]
        assert (first["status"], first["error_message"]) == ("read_error", f"no such file: {address}/none.tar")


def test_nothing_can_be_written_over_http(made: SampleShards) -> None:
    with (
        plain_server(made.shards[0].parent) as address,
        pytest.raises(files.RemoteError, match="Unsupported method"),
        files.write_whole(f"{address}/x") as file,
    ):
        file.write(b"x")


# --- usage ----------------------------------------------------------------------------------------


def test_a_protocol_that_is_not_there_and_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"cannot open nope://x/y\.tar"):
        dic.read_webdataset("nope://x/y.tar", backend="pandas")
    with pytest.raises(ValueError, match=r"cannot open github://y\.tar with storage options \['colour'\]: .*org"):
        dic.read_webdataset("github://y.tar", storage_options={"colour": 1}, backend="pandas")


@pytest.mark.slow
def test_the_command_line_takes_storage_options(s3: S3, local: Path) -> None:
    command = [sys.executable, "-m", "dask_imgcurator.cli.main"]
    code = "from dask_imgcurator.cli.main import main; main()"
    command = [sys.executable, "-c", code]
    options = json.dumps(s3.options)
    run = subprocess.run(
        [*command, "curate", "s3://source/*.tar", "--out", "s3://target/run", "--where", WHERE, "--model", "starter",
         "--max-count", "10", "--n-workers", "1", "--storage-options", options],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    same_as_local(s3, local)
    assert OPTIONS["secret"] not in s3.file_system().cat_file("target/run/run.json").decode()
    run = subprocess.run(
        [*command, "verify", "s3://target/run", "--storage-options", options],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    run = subprocess.run(
        [*command, "verify", "s3://target/run", "--storage-options", "{key: x"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 2
    assert "--storage-options" in run.stderr
