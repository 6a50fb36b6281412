"""What writing curated shards costs: CPU and wall µs a sample, and memory, one tar at a time and several.

    python benchmarks/write.py --shards 4 --per-shard 4000

Samples of 80 KB with a caption and JSON, all of them kept; each shard has some hundred MB. One worker of one thread, as
a GPU has it, in this process.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import common


def make_tar(path: Path, count: int) -> None:
    """Samples of three members; bytes that are no JPEGs cost the same."""
    import numpy as np

    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            members = {"jpg": rng.bytes(int(rng.integers(60_000, 100_000))), "txt": b"a caption " * 8, "json": b"{}"}
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{i:09}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def rows(url: str) -> Any:
    """A shard's rows, with the sha256 by which an image is checked."""
    from dask_imgcurator.steps.read import ReadSpec, index_partition
    from dask_imgcurator.storage.tar_read import read_extents

    frame = index_partition([url], ReadSpec())
    images = read_extents(url, zip(frame["offset"], frame["nbytes"], strict=True))
    return frame.assign(sha256=[hashlib.sha256(data).hexdigest() for data in images])


def measure(frame: Any, folder: Path, at_once: int) -> dict[str, float]:
    """Write a frame's samples."""
    from distributed import Client, LocalCluster

    import dask_imgcurator as dic

    os.environ["OMP_NUM_THREADS"] = str(at_once)
    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster):
        frame = frame.persist()
        count = len(frame)
        begin, before = time.perf_counter(), time.process_time()
        dic.to_webdataset(frame, folder)
        wall, cpu = time.perf_counter() - begin, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"cpu_us": round(1e6 * cpu / count), "wall_us": round(1e6 * wall / count), "peak_mb_so_far": peak}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--per-shard", type=int, default=4000)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()

    import dask.dataframe as dd

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tar(folder / "0.tar", args.per_shard)
        found["tar_mb"] = (folder / "0.tar").stat().st_size >> 20
        urls = [str(folder / f"{i}.tar") for i in range(args.shards)]
        for url in urls[1:]:
            os.link(urls[0], url)
        frame = dd.from_map(rows, urls)
        for again in ("first", "again"):
            for at_once in args.at_once:
                found[f"{at_once} at once, {again}"] = measure(frame, folder / f"{at_once}-{again}", at_once)
    result = {"benchmark": "write", "machine": common.machine(), "versions": common.versions(), "settings": vars(args)}
    common.show({**result, "samples": found}, [(name, str(one)) for name, one in found.items()])


if __name__ == "__main__":
    main()
