"""Score tables that name what they should not: nothing is copied, asked for, or waited for."""

from __future__ import annotations

import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.storage.tar_copy import WriteError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def made(base: Path) -> SampleShards:
    make_sample_shards(base / "secret", count=4, per_shard=4)
    return make_sample_shards(base / "samples", count=8, per_shard=4)


@pytest.fixture(scope="module")
def rows(made: SampleShards) -> pd.DataFrame:
    return dic.read_webdataset(made.folder.as_posix(), backend="pandas").compute()


def table(rows: pd.DataFrame, folder: Path, made: SampleShards, shard: Any) -> Path:
    """A score table of the first shard, with a row that names another one."""
    mine = rows[rows["shard"] == str(made.shards[0])].reset_index(drop=True)
    mine["shard"] = mine["shard"].astype(object)
    mine.loc[1, "shard"] = shard
    about = {"imgcurator": json.dumps({"shard": str(made.shards[0])})}
    folder.mkdir()
    pq.write_table(pa.Table.from_pandas(mine).replace_schema_metadata(about), folder / "00000.parquet")
    return folder


def write(*arguments: Any, **options: Any) -> Any:
    return dic.write_selection(*arguments, client=1, **options)


@pytest.mark.parametrize("name", ["{base}/secret/00000.tar", "{base}/samples/../secret/00000.tar", "/etc/passwd"])
def test_nothing_is_copied_from_other_folders(
    name: str, rows: pd.DataFrame, made: SampleShards, base: Path, tmp_path: Path
) -> None:
    forged = table(rows, tmp_path / "scores", made, name.format(base=base))
    with pytest.raises(WriteError, match=r"names the shard .* but the shards of this table lie in .*--allow-shards"):
        write(forged, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_other_folders_can_be_allowed(rows: pd.DataFrame, made: SampleShards, base: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(base / "samples")
    other = table(rows, tmp_path / "scores", made, str(tmp_path / "moved" / "00000.tar"))
    with pytest.raises(WriteError, match="--allow-shards"):
        write(other, tmp_path / "out", allow_shards=[tmp_path / "move"])  # no folder's name
    counts, _ = write(other, tmp_path / "out", allow_shards=[tmp_path / "moved"])
    assert counts.kept == 4
    # A table that a user made of frames, and one that tells nothing.
    dic.to_scores(rows, tmp_path / "own")
    assert write(tmp_path / "own", tmp_path / "own-out")[0].kept == 8
    rows.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(WriteError, match="are not known from its files"):
        write(tmp_path / "plain.parquet", tmp_path / "plain")
    assert write(tmp_path / "plain.parquet", tmp_path / "plain", allow_shards=[made.folder])[0].kept == 8


def test_no_address_is_asked(rows: pd.DataFrame, made: SampleShards, tmp_path: Path) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/latest/meta-data.tar"
        forged = table(rows, tmp_path / "scores", made, address)
        with pytest.raises(WriteError, match="--allow-shards"):
            write(forged, tmp_path / "out")
        server.shutdown()
    assert asked == []


def test_what_is_no_file_is_not_waited_for(rows: pd.DataFrame, made: SampleShards, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name, words in (("pipe.tar", "not a regular file"), ("folder.tar", "not a regular file|Is a directory")):
        mine = rows.head(3).copy()
        mine["shard"] = str(tmp_path / name)
        with pytest.raises((WriteError, OSError), match=words):
            dic.to_webdataset(mine, tmp_path / "out")
    mine["shard"] = None
    with pytest.raises(ValueError, match="does not say where its sample is"):
        dic.to_webdataset(mine, tmp_path / "out")
    null = table(rows, tmp_path / "scores", made, None)
    with pytest.raises(JobError, match="does not say where its sample is"):
        write(null, tmp_path / "out")
    found = dic.read_webdataset(str(tmp_path / "pipe.tar"), backend="pandas").compute()
    assert (found["status"].tolist(), len(found)) == (["read_error"], 1)
    assert "not a regular file" in found["error_message"][0]
