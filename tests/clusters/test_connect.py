"""Connecting to schedulers: addresses, files, certificates, and machines that lack something; real processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
import pytest
from certificates import Authority
from distributed import Client

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.clusters.connect import extras, lacking
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.engine.run import place
from dask_imgcurator.monitor import Monitor

CODE = "from dask_imgcurator.cli.main import main; main()"

BARE = [sys.executable, "-S", "-m"]  # without site-packages


@contextlib.contextmanager
def processes(folder: Path, *commands: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[str]:
    """A scheduler, and workers if any, by their commands; the file with the address."""
    file, started = folder / "scheduler.json", []
    with (folder / "log").open("w") as log:
        try:
            for command in commands:
                arguments = [*command, "--no-dashboard", "--scheduler-file", str(file)]
                started.append(subprocess.Popen(arguments, stderr=log, cwd=folder, env={**os.environ, **(env or {})}))
                end = time.monotonic() + 60
                while not file.exists():
                    assert time.monotonic() < end, (folder / "log").read_text()
                    time.sleep(0.05)
            yield str(file)
        finally:
            for process in started[::-1]:
                process.kill()  # workers whose scheduler is gone may wait for it
            for process in started:
                process.wait(timeout=30)


def scheduler(*arguments: str, python: Sequence[str] = (sys.executable, "-m")) -> list[str]:
    return [*python, "distributed.cli.dask_scheduler", "--port", "0", *arguments]


def worker(*arguments: str, python: Sequence[str] = (sys.executable, "-m")) -> list[str]:
    return [*python, "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", *arguments]


def tls(authority: Authority, name: str) -> list[str]:
    cert, key = authority.pair(name)
    return ["--tls-ca-file", authority.ca, "--tls-cert", cert, "--tls-key", key]


def certificates(authority: Authority | None, cert: str | None, key: str | None) -> Any:
    """Dask's settings of a client."""
    settings = {"ca-file": authority and authority.ca, "client.cert": cert, "client.key": key}
    return dask.config.set({f"distributed.comm.tls.{name}": value for name, value in settings.items()})


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(given, capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False)


def test_a_scheduler_with_certificates(tmp_path: Path) -> None:
    own, other = Authority(tmp_path / "own"), Authority(tmp_path / "other")
    made = make_sample_shards(tmp_path / "samples", count=4, per_shard=4)
    dic.score_shards(made.folder, tmp_path / "scores", model="starter", measures=False, client=1)
    select = ["select", str(tmp_path / "scores"), "--where", "width > 0", "--quiet", "--overwrite"]
    select += ["--out", str(tmp_path / "out"), "--scheduler-file"]
    commands = [
        scheduler("--protocol", "tls", "--host", "tls://127.0.0.1", *tls(own, "scheduler")),
        worker("--host", "tls://127.0.0.1", *tls(own, "worker")),
    ]
    with processes(tmp_path, *commands) as file:
        done = command(*select, file, *tls(own, "client"))
        assert (done.returncode, done.stderr) == (0, "")
        assert any((tmp_path / "out").glob("*.parquet"))
        # By Dask's own settings, and what does not fit.
        with certificates(own, *own.pair("again")), dic.start_client(scheduler=file) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        cert, key = own.pair("client")
        for words, authority, *pair in (
            ("needs certificates: --tls-ca-file", None, None, None),
            ("needs certificates: --tls-ca-file", own, None, None),
            (r"certificates do not fit \(\w*UNKNOWN_CA", own, *other.pair("client")),
            (r"certificates do not fit \(CERTIFICATE_VERIFY_FAILED", other, cert, key),
            ("certificates cannot be used .*KEY_VALUES_MISMATCH", own, cert, other.pair("x")[1]),
        ):
            told = pytest.raises((ValueError, ConnectionError), match=words)
            with certificates(authority, *pair), told as error:
                dic.start_client(scheduler=file)
            assert "\n" not in str(error.value)
        plain = json.loads(Path(file).read_text())["address"].replace("tls://", "tcp://")
        with pytest.raises(TimeoutError, match="perhaps it wants tls://"):
            dic.start_client(scheduler=plain)


def test_the_scheduler_of_dask_s_settings_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with processes(tmp_path, scheduler("--host", "127.0.0.1"), worker("--host", "127.0.0.1")) as file:
        address = json.loads(Path(file).read_text())["address"]
        with dask.config.set({"scheduler-address": address}), dic.start_client() as client:
            assert client.scheduler.address == address
        rows = make_sample_shards(tmp_path / "samples", count=4, per_shard=4)
        select = ["score", str(rows.folder), "--out", str(tmp_path / "scores"), "--model", "starter", "--quiet"]
        done = command(*select, DASK_SCHEDULER_ADDRESS="tcp://127.0.0.1:1")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "no scheduler answers at tcp://127.0.0.1:1" in done.stderr


def bare(folder: Path, without: Sequence[str]) -> dict[str, str]:
    """An environment with all packages that are installed here, but for some."""
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith((*without, "__editable__")):
            (folder / path.name).symlink_to(path)
    return {"PYTHONPATH": str(folder)}


def test_machines_that_lack_the_package_are_named(tmp_path: Path) -> None:
    env = bare(tmp_path / "site", ["dask_imgcurator"])
    commands = [scheduler("--host", "127.0.0.1", python=BARE), worker("--host", "127.0.0.1", python=BARE)]
    told = pytest.raises(JobError, match=r"the scheduler at tcp://127\.0\.0\.1:.* lacks the package dask-imgcurator")
    with processes(tmp_path, *commands, env=env) as file, told:
        dic.start_client(scheduler=file)
    (tmp_path / "scheduler.json").unlink(missing_ok=True)
    with processes(tmp_path, scheduler("--host", "127.0.0.1")) as file:
        process = subprocess.Popen(
            [*commands[1], "--scheduler-file", file], env={**os.environ, **env}, stderr=subprocess.DEVNULL, cwd=tmp_path
        )
        try:
            with Client(scheduler_file=file) as client:
                client.wait_for_workers(1, timeout=30)
                told = pytest.raises(JobError, match=r"the worker tcp://127.* lacks the package dask-imgcurator")
                with told:
                    dic.start_client(scheduler=file)
                with told, place(client, "pandas", Monitor()):
                    pass
        finally:
            process.kill()
            process.wait(timeout=30)


def test_workers_that_lack_an_extra_are_named(tmp_path: Path) -> None:
    assert "pillow-heif" in extras()
    env = bare(tmp_path / "site", ["pillow_heif", "dask_imgcurator"])
    for path in (Path(dic.__file__).parent, next(Path(sysconfig.get_path("purelib")).glob("dask_imgcurator-*"))):
        (tmp_path / "site" / path.name).symlink_to(path)
    commands = [scheduler("--host", "127.0.0.1"), worker("--host", "127.0.0.1", python=BARE)]
    with processes(tmp_path, *commands, env=env) as file, dic.start_client(scheduler=file) as client:
        client.wait_for_workers(1, timeout=30)
        (note,) = lacking(client)
    assert "lacks pillow-heif, which this machine has" in note


@pytest.mark.parametrize("content", ["", "[]", "{}", "text"])
def test_a_file_without_an_address(content: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match="holds no scheduler's address"):
        dic.start_client(scheduler=str(tmp_path / "file"))


def test_where_no_scheduler_is() -> None:
    with pytest.raises(OSError, match=r"no scheduler answers at tcp://127\.0\.0\.1:1"):
        dic.start_client(scheduler="tcp://127.0.0.1:1")
