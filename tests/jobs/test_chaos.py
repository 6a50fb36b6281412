"""What dies during a run costs no result: workers, the client, the scheduler, the disk; file by file as undisturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from trees import contents

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.monitor import Monitor, Progress

OPTIONS: dict[str, Any] = {"model": "starter", "dtype": "float32", "measures": False, "where": "aesthetic_score > 4"}

CODE = "from dask_imgcurator.cli.main import main; main()"

#: How often a worker is killed in the chaos run.
KILLS = int(os.environ.get("CHAOS_KILLS", "100"))


def quiet_run(made: SampleShards, out: Path) -> dict[str, Any]:
    with dic.start_client(2, backend="pandas") as client:
        dic.curate(made.folder.as_posix(), out, client=client, **OPTIONS)
    return results(out)


def results(out: Path) -> dict[str, Any]:
    """All files of a run, but for its record of times and its page."""
    return {name: held for name, held in contents(out).items() if name not in ("run.json", "report.html")}


class Killer(Monitor):
    """Kills a worker's process by chance, each time that some shards were done."""

    def __init__(self, kills: int, every: int) -> None:
        super().__init__()
        self.kills, self._every, self._next, self._random = kills, every, every, random.Random(0)

    def progress(self, state: Progress) -> None:
        if self.kills and state.shards >= self._next:
            self._next = state.shards + self._every
            workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
            if workers:
                self._random.choice(workers).kill()
                self.kills -= 1

    def again(self) -> None:
        """Another run begins to count."""
        self._next = self._every


@pytest.mark.chaos
def test_many_kills_change_nothing(tmp_path: Path) -> None:
    made = make_sample_shards(tmp_path / "samples", count=2 * 3 * KILLS, per_shard=2)
    undisturbed = quiet_run(made, tmp_path / "quiet")
    killer, runs = Killer(KILLS, every=3), 0
    tolerant = dask.config.set({"distributed.scheduler.allowed-failures": 3})
    with tolerant, dic.start_client(2, backend="pandas") as client:
        while True:
            runs += 1
            try:
                dic.curate(made.folder.as_posix(), tmp_path / "chaos", client=client, monitor=killer, **OPTIONS)
                break
            except JobError as err:
                assert runs < 10, err
                killer.again()
    print(f"{KILLS - killer.kills} kills in {runs} runs")
    assert killer.kills <= KILLS // 10  # the last shards are done before some of them
    assert results(tmp_path / "chaos") == undisturbed


@pytest.mark.slow
def test_a_worker_that_dies_again_is_not_given_up() -> None:
    """Dask looks 15 s after a death whether the worker is there; here it is dead again just then."""

    def kill() -> float:
        client.wait_for_workers(1, timeout=60)
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    with dic.start_client(1, backend="pandas") as client:
        first = kill()
        time.sleep(first + 14.8 - time.monotonic())
        kill()
        time.sleep(max(0, first + 17 - time.monotonic()))
        client.wait_for_workers(1, timeout=30)
        assert client.submit(lambda: 1).result(timeout=30) == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=48, per_shard=4)


@pytest.fixture(scope="module")
def undisturbed(made: SampleShards, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return quiet_run(made, tmp_path_factory.mktemp("quiet") / "run")


def run(made: SampleShards, out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = f"curate {made.folder} --out {out} --model starter --dtype float32 --no-measures".split()
    arguments += ["--where", "aesthetic_score > 4", *(more or ("--n-workers", "2"))]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def wait_for_scores(out: Path) -> None:
    end = time.monotonic() + 120
    while not any(out.glob("scores/*.parquet")):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_client_that_is_killed(made: SampleShards, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = run(made, out)
    wait_for_scores(out)
    process.kill()
    process.communicate()
    again = run(made, out)
    _, told = again.communicate(timeout=300)
    assert again.returncode == 0, told
    assert "finished already" in told
    assert results(out) == undisturbed


@contextlib.contextmanager
def scheduler(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler and two workers with nannies."""
    file, log = folder / "scheduler.json", (folder / "log").open("w")
    common: Any = {"stderr": log, "stdout": log, "cwd": folder}
    module = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    first = subprocess.Popen([*module, "--no-dashboard", "--scheduler-file", str(file)], **common)
    while not file.exists():
        time.sleep(0.05)
    module = [sys.executable, "-m", "distributed.cli.dask_worker", "--nworkers", "2", "--nthreads", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}
    workers = subprocess.Popen([*module, "--no-dashboard", "--scheduler-file", str(file)], env=env, **common)
    try:
        yield str(file), first
    finally:
        for process in (workers, first):
            process.terminate()
            process.wait(timeout=60)
        log.close()


@pytest.mark.slow
def test_a_scheduler_that_is_killed(made: SampleShards, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with scheduler(tmp_path / "one") as (file, process):
        first = run(made, out, "--scheduler-file", file)
        wait_for_scores(out)
        process.kill()
        _, told = first.communicate(timeout=120)
        assert first.returncode == 1, told
        assert "lost the cluster" in told and "rerun the same command to resume" in told
    with scheduler(tmp_path / "two") as (file, _):
        again = run(made, out, "--scheduler-file", file)
        _, told = again.communicate(timeout=300)
        assert again.returncode == 0, told
    assert results(out) == undisturbed


@pytest.mark.slow
def test_a_worker_that_stands_still_for_a_while(
    made: SampleShards, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    stopped: list[psutil.Process] = []

    class Stops(Monitor):
        def progress(self, state: Progress) -> None:
            if state.shards >= 2 and not stopped:
                workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
                stopped.append(workers[0])
                workers[0].send_signal(signal.SIGSTOP)
                threading.Timer(15, workers[0].send_signal, [signal.SIGCONT]).start()

    with dic.start_client(2, backend="pandas") as client:
        dic.curate(made.folder.as_posix(), tmp_path / "run", client=client, monitor=Stops(), **OPTIONS)
    assert stopped
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("full", ["scores", "shards"])
def test_a_full_disk(full: str, made: SampleShards, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = out / full
    small.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        first = run(made, out)
        _, told = first.communicate(timeout=300)
        assert first.returncode == 1
        assert "No space left on device" in told and "Traceback" not in told
        assert not [p for p in small.iterdir() if p.name.startswith(".partial-")]
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        again = run(made, out)
        _, told = again.communicate(timeout=300)
        assert again.returncode == 0, told
        assert results(out) == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
