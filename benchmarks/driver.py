"""What a run over many shards costs the client and the scheduler: memory, CPU time, and a rerun with nothing to do.

    python benchmarks/driver.py --shards 10000          # real shards of two tiny images, an encoder that costs nothing
    python benchmarks/driver.py --graphs 100000         # only builds the graphs, as the client does

The scheduler and the worker are processes of their own; memory is resident, sampled twice a second.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PLUGIN = '''
import torch
from dask_imgcurator.images.preprocess import Preprocess

class Free:
    """An encoder that costs nothing."""
    preprocess = Preprocess.from_open_clip({"size": (8, 8), "mode": "RGB", "mean": (0,) * 3, "std": (1,) * 3,
                                            "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0})
    width = 4
    provenance = {}
    def forward(self, pixels):
        return torch.ones(len(pixels), 4, dtype=pixels.dtype)

def load(spec, device):
    return Free()
'''


def make_shards(folder: Path, n: int) -> list[str]:
    """Write n tars of two tiny images."""
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 90)).save(png, "PNG")
    folder.mkdir(parents=True)
    for i in range(n):
        with tarfile.open(folder / f"{i:06d}.tar", mode="w") as file:
            for k in range(2):
                info = tarfile.TarInfo(f"{i:06d}{k}.png")
                info.size = len(png.getvalue())
                file.addfile(info, io.BytesIO(png.getvalue()))
    return [str(folder / f"{i:06d}.tar") for i in range(n)]


def install_encoder(site: Path) -> None:
    """Register the encoder as a package would."""
    about = site / "free_encoder-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: free-encoder\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dask_imgcurator.encoders]\nfree = free_encoder:load\n")
    (site / "free_encoder.py").write_text(PLUGIN)


@contextmanager
def processes(folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, psutil.Process, psutil.Process]]:
    """Start a scheduler and a worker; yields the address, and both processes."""
    where = folder / "scheduler.json"
    common = [sys.executable, "-m", "distributed.cli"]
    scheduler = subprocess.Popen(
        [f"{common[0]}", "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(where), "--no-dashboard"]
        + ["--host", "127.0.0.1", "--port", "0"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    worker = subprocess.Popen(
        [f"{common[0]}", "-m", "distributed.cli.dask_worker", "--scheduler-file", str(where), "--nthreads", "1"]
        + ["--no-dashboard", "--no-nanny", "--local-directory", str(folder)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not where.exists():
            time.sleep(0.1)
        yield json.loads(where.read_text())["address"], psutil.Process(scheduler.pid), psutil.Process(worker.pid)
    finally:
        worker.terminate(), scheduler.terminate()
        worker.wait(), scheduler.wait()


def run(n: int) -> None:
    """Score n shards, then again with nothing to do."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        install_encoder(folder / "site")
        shards = make_shards(folder / "shards", n)
        path = os.pathsep.join([str(folder / "site"), *sys.path])
        os.environ["PYTHONPATH"] = path
        sys.path.insert(0, str(folder / "site"))

        import dask_imgcurator as dic
        from dask_imgcurator.monitor import Monitor, Progress

        with processes(folder, dict(os.environ)) as (address, scheduler, worker):
            me = psutil.Process()
            watched = {"client": me, "scheduler": scheduler, "worker": worker}

            def memory() -> dict[str, float]:
                return {name: p.memory_info().rss / 1e6 for name, p in watched.items()}

            def cpu() -> dict[str, float]:
                return {name: sum(p.cpu_times()[:2]) for name, p in watched.items()}

            peak = memory()
            stopped = threading.Event()

            def sample() -> None:
                while not stopped.wait(0.5):
                    for name, mb in memory().items():
                        peak[name] = max(peak[name], mb)

            threading.Thread(target=sample, daemon=True).start()

            class Told(Monitor):
                """Prints memory as the run goes on."""

                last = -1

                def progress(self, state: Progress) -> None:
                    step = state.shards * 10 // n
                    if step > self.last:
                        self.last = step
                        print(
                            f"  {state.shards:,} shards: " + ", ".join(f"{k} {v:.0f} MB" for k, v in memory().items())
                        )

            for what in ("scored", "nothing to do"):
                before, began = cpu(), time.perf_counter()
                result = dic.score_shards(
                    shards,
                    folder / "scores",
                    model="free",
                    measures=False,
                    aesthetic_head="none",
                    nsfw_head="none",
                    client=address,
                    monitor=Told(),
                )
                spent = {name: seconds - before[name] for name, seconds in cpu().items()}
                print(
                    f"{what}: {result.shards_scored:,} of {n:,} shards in {time.perf_counter() - began:.1f} s; CPU "
                    + ", ".join(f"{k} {v:.1f} s" for k, v in spent.items())
                )
            stopped.set()
            print("peak: " + ", ".join(f"{k} {v:.0f} MB" for k, v in peak.items()))


def graphs(n: int) -> None:
    """Build the graphs of n shards, a wave after another, and keep the two that are in flight."""
    from dask_imgcurator.engine.run import waves
    from dask_imgcurator.jobs.score import score_graph
    from dask_imgcurator.monitor import Monitor
    from dask_imgcurator.runs.measured import Last
    from dask_imgcurator.runs.plan import ScoreOptions, Target, make_plan
    from dask_imgcurator.select.settle import settled_where

    options = ScoreOptions(model="starter", backend="pandas")
    urls = [f"/data/{i:06d}.tar" for i in range(n)]
    plan, _ = make_plan(urls, options, None, Monitor())
    targets = {url: Target(url, url + ".parquet", "size=1 mtime_ns=1") for url in urls}
    me = psutil.Process()
    start, began = me.memory_info().rss, time.process_time()
    tasks, kept = 0, []
    for wave in waves(
        urls, lambda names: score_graph([targets[name] for name in names], plan, Last(settled_where(None)))
    ):
        graph = dict(wave.frame.optimize().__dask_graph__())
        tasks += len(graph)
        kept = [*kept[-1:], graph]
    print(
        f"{n:,} shards: {tasks:,} tasks in {time.process_time() - began:.1f} CPU s, "
        f"{(me.memory_info().rss - start) / 1e6:.0f} MB more"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--graphs", type=int)
    given = parser.parse_args()
    if given.shards:
        run(given.shards)
    if given.graphs:
        graphs(given.graphs)
