"""Shards of made-up JPEGs, in the sizes that datasets have."""

from __future__ import annotations

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: Name of the set and the range of its pictures' sizes, pixels.
SIZES = {"500x400": (0.15e6, 0.25e6), "1-2 MP": (1e6, 2e6)}


def make_picture(rng: Any, pixels: float) -> bytes:
    """Make a JPEG of waves and grain, about 2 bits a pixel as photographs have at this quality."""
    import numpy as np
    from PIL import Image

    ratio = rng.choice([4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3])
    width, height = int((pixels * ratio) ** 0.5), int((pixels / ratio) ** 0.5)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x * rng.uniform(0, 0.05) + y * rng.uniform(0, 0.05) + rng.uniform(0, 6)) for _ in range(3)]
    picture = 127.5 + 100 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_shards(folder: Path, shards: int, per_shard: int, distinct: int) -> dict[str, list[str]]:
    """Write the sets of `SIZES`; pictures are repeated under other keys, which costs the decoder no less."""
    import numpy as np

    sets: dict[str, list[str]] = {}
    for number, (name, sizes) in enumerate(SIZES.items()):
        seeds = np.random.SeedSequence(number).spawn(distinct)

        def make(seed: Any, sizes: tuple[float, float] = sizes) -> bytes:
            rng = np.random.default_rng(seed)
            return make_picture(rng, rng.uniform(*sizes))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            pictures = list(pool.map(make, seeds))
        sets[name] = []
        for shard in range(shards):
            path = folder / f"{number}{shard:04}.tar"
            with tarfile.open(path, "w") as tar:
                for i in range(per_shard):
                    info = tarfile.TarInfo(f"{shard:04}{i:05}.jpg")
                    info.size = len(pictures[i % distinct])
                    tar.addfile(info, io.BytesIO(pictures[i % distinct]))
            sets[name].append(str(path))
    return sets
