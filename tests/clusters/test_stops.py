"""Runs that stand still and runs that are stopped: real processes, and an encoder that hangs in each of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.clusters import watch
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.engine.run import Wave, run, tasks

CODE = "from dask_imgcurator.cli.main import main; main()"

#: An encoder that waits for ever, as native code does that hangs: without the GIL.
ENCODER = """
import os, time, torch
from pathlib import Path
from dask_imgcurator.images.preprocess import Preprocess

class Hanging:
    preprocess = Preprocess.from_open_clip({"size": (8, 8), "mode": "RGB", "mean": (0,) * 3, "std": (1,) * 3,
                                            "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0})
    width = 4
    provenance = {}
    def forward(self, pixels):
        Path(os.environ["HANGS"]).touch()
        time.sleep(1e6)

def load(spec, device):
    return Hanging()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=8, per_shard=4)


def test_a_worker_that_is_ended_at_its_memory_limit_says_so() -> None:
    eats = "[b'x' * 2 * 10**9, __import__('time').sleep(60)]"
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit="900 MiB", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        graph = Wave(["00007.tar"], tasks([eats], eval, label="eat"))
        words = r"scoring 00007.tar died .* at their memory limit of 900.00 MiB, with up to \d+[.]\d\d [MG]iB"
        with pytest.raises(JobError, match=words):
            list(run(client, [graph], "scoring"))


class Run:
    """A run of the command line, in a session of its own."""

    def __init__(self, made: SampleShards, folder: Path) -> None:
        about = folder / "site" / "hanging-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("[dask_imgcurator.encoders]\nhanging = hanging:load\n")
        (folder / "site" / "hanging.py").write_text(ENCODER)
        path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
        self.hangs = folder / "hangs"
        options = "--model hanging --no-measures --aesthetic-head none --nsfw-head none --n-workers 1".split()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, "score", str(made.folder), "--out", str(folder / "scores"), *options],
            env={**os.environ, "PYTHONPATH": path, "HANGS": str(self.hangs)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until the encoder hangs."""
        end = time.monotonic() + 60
        while not self.hangs.exists():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.05)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def ended(self, seconds: float) -> str:
        """What it said, once it has ended with all that it started."""
        _, errors = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 1
        assert "Traceback" not in errors
        _, alive = psutil.wait_procs(self.children, timeout=10)
        assert not alive
        return errors


@pytest.fixture
def hanging(made: SampleShards, tmp_path: Path) -> Iterator[Run]:
    started = Run(made, tmp_path)
    try:
        started.wait()
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


def test_a_run_that_stands_still_says_where_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "_STALLED", 1)
    alive = time.monotonic() + 4  # until then it makes progress
    with (
        dask.config.set({"imgcurator.stall-timeout": "3s"}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        graph = Wave(["00007.tar"], tasks([1e6], time.sleep, label="hang"))
        stands = r"scoring 00007\.tar on tcp://127\.0\.0\.1:\d+"
        told = pytest.raises(JobError, match=rf"nothing moved for [3-5] s \(imgcurator.stall-timeout\) while {stands}:")
        with told:
            list(run(client, [graph], "scoring", pulse=lambda: min(time.monotonic(), alive)))
        assert alive + 3 <= time.monotonic() < alive + 20
    assert re.search(f"Nothing moved for [12] s while {stands}; waiting up to 3 s", caplog.text)


@pytest.mark.parametrize("signal_", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_second_signal_ends_a_run_at_once(hanging: Run, signal_: signal.Signals) -> None:
    os.kill(hanging.process.pid, signal_)
    time.sleep(0.5)
    os.kill(hanging.process.pid, signal_)
    assert "stopped at once" in hanging.ended(3)


@pytest.mark.slow
def test_one_signal_ends_a_run_whose_workers_hang(hanging: Run) -> None:
    os.killpg(hanging.process.pid, signal.SIGINT)
    assert "stopped." in hanging.ended(60)
