"""Ours on some shards, in this process: JSON with images, CPU and wall seconds, loading left out."""

from __future__ import annotations

import argparse
import json
import os
import time


def main() -> None:
    """Embed, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--model", default="ViT-B-32")
    args = parser.parse_args()

    from dask_imgcurator.models.encoders import load_encoder, resolve_encoder
    from dask_imgcurator.steps.embed import EmbedSpec, embed_partition
    from dask_imgcurator.steps.read import ReadSpec, index_partition

    spec = EmbedSpec(resolve_encoder(args.model, "random:0", "float32"))
    load_encoder(spec.encoder)
    begin, before = time.perf_counter(), os.times()
    images = 0
    for url in args.shards:
        images += int(embed_partition(index_partition([url], ReadSpec()), spec)["embedding"].notna().sum())
    wall, after = time.perf_counter() - begin, os.times()
    print(json.dumps({"images": images, "cpu_s": round(sum(after[:4]) - sum(before[:4]), 2), "wall_s": round(wall, 2)}))


if __name__ == "__main__":
    main()
