"""start_client: worker processes on this machine, or a scheduler that runs already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import dask_imgcurator as dic


def threads() -> tuple[int, str | None]:
    import torch

    return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers_times_threads_is_cores(n_workers: int) -> None:
    from dask.system import CPU_COUNT

    with dic.start_client(n_workers=n_workers, backend="pandas") as client:
        found = client.run(threads)
        pids = list(client.run(os.getpid).values())
        assert len(found) == n_workers
        for count, setting in found.values():
            assert count == max(1, CPU_COUNT // n_workers) == int(setting)
        assert os.getpid() not in pids
    # Leaving the block ends the processes too.
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=10)
    assert not alive


def test_close_ends_the_cluster() -> None:
    client = dic.start_client(n_workers=1, backend="pandas")
    (pid,) = client.run(os.getpid).values()
    client.close()
    if psutil.pid_exists(pid):
        psutil.Process(pid).wait(timeout=10)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """A scheduler and a worker as processes of their own, the way a cluster has them."""
    address = tmp_path / "scheduler.json"
    processes = []
    with (tmp_path / "log").open("w") as log:
        for command in (
            ["dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(address)],
            ["dask_worker", "--nthreads", "1", "--scheduler-file", str(address)],
        ):
            module = f"distributed.cli.{command[0]}"
            arguments = [sys.executable, "-m", module, "--no-dashboard", *command[1:]]
            processes.append(subprocess.Popen(arguments, stderr=log, cwd=tmp_path))
        end = time.monotonic() + 60
        while not address.exists():
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield json.loads(address.read_text())["address"]
        for process in processes[::-1]:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


def test_scheduler_that_runs_already(scheduler: str, tmp_path: Any) -> None:
    from dask_imgcurator.checks.samples import make_sample_shards

    made = make_sample_shards(tmp_path / "samples", count=24, per_shard=12)
    result = dic.curate([str(p) for p in made.shards], tmp_path / "run", model="starter", client=scheduler)
    assert result.samples == 24
    # It is still there: it was not ours to end.
    with dic.start_client(scheduler=scheduler) as client:
        assert client.submit(sum, [1, 2]).result() == 3


def test_nothing_answers() -> None:
    with pytest.raises(OSError, match="127\\.0\\.0\\.1:1"):
        dic.start_client(scheduler="tcp://127.0.0.1:1")


def test_options_of_a_new_cluster_do_not_go_with_a_scheduler() -> None:
    with pytest.raises(ValueError, match="n_workers"):
        dic.start_client(2, scheduler="tcp://127.0.0.1:8786")
    with pytest.raises(ValueError, match="at least 1"):
        dic.start_client(0)


def test_embeddings_go_through_shuffles_and_parquet(tmp_path: Path) -> None:
    """Dask's P2P shuffle and pandas' Parquet name a dtype of Arrow lists that pandas alone does not know."""
    import dask.dataframe as dd
    import pandas as pd
    import pyarrow as pa

    from dask_imgcurator.engine.backend import get_backend

    vectors = [[float(i), 1.0] for i in range(40)]
    table = pa.table({"key": [f"k{i:02d}" for i in range(40)], "g": [i % 4 for i in range(40)]})
    table = table.append_column("embedding", pa.array(vectors, pa.list_(pa.float32())))
    frame = get_backend("pandas").from_arrow(table)

    def same(found: Any) -> None:
        found = found.reset_index().sort_values("key")
        assert found["key"].tolist() == frame["key"].tolist()
        assert [list(v) for v in found["embedding"]] == vectors

    with dic.start_client(n_workers=2, backend="pandas"):
        df = dd.from_pandas(frame, npartitions=4)
        other = dd.from_pandas(frame[["key"]].assign(z=1), npartitions=3)
        same(df.shuffle("g").compute())
        same(df.merge(other, on="key").compute())
        same(df.set_index("key").compute())
        same(df.drop_duplicates(subset=["key"], split_out=2).compute())
        df.to_parquet(tmp_path)
        same(dd.read_parquet(tmp_path).compute())
    same(pd.read_parquet(tmp_path))
