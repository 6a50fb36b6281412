"""What one would write by hand: webdataset, a DataLoader and open_clip, with its own transform and model.

    python3 -m venv peer && peer/bin/pip install webdataset open_clip_torch

Images that cannot be decoded are skipped. Prints JSON with images, CPU and wall seconds (the loader's processes
included), loading left out.
"""

from __future__ import annotations

import argparse
import json
import os
import time


def main() -> None:
    """Embed, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=1)
    args = parser.parse_args()

    import open_clip
    import torch
    import webdataset

    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(args.model, pretrained=None)
    model.eval()
    skip = webdataset.warn_and_continue
    begin, before = time.perf_counter(), os.times()
    samples = webdataset.WebDataset(args.shards, shardshuffle=False, handler=skip).decode("pil", handler=skip)
    samples = samples.to_tuple("jpg;jpeg;png;webp;gif;bmp;tif;tiff;JPG", handler=skip)
    samples = samples.map_tuple(transform, handler=skip)
    loader = torch.utils.data.DataLoader(samples, batch_size=args.batch_size, num_workers=args.num_workers)
    images = 0
    with torch.inference_mode():
        for (pixels,) in loader:
            images += len(torch.nn.functional.normalize(model.encode_image(pixels), dim=-1))
    del loader
    wall, after = time.perf_counter() - begin, os.times()
    print(json.dumps({"images": images, "cpu_s": round(sum(after[:4]) - sum(before[:4]), 2), "wall_s": round(wall, 2)}))


if __name__ == "__main__":
    main()
