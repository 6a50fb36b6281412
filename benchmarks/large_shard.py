"""Memory for one very large shard: whether it is bounded by the batch, or grows with the shard.

    python benchmarks/large_shard.py --count 50000 --nbytes 5e9

Makes a shard of JPEGs (some photographs, each made another file by a comment of random bytes, which also brings it to
its size), scores it in one worker process, and writes every tenth sample to a curated shard; the worker's memory is
sampled all the while. With --s3 the shard is read from, and written to, a local S3 server (moto's).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import struct
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import psutil

import dask_imgcurator as dic


def pictures(count: int) -> list[bytes]:
    """JPEGs of about 500 x 400 pixels, cut from scikit-image's photographs."""
    import skimage.data
    from PIL import Image

    chance = random.Random(0)
    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    out = []
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = chance.randrange(photo.width // 4), chance.randrange(photo.height // 4)
        data = io.BytesIO()
        photo.crop((left, top, photo.width, photo.height)).resize((500, 400)).save(data, "JPEG", quality=85)
        out.append(data.getvalue())
    return out


def padded(jpeg: bytes, nbytes: int, chance: random.Random) -> bytes:
    """Add comment segments of random bytes behind the first marker."""
    missing = max(16, nbytes - len(jpeg))
    segments = []
    while missing > 4:
        length = min(missing - 4, 65_000)
        segments.append(b"\xff\xfe" + struct.pack(">H", length + 2) + chance.randbytes(length))
        missing -= length + 4
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def make_shard(path: Path, count: int, nbytes: int) -> None:
    """Write the shard."""
    chance, photos = random.Random(1), pictures(64)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            for ext, data in (("jpg", padded(photos[i % 64], nbytes // count, chance)), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{i:08d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


class Watch:
    """Samples the memory of a process."""

    def __init__(self, pid: int) -> None:
        self.process, self.peak, self.stop = psutil.Process(pid), 0, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.stop.wait(0.05):
            with contextlib.suppress(psutil.Error):
                self.peak = max(self.peak, self.process.memory_info().rss)

    def take(self) -> int:
        """Return the peak since the last call, bytes."""
        peak, self.peak = self.peak, 0
        return peak


@contextlib.contextmanager
def storage(folder: Path, s3: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the address of the working folder: itself, or a bucket of a local server."""
    if not s3:
        yield str(folder), {}
        return
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "test", "endpoint_url": f"http://{host}:{port}"}
    fsspec.filesystem("s3", **options).mkdir("bench")
    yield "s3://bench", options
    server.stop()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it all."""
    out: dict[str, Any] = {"benchmark": "large_shard", "machine": common.machine(), "settings": vars(args)}
    path = folder / "large.tar"
    make_shard(path, args.count, int(args.nbytes))
    out["shard_nbytes"] = path.stat().st_size
    with storage(folder, args.s3) as (base, options), dic.start_client(n_workers=1, backend="pandas") as client:
        if args.s3:
            import fsspec

            fsspec.filesystem("s3", **options).put_file(str(path), "bench/large.tar")
        ((pid, _),) = client.run(lambda: (__import__("os").getpid(), 0)).values()
        watch = Watch(pid)
        remote = {"storage_options": options, "out_options": options}
        make_shard(folder / "small.tar", 64, 64 * 10_000)
        dic.score_shards(
            folder / "small.tar", folder / "warm", model=args.model, pretrained=args.pretrained, client=client
        )
        out["peak_small_shard"] = watch.take()
        begin = time.perf_counter()
        result = dic.score_shards(
            f"{base}/large.tar", f"{base}/scores", model=args.model, pretrained=args.pretrained, client=client, **remote
        )
        out["score_seconds"], out["peak_scoring"] = time.perf_counter() - begin, watch.take()
        assert result.by_status == {"ok": args.count}
        begin = time.perf_counter()
        selection, written = dic.write_selection(
            f"{base}/scores",
            f"{base}/curated",
            "offset % 10 == 2",  # data begin at multiples of 512: every fifth
            client=client,
            storage_options=options,
            source_options=options,
        )
        out["write_seconds"], out["peak_writing"] = time.perf_counter() - begin, watch.take()
        out["written"], out["written_nbytes"] = selection.kept, sum(w["nbytes"] for w in written)
        watch.stop.set()
    return out


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    gb = 1e9
    return [
        ("shard", f"{result['settings']['count']:,} samples, {result['shard_nbytes'] / gb:.2f} GB"),
        ("model", f"{result['settings']['model']} {result['settings']['pretrained'] or ''}"),
        ("worker's peak memory, shard of 64 small images", f"{result['peak_small_shard'] / gb:.2f} GB"),
        ("worker's peak memory, scoring", f"{result['peak_scoring'] / gb:.2f} GB in {result['score_seconds']:.0f} s"),
        ("worker's peak memory, writing", f"{result['peak_writing'] / gb:.2f} GB in {result['write_seconds']:.0f} s"),
        ("written", f"{result['written']:,} samples, {result['written_nbytes'] / gb:.2f} GB"),
    ]


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--nbytes", type=float, default=5e9)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--pretrained")
    parser.add_argument("--s3", action="store_true", help="read from and write to a local S3 server")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    common.show(result, rows(result))


if __name__ == "__main__":
    main()
