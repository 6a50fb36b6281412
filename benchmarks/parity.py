"""Whether embeddings are those of open_clip: our decoding and preprocessing against its own, on the same weights.

    python benchmarks/parity.py SHARDS --model ViT-B-32 --pretrained random:0

Every image that Pillow can decode goes both ways: through this library's decoder and encoder, and through Pillow,
open_clip's own transform and its own model (for the starter, which open_clip does not have: its transform, our model).
By default both are float32, so that what is left is the difference of the pixels. With --dtype only ours changes.
"""

from __future__ import annotations

import argparse
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import common
import torch
from PIL import Image

from dask_imgcurator import config, starter
from dask_imgcurator.decode import BadImage, Decoder
from dask_imgcurator.models import EncoderSpec, load_encoder
from dask_imgcurator.score import settle_decoder
from dask_imgcurator.shards import index_shard, read_extents

__all__ = ["Difference", "compare", "open_clip_path"]

Transform = Callable[[Image.Image], torch.Tensor]
Encode = Callable[[torch.Tensor], torch.Tensor]

#: The worst images that are named.
WORST = 5


@dataclass
class Difference:
    """Differences of one group of images.

    Attributes
    ----------
    cosine : list of float
        Of both embeddings, for each image.
    other : list of float
        Of open_clip's embedding with that of another image: what a cosine must stand out from. (Random weights make
        all images look alike.)
    pixel_mean, pixel_max : list of float
        Of the absolute difference of the preprocessed pixels, for each image; black to white is 255.
    names : list of str
        Shard and key of each image.
    """

    cosine: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    pixel_mean: list[float] = field(default_factory=list)
    pixel_max: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Give the figures of the whole group."""
        n = len(self.cosine)
        return {
            "images": n,
            "cosine_min": min(self.cosine),
            "cosine_mean": sum(self.cosine) / n,
            "cosine_of_other_images_mean": sum(self.other) / n,
            "pixel_mean": sum(self.pixel_mean) / n,
            "pixel_max": max(self.pixel_max),
        }

    def worst(self) -> list[dict[str, Any]]:
        """Name the images with the lowest cosine."""
        order = sorted(range(len(self.cosine)), key=self.cosine.__getitem__)[:WORST]
        return [{"image": self.names[i], "cosine": self.cosine[i], "pixel_max": self.pixel_max[i]} for i in order]


def open_clip_path(spec: EncoderSpec, device: str) -> tuple[Transform, Encode]:
    """Make open_clip's own transform and model, in float32.

    Parameters
    ----------
    spec : dask_imgcurator.models.EncoderSpec
        The model and weights.
    device : str
        torch device.

    Returns
    -------
    callable, callable
        From a Pillow image to pixels (3, height, width); from a batch of these to L2-normalised embeddings (n, d).
    """
    import open_clip

    if spec.is_starter:
        cfg = open_clip.transform.PreprocessCfg(**starter.PREPROCESS)
        ours = load_encoder(EncoderSpec("starter", dtype="float32"), device)
        return open_clip.transform.image_transform_v2(cfg, is_train=False), ours

    random = re.fullmatch(r"random:(\d+)", spec.pretrained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if random:
            torch.manual_seed(int(random[1]))
        model, _, transform = open_clip.create_model_and_transforms(
            spec.model, pretrained=None if random else spec.pretrained or None, precision="fp32", device=device
        )
    model.eval()

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return model.encode_image(pixels.to(device), normalize=True)

    return transform, encode


def reference_pixels(data: bytes, transform: Transform) -> torch.Tensor | None:
    """Decode and preprocess an image as a user of open_clip would; None where Pillow cannot decode it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return transform(image)


def batches(urls: list[str], size: int) -> Iterator[list[tuple[str, bytes]]]:
    """Yield names and bytes of the shards' images."""
    batch: list[tuple[str, bytes]] = []
    for url in urls:
        found = [(s.key, m) for s in index_shard(url).samples if (m := s.image()) is not None]
        blobs = read_extents(url, [(m.offset, m.nbytes) for _, m in found])
        for (key, _), data in zip(found, blobs, strict=True):
            batch.append((f"{url.rpartition('/')[2]}:{key}", data))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def compare(
    urls: list[str], spec: EncoderSpec, device: str, dali_device: str | None, batch_size: int
) -> tuple[dict[str, Difference], dict[str, int]]:
    """Send every image both ways.

    Parameters
    ----------
    urls : list of str
        Shards.
    spec : dask_imgcurator.models.EncoderSpec
        Our encoder.
    device : str
        torch device of both ways.
    dali_device : {"cpu", "mixed"} or None
        As for `dask_imgcurator.decode.Decoder`; None: Pillow decodes on our side too.
    batch_size : int
        Of both ways.

    Returns
    -------
    dict of str to Difference
        For each decoder on our side (``dali``, ``pillow``), and for ``all`` images.
    dict of str to int
        Images by who could decode them: ``both``, ``neither``, ``only ours``, ``only open_clip``.
    """
    encoder = load_encoder(spec, device)
    transform, encode = open_clip_path(spec, device)
    std = torch.tensor(encoder.preprocess.std).reshape(3, 1, 1)
    threads = torch.get_num_threads()
    decoder = Decoder(encoder.preprocess, batch_size, device, dali_device, threads, config.get("max-pixels"))
    groups: dict[str, Difference] = {"all": Difference()}
    decodable: Counter[str] = Counter({"both": 0, "neither": 0, "only ours": 0, "only open_clip": 0})
    for batch in batches(urls, batch_size):
        decoded = decoder([data for _, data in batch])
        references = [reference_pixels(data, transform) for _, data in batch]
        both = []
        for i, (info, reference) in enumerate(zip(decoded.infos, references, strict=True)):
            bad = isinstance(info, BadImage)
            if reference is None:
                decodable["neither" if bad else "only ours"] += 1
            else:
                decodable["only open_clip" if bad else "both"] += 1
                if not bad:
                    both.append(i)
        if not both:
            continue
        mine, theirs = decoded.pixels[both], torch.stack([p for i in both if (p := references[i]) is not None])
        ours, expected = encoder(mine).double(), encode(theirs).double()
        cosines = torch.nn.functional.cosine_similarity(ours, expected)
        others = torch.nn.functional.cosine_similarity(expected, expected.roll(1, 0))
        pixels = ((mine.cpu() - theirs) * std).abs() * 255
        for j, i in enumerate(both):
            info = decoded.infos[i]
            assert not isinstance(info, BadImage)
            used = info.decoder if dali_device is not None else "pillow"
            for group in (groups["all"], groups.setdefault(used, Difference())):
                group.cosine.append(float(cosines[j]))
                group.other.append(float(others[j]))
                group.pixel_mean.append(float(pixels[j].mean()))
                group.pixel_max.append(float(pixels[j].max()))
                group.names.append(batch[i][0])
    return groups, dict(decodable)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison."""
    urls, spec, backend, batch_size = common.settle_options(args)
    about = common.machine()
    kind = settle_decoder(args.decoder)
    dali_device = backend.decoder_device if kind == "dali" else None
    groups, decodable = compare(urls, spec, backend.device, dali_device, batch_size)
    return {
        "benchmark": "parity",
        "machine": about,
        "versions": common.versions(),
        "settings": {
            "shards": len(urls),
            "model": args.model,
            "pretrained": args.pretrained,
            "dtype": load_encoder(spec, backend.device).spec.dtype,
            "batch_size": batch_size,
            "device": backend.device,
            "decoder": kind,
        },
        "decodable": decodable,
        "groups": {name: group.summary() for name, group in sorted(groups.items()) if group.cosine},
        "worst": groups["all"].worst(),
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    settings = result["settings"]
    lines = [
        ("model", f"{settings['model']} ({settings['dtype']}), {settings['decoder']} on {settings['device']}"),
        ("images decodable by", ", ".join(f"{name}: {n:,}" for name, n in result["decodable"].items())),
    ]
    for name, group in result["groups"].items():
        lines += [
            (f"{name}: images", f"{group['images']:,}"),
            (f"{name}: cosine", f"min {group['cosine_min']:.6f}, mean {group['cosine_mean']:.6f}"),
            (f"{name}: cosine with another image", f"mean {group['cosine_of_other_images_mean']:.6f}"),
            (f"{name}: pixels of 255", f"mean {group['pixel_mean']:.4f}, max {group['pixel_max']:.1f}"),
        ]
    for one in result["worst"]:
        lines.append(("lowest cosine", f"{one['cosine']:.6f} {one['image']} (pixels: max {one['pixel_max']:.1f})"))
    return lines


def main() -> None:
    """Run as a script."""
    parser = common.make_parser(__doc__)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--decoder", default="auto", choices=["auto", "dali", "pillow"], help="on our side")
    args = parser.parse_args()
    with common.plain_errors():
        result = measure(args)
    common.show(result, rows(result))


if __name__ == "__main__":
    main()
