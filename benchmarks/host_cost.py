"""What the host does for an image while a card computes: CPU µs by stage, decoder and encoder do nothing.

    python benchmarks/host_cost.py --images 4000

Reading and hashing leave the interpreter lock to others; the rest is Python that holds it, so its sum bounds the
images/s of a process, however many cores it has. JPEGs of 500 x 400; tensors take the card's part.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from made_shards import make_shards

BATCH = 512  # as on a card


class FakeDecoder:
    """Looks at headers as the real one does, and gives empty pixels."""

    def __init__(self, side: int) -> None:
        import torch

        from dask_imgcurator.images.decoder import Decoder
        from dask_imgcurator.images.preprocess import Preprocess

        preprocess = Preprocess((side, side), (0.5,) * 3, (0.5,) * 3)
        self.real = Decoder(preprocess, BATCH, dali_device="cpu", max_pixels=10**9)
        self.pixels = torch.zeros((BATCH, 3, side, side))

    def __call__(self, blobs: Any) -> Any:
        from dask_imgcurator.images.decoder import Batch
        from dask_imgcurator.images.pillow import quiet

        with quiet:
            infos = [self.real._inspect(blob) for blob in blobs]
        return Batch(self.pixels[: len(blobs)], infos)


class FakeEncoder:
    """Gives one vector to all."""

    width = 768

    def __init__(self, side: int) -> None:
        import torch

        from dask_imgcurator.images.preprocess import Preprocess

        self.preprocess = Preprocess((side, side), (0.5,) * 3, (0.5,) * 3)
        self.vectors = torch.nn.functional.normalize(torch.ones((BATCH, self.width)), dim=1)

    def encode(self, pixels: Any, batch_size: int) -> Any:
        return self.vectors[: len(pixels)]


def cpu_us(work: Callable[[], Any], images: int, rounds: int) -> float:
    """CPU time an image of the calling thread and those that it starts: the least of some rounds, µs."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return round(1e6 * min(times) / images, 1)


def measure(url: str, rounds: int) -> dict[str, float]:
    """All stages of a shard."""
    from dask_imgcurator.engine.backend import get_backend
    from dask_imgcurator.images import dali
    from dask_imgcurator.images.decoder import Batch
    from dask_imgcurator.models.encoders import EncoderSpec
    from dask_imgcurator.steps import embed, stream
    from dask_imgcurator.steps.read import ReadSpec, index_partition
    from dask_imgcurator.storage.tar_index import index_shard
    from dask_imgcurator.storage.tar_read import read_extents

    side = 8  # the pixels are not what is measured
    backend, encoder, decoder = get_backend("pandas"), FakeEncoder(side), FakeDecoder(side)
    spec = embed.EmbedSpec(EncoderSpec("starter"), batch_size=BATCH)
    frame = index_partition([url], ReadSpec())
    n = len(frame)
    host = backend.to_host(frame, embed._LOCATORS).to_pydict()
    extents = list(zip(host["offset"], host["nbytes"], strict=True))
    few = [(offset, 1) for offset, _ in extents]  # Python's part of reading
    blobs = list(read_extents(url, extents, {}, True))
    sizes = [(500, 400)] * n

    def pieces() -> Any:
        for start in range(0, n, BATCH):
            numbers = list(range(start, min(start + BATCH, n)))
            yield stream.Piece(numbers, blobs[start : start + BATCH], ["0" * 64] * len(numbers))

    def hashed() -> None:
        digest, stream._digest = stream._digest, lambda data: None  # what is left is handing over
        try:
            deque(stream._read(host, list(range(n)), BATCH, replace(spec, storage_options={})), maxlen=0)
        finally:
            stream._digest = digest

    def threads() -> Any:
        lend = nullcontext(lambda some: nothing[len(some)])
        return list(stream._decoded(stream._ahead(pieces()), lambda: lend, 1, "cpu"))

    def geometry() -> None:
        for start in range(0, n, BATCH):
            dali.geometry(encoder.preprocess, sizes[start : start + BATCH])

    def inspect() -> Any:
        return [decoder(blobs[start : start + BATCH]) for start in range(0, n, BATCH)]

    infos = [info for batch in inspect() for info in batch.infos]
    nothing = {m: Batch(decoder.pixels[:m], infos[:m]) for m in {BATCH, n % BATCH}}

    def columns() -> Any:
        rows, embedded = embed._Rows(host, ""), embed._Embedded(spec, backend)
        for piece in pieces():
            one = stream.Decoded(piece.numbers, piece.digests, nothing[len(piece.numbers)])
            rows.note(one)
            embedded.add(one, encoder.encode(one.batch.pixels, BATCH))
        return embed._columns(frame, spec, rows, embedded)

    def read(extents: Any) -> None:
        deque(read_extents(url, extents, {}, True), maxlen=0)

    held = {
        "index the tar": cpu_us(lambda: index_shard(url), n, rounds),
        "rows and frame": cpu_us(lambda: index_partition([url], ReadSpec()), n, rounds),
        "read, Python's part": cpu_us(lambda: read(few), n, rounds),
        "hand to the hashers": round(cpu_us(hashed, n, rounds) - cpu_us(lambda: read(extents), n, rounds), 1),
        "inspect": cpu_us(inspect, n, rounds),
        "geometry to feed": cpu_us(geometry, n, rounds),
        "from thread to thread": cpu_us(threads, n, rounds),
        "columns": cpu_us(columns, n, rounds),
    }
    held["rows and frame"] = round(held["rows and frame"] - held["index the tar"], 1)
    return {
        **held,
        "held, in all": round(sum(held.values()), 1),
        "read, whole": cpu_us(lambda: read(extents), n, rounds),
        "hash": cpu_us(lambda: [stream._digest(b) for b in blobs], n, rounds),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (url,) = make_shards(Path(folder), 1, args.images, 96)["500x400"]
        found = measure(url, args.rounds)
    result = {"machine": common.machine(), "versions": common.versions(), "images": args.images, "us_per_image": found}
    common.show(result, [(name, f"{value:6.1f} µs an image") for name, value in found.items()])


if __name__ == "__main__":
    main()
