"""How long a card waits for the host: share of the time in which a fake encoder has nothing to do.

    python benchmarks/idle.py --per-shard 1000 10000

Shards go through the real graph on a worker of one thread, as a card has it: one at a time, and two as on a card. The
encoder sleeps as long as a card takes for a batch, the decoder looks at headers and sleeps as long as DALI; both leave
the interpreter lock to others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import common
from host_cost import BATCH, FakeDecoder, FakeEncoder
from made_shards import make_shards

SIDE = 8


class SlowDecoder(FakeDecoder):
    """Takes its time for each image."""

    def __init__(self, seconds: float) -> None:
        super().__init__(SIDE)
        self.seconds = seconds

    def __call__(self, blobs: Any) -> Any:
        batch = super().__call__(blobs)
        time.sleep(self.seconds * len(blobs))
        return batch


class SlowEncoder(FakeEncoder):
    """Takes its time for each image, one batch after another, and notes when."""

    def __init__(self, seconds: float) -> None:
        super().__init__(SIDE)
        self.seconds = seconds
        self.busy: list[tuple[float, float]] = []
        self._card = Lock()

    def encode(self, pixels: Any, batch_size: int) -> Any:
        with self._card:
            begin = time.perf_counter()
            time.sleep(self.seconds * len(pixels))
            self.busy.append((begin, time.perf_counter()))
        return super().encode(pixels, batch_size)


def score(url: str, folder: str, spec: Any) -> int:
    """One shard, from its bytes to its score file."""
    from dask_imgcurator.steps.embed import embed_partition
    from dask_imgcurator.steps.read import ReadSpec, index_partition
    from dask_imgcurator.steps.score_table import write_score_file

    frame = embed_partition(index_partition([url], ReadSpec()), spec)
    write_score_file(frame, f"{folder}/{Path(url).stem}.parquet", {"shard": url}, "pandas", {})
    return len(frame)


def measure(
    urls: list[str], folder: str, overlaps: bool, encoder: SlowEncoder, decoder: SlowDecoder
) -> dict[str, float]:
    """Score shards, and say how long the encoder was idle between its first batch and its last."""
    from distributed import Client, LocalCluster

    from dask_imgcurator.engine.pandas import PandasBackend
    from dask_imgcurator.engine.run import run, tasks, waves
    from dask_imgcurator.models.encoders import EncoderSpec
    from dask_imgcurator.steps import embed, stream

    @contextmanager
    def lend(*_: Any) -> Any:
        yield decoder

    embed.load_encoder, stream._lend_decoder = lambda *_: encoder, lend
    PandasBackend.decoders, PandasBackend.overlaps = 2, overlaps
    spec = embed.EmbedSpec(EncoderSpec("starter"), batch_size=BATCH)
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        before = os.times()
        graphs = waves(urls, lambda names: tasks(names, score, folder, spec, label="score"))
        images = sum(n for _, n in run(client, graphs, "scoring"))
        after = os.times()
    wall = encoder.busy[-1][1] - encoder.busy[0][0]
    busy = sum(end - begin for begin, end in encoder.busy)
    cpu = sum(after[:2]) - sum(before[:2])
    return {
        "idle": round(1 - busy / wall, 3),
        "images_per_s": round(images / wall),
        "cpu_us_per_image": round(1e6 * cpu / images),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-shard", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--encode", type=float, default=345, help="µs an image (default: ViT-L/14 at 2,900 images/s)")
    parser.add_argument("--decode", type=float, default=200, help="µs an image of each of two decoders")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for per_shard in args.per_shard:
            (first,) = make_shards(Path(folder), 1, per_shard, 96)["500x400"]
            urls = [f"{folder}/{per_shard}-{i}.tar" for i in range(args.shards)]
            for url in urls:
                os.link(first, url)
            for name, overlaps in (("one at a time", False), ("two", True)):
                fakes = SlowEncoder(1e-6 * args.encode), SlowDecoder(1e-6 * args.decode)
                found[f"{per_shard} images a shard, {name}"] = measure(urls, folder, overlaps, *fakes)
    result = {"benchmark": "idle", "machine": common.machine(), "versions": common.versions(), "settings": vars(args)}
    common.show({**result, "shards": found}, [(name, str(one)) for name, one in found.items()])


if __name__ == "__main__":
    main()
