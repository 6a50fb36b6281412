"""Machines of a cluster that see less than others, or other things: real schedulers and workers."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
import pyarrow.parquet as pq
import pytest
from distributed import Client

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.clusters import watch
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.monitor import Monitor, Progress

OPTIONS: dict[str, Any] = {"model": "starter", "dtype": "float32", "backend": "pandas"}


@pytest.fixture
def made(tmp_path: Path) -> SampleShards:
    return make_sample_shards(tmp_path / "samples", count=64, per_shard=4)


@contextlib.contextmanager
def cluster(tmp_path: Path, workers: Sequence[tuple[str, Mapping[str, str]]]) -> Iterator[Client]:
    """A scheduler and workers, each at an address of its own and with a command before it and more environment."""
    address, python = tmp_path / "scheduler.json", shlex.quote(sys.executable)
    commands = [(f"exec {python} -m distributed.cli.dask_scheduler --port 0 --host 127.0.0.1", {})]
    for number, (before, env) in enumerate(workers, 2):
        worker = f"{python} -m distributed.cli.dask_worker --no-nanny --nthreads 1 --host 127.0.0.{number}"
        commands.append((f"{before or 'exec'} {worker}", dict(env)))
    with (tmp_path / "log").open("w") as log, contextlib.ExitStack() as stack:
        for command, env in commands:
            full = f"{command} --no-dashboard --scheduler-file {address}"
            process = subprocess.Popen(["sh", "-c", full], stderr=log, cwd=tmp_path, env={**os.environ, **env})
            stack.callback(process.wait, timeout=30)
            stack.callback(process.terminate)
        end = time.monotonic() + 60
        while not address.exists():
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        with Client(json.loads(address.read_text())["address"]) as client:
            client.wait_for_workers(len(workers), timeout=60)
            yield client


@pytest.fixture
def without(made: SampleShards) -> str:
    """A command under which the samples' folder is empty: a machine without the mount."""
    mount = f"mount -t tmpfs none {shlex.quote(str(made.folder))}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    return f"exec unshare -m sh -c '{mount} && exec \"$@\"' sh"


@pytest.mark.slow
def test_a_machine_without_the_mount_costs_nothing(made: SampleShards, without: str, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    with cluster(tmp_path, [("", {}), (without, {})]) as client:
        result = dic.score_shards([str(p) for p in made.shards], out, client=client, **OPTIONS)
    assert (result.samples, result.shards_scored) == (len(made.manifest), len(made.shards))
    found = [row for path in out.glob("*.parquet") for row in pq.read_table(path, columns=["key"])["key"].to_pylist()]
    assert sorted(found) == sorted(made.manifest)
    assert "read_error" not in result.by_status


def test_shards_that_no_machine_sees_are_no_data(made: SampleShards, without: str, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    told = pytest.raises(JobError, match=r"000\d\d\.tar failed.*nearly all: .*: FileNotFoundError: .*\.tar")
    with cluster(tmp_path, [(without, {})]) as client, told:
        dic.score_shards([str(p) for p in made.shards], out, client=client, **OPTIONS)
    assert list(out.glob("*.parquet")) == []


def test_machines_with_other_versions_are_told(made: SampleShards, tmp_path: Path) -> None:
    about = tmp_path / "other" / "dask_imgcurator-9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dask-imgcurator\nVersion: 9.9\n")
    path = os.pathsep.join([str(about.parent), os.environ.get("PYTHONPATH", "")])
    with cluster(tmp_path, [("", {}), ("", {"PYTHONPATH": path})]) as client:
        with pytest.raises(JobError, match=r"versions\.dask_imgcurator is .*9\.9"):
            dic.score_shards([str(p) for p in made.shards], tmp_path / "scores", client=client, **OPTIONS)
        versions = set()
        for table in (tmp_path / "scores").glob("*.parquet"):
            metadata = json.loads(pq.read_schema(table).metadata[b"imgcurator"])
            versions.add(metadata["versions"]["dask_imgcurator"])
        assert len(versions) <= 1


def test_a_run_without_workers_ends(made: SampleShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last worker dies, without a nanny that would start another; and a scheduler that never had one."""

    class Killer(Monitor):
        def progress(self, state: Progress) -> None:
            if state.shards:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(watch, "LOOK", 1)
    with cluster(tmp_path, [("", {})]) as client, dask.config.set({"imgcurator.worker-timeout": "3s"}):
        pids = set(client.run(os.getpid).values())
        urls = [str(p) for p in made.shards]
        with pytest.raises(JobError, match=r"no worker for scoring at tcp://127.* for 3 s .*: start one"):
            dic.score_shards(urls, tmp_path / "scores", client=client, monitor=Killer(), **OPTIONS)
        done = list((tmp_path / "scores").glob("*.parquet"))
        assert done
        with pytest.raises(JobError, match="no worker for loading the model"):
            dic.score_shards(urls, tmp_path / "scores", client=client, **OPTIONS)
        assert list((tmp_path / "scores").glob("*.parquet")) == done


def test_a_relative_folder_is_the_client_s(made: SampleShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have working folders of their own."""
    (tmp_path / "here").mkdir()
    with cluster(tmp_path, [("", {})]) as client:  # whose processes work in tmp_path
        monkeypatch.chdir(tmp_path / "here")
        urls = [os.path.relpath(p) for p in made.shards[:2]]
        result = dic.curate(urls, "run", client=client, **OPTIONS)
        dic.write_selection("run/scores", "more", client=client)
        dic.export_scores("run/scores", "index", "clip-retrieval", client=client)
    assert result.kept
    assert {p.name for p in (tmp_path / "here" / "run").iterdir()} >= {"scores", "shards", "report.html", "run.json"}
    assert (tmp_path / "here" / "run" / "shards" / "00000.tar").exists()
    assert (tmp_path / "here" / "more" / "00000.tar").exists()
    assert any((tmp_path / "here" / "index").rglob("*.npy"))
    assert not {p.name for p in tmp_path.iterdir()} & {"run", "more", "index"}
