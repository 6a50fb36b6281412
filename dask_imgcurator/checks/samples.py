"""Sample shards made without network: crops of freely licensed pictures, some of them spoilt.

The pictures are files inside the scikit-image and scikit-learn wheels (the ``demo`` extra). Only pictures
whose terms the package itself states are used: scikit-image in the docstring of the ``skimage.data``
function of that name, scikit-learn in ``sklearn/datasets/images/README.txt``. The packages are located, not
imported: ``skimage.data`` would look into a download cache first.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter

__all__ = ["BROKEN_KINDS", "KINDS", "PICTURES", "Picture", "SampleShards", "make_sample_shards"]


@dataclass(frozen=True)
class Picture:
    """A source picture inside an installed package.

    Attributes
    ----------
    name : str
        Short name; the `source` of samples made from it.
    path : str
        File inside the package, the package's name first, `/` between parts.
    license : str
        SPDX identifier, or ``public domain``, as the package states it.
    credit : str
        Author, origin and licence text's address, to be passed on with every copy.
    captions : tuple of str
        Captions written for this library.
    weight : int
        How many crops of it there are in one round over the pictures: more for colour photographs.
    """

    name: str
    path: str
    license: str
    credit: str
    captions: tuple[str, ...]
    weight: int = 1


_CC0 = "CC0-1.0"
_PUBLIC_DOMAIN = "public domain"
_CC_BY = "CC-BY-2.0"
_CC_BY_NOTE = "CC BY 2.0, https://creativecommons.org/licenses/by/2.0/; cropped, resized and altered here"

#: Every source picture. The first ones come first in the shards.
PICTURES: tuple[Picture, ...] = (
    Picture(
        "coffee",
        "skimage/data/coffee.png",
        _CC0,
        "Rachel Michetti, courtesy of Pikolo Espresso Bar (scikit-image)",
        ("a cup of coffee on a wooden table", "an espresso in a red cup with a small spoon on its saucer"),
        weight=3,
    ),
    Picture(
        "china",
        "sklearn/datasets/images/china.jpg",
        _CC_BY,
        f"danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/ (scikit-learn); {_CC_BY_NOTE}",
        (
            "a Chinese pagoda above a lake",
            "an old tower with tiled roofs among green trees under a clear sky",
        ),
        weight=3,
    ),
    Picture(
        "chelsea",
        "skimage/data/chelsea.png",
        _CC0,
        "Stefan van der Walt (scikit-image)",
        ("a tabby cat looking at the camera", "close-up of a ginger cat with green eyes"),
        weight=3,
    ),
    Picture(
        "flower",
        "sklearn/datasets/images/flower.jpg",
        _CC_BY,
        # The README credits danielbuechele but gives this account's address twice: name both.
        "vultilion, https://www.flickr.com/photos/vultilion/6056698931/ "
        f"(scikit-learn, which names danielbuechele); {_CC_BY_NOTE}",
        ("an orange dahlia in full bloom", "a round flower with many petals before a dark green background"),
        weight=3,
    ),
    Picture(
        "rocket",
        "skimage/data/rocket.jpg",
        _PUBLIC_DOMAIN,
        "SpaceX, https://www.flickr.com/photos/spacexphotos/16511594820/ (scikit-image)",
        ("a rocket on its launch pad at dusk", "a white rocket between lightning towers, lit from below"),
        weight=3,
    ),
    Picture(
        "astronaut",
        "skimage/data/astronaut.png",
        _PUBLIC_DOMAIN,
        "NASA, Great Images database (scikit-image)",
        ("a smiling astronaut in an orange space suit", "portrait of a woman astronaut beside a flag"),
        weight=3,
    ),
    Picture(
        "hubble_deep_field",
        "skimage/data/hubble_deep_field.jpg",
        _PUBLIC_DOMAIN,
        "NASA, Hubble eXtreme Deep Field (scikit-image)",
        ("thousands of distant galaxies on a black sky",),
    ),
    Picture(
        "retina",
        "skimage/data/retina.jpg",
        _CC0,
        "Mikael Häggström, Medical gallery of Mikael Häggström 2014 (scikit-image)",
        ("fundus photograph of a human retina",),
    ),
    Picture(
        "camera",
        "skimage/data/camera.png",
        _CC0,
        "Lav Varshney (scikit-image)",
        ("a black and white photograph of a man with a camera on a tripod",),
    ),
    Picture(
        "brick",
        "skimage/data/brick.png",
        _CC0,
        "CC0Textures, Bricks25 (scikit-image)",
        ("a gray brick wall",),
    ),
    Picture(
        "text",
        "skimage/data/text.png",
        _PUBLIC_DOMAIN,
        "Wikipedia, Corner.png (scikit-image)",
        ("handwritten symbols on paper",),
    ),
    Picture(
        "cell",
        "skimage/data/cell.png",
        _CC0,
        "Paul Müller et al., doi:10.1364/OE.26.010729 (scikit-image)",
        ("phase image of a cell in saline",),
    ),
    Picture(
        "grass",
        "skimage/data/grass.png",
        _CC0,
        "linolafett, DeviantArt, Grass-01 (scikit-image)",
        ("grass seen from above, in gray",),
    ),
    Picture(
        "horse",
        "skimage/data/horse.png",
        _CC0,
        "Andreas Preuss (marauder), openclipart (scikit-image)",
        ("black silhouette of a horse",),
    ),
    Picture(
        "gravel",
        "skimage/data/gravel.png",
        _CC0,
        "CC0Textures, Gravel04 (scikit-image)",
        ("gray gravel",),
    ),
    Picture(
        "clock",
        "skimage/data/clock_motion.png",
        _PUBLIC_DOMAIN,
        "Stefan van der Walt (scikit-image)",
        ("a wall clock blurred by motion",),
    ),
)

#: What a sample can be, with its meaning.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "crop": "a picture or a part of one, at least 96 pixels on each side",
        "near_duplicate": "an earlier crop, 3 to 10 % smaller, JPEG of quality 40 to 60",
        "duplicate": "the image bytes of an earlier crop under another key",
        "blurred": "a crop out of focus",
        "dark": "a crop at a tenth of its brightness",
        "noise": "random pixels",
        "flat": "one colour",
        "truncated": "the first half of a JPEG",
        "garbage": "random bytes named .jpg",
        "empty": "an image member of zero bytes",
        "no_image": "caption and JSON only",
        "bomb": "a valid PNG of 30,000 x 30,000 pixels in about 110 kB",
        "gray": "JPEG with one channel",
        "cmyk": "JPEG with four ink channels",
        "rgba": "PNG with an alpha channel",
        "palette": "PNG with a palette",
        "png16": "gray PNG with 16 bits per pixel",
        "webp": "WebP",
        "exif_rotated": "JPEG lying on its side, with the EXIF orientation that puts it upright",
        "wrong_ext": "PNG bytes named .jpg",
        "upper_ext": "JPEG named .JPG",
        "tiny": "PNG of one pixel",
    }
)

#: The kinds without pixels that a careful decoder would give.
BROKEN_KINDS = frozenset({"truncated", "garbage", "empty", "no_image", "bomb"})

_UNUSUAL = tuple(kind for kind in KINDS if kind != "crop")
# One round: every kind once, then more of what a curator meets most.
_ROUND = (*_UNUSUAL, "near_duplicate", "blurred", "duplicate", "dark", "near_duplicate")
_UNUSUAL_SHARE = 0.28

_SMALLEST = 96
_ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
_BOMB_SIDE = 30_000
_MTIME = 1_700_000_000  # any constant will do: the same call must give the same bytes
_GENERATED = ("generated", _CC0, "generated by dask_imgcurator")


@dataclass(frozen=True)
class SampleShards:
    """What `make_sample_shards` wrote.

    Attributes
    ----------
    folder : pathlib.Path
        Folder of the shards and `manifest.json`.
    shards : tuple of pathlib.Path
        The tars, in order.
    manifest : mapping of str to dict
        As in `manifest.json`: for each key its `shard` (file name), `kind` (see `KINDS`), `of` (key of the
        crop that it copies, or None), `source` (name of a `Picture`, or ``generated``) and `decodable`.
    """

    folder: Path
    shards: tuple[Path, ...]
    manifest: Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class _Sample:
    kind: str
    image: bytes | None
    ext: str
    caption: str
    source: str
    license: str
    credit: str
    of: str | None = None


def make_sample_shards(out: str | Path, count: int = 320, per_shard: int = 64, seed: int = 0) -> SampleShards:
    """Write webdataset shards of sample pictures, about 28 % of them unusual, poor or broken.

    Parameters
    ----------
    out : str or pathlib.Path
        Folder for ``00000.tar`` ... and ``manifest.json``; made if it is not there. Files of these names are
        replaced.
    count : int, default 320
        Samples in all. From 63 on, every one of `KINDS` is there.
    per_shard : int, default 64
        Samples per tar, at most 10,000.
    seed : int, default 0
        Of the crops. The same arguments give the same bytes with the same versions of Pillow and of the two
        packages.

    Returns
    -------
    SampleShards
        The shards' paths and the manifest.

    Raises
    ------
    ValueError
        If `count` or `per_shard` is out of range.
    ModuleNotFoundError
        If scikit-image or scikit-learn is not installed.
    FileNotFoundError
        If an installed package lacks a picture.
    FileExistsError
        If `out` holds tars that this call would not replace: they would be taken for samples.
    """
    if count < 1:
        raise ValueError(f"count={count}: give at least 1")
    if not 1 <= per_shard <= 10_000:
        raise ValueError(f"per_shard={per_shard}: give 1 to 10,000 (keys have four digits for the place in the shard)")
    files = {picture.name: _find(picture) for picture in PICTURES}
    folder = Path(out)
    shards = tuple(folder / f"{number:05d}.tar" for number in range(-(-count // per_shard)))
    strangers = sorted({path.name for path in folder.glob("*.tar")} - {path.name for path in shards})
    if strangers:
        raise FileExistsError(
            f"{folder} holds tars that are not of these samples ({', '.join(strangers[:3])}): "
            "remove them or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)

    maker = _Maker(files, random.Random(seed))
    kinds = _plan(count)
    manifest: dict[str, dict[str, Any]] = {}
    for number, path in enumerate(shards):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, kind in enumerate(kinds[number * per_shard : (number + 1) * per_shard]):
                key = f"{number:05d}{place:04d}"
                sample = maker.make(key, kind)
                _add(tar, key, sample, uid=f"{number * per_shard + place:032x}")
                manifest[key] = {
                    "shard": path.name,
                    "kind": kind,
                    "of": sample.of,
                    "source": sample.source,
                    "decodable": kind not in BROKEN_KINDS,
                }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return SampleShards(folder, shards, manifest)


def _find(picture: Picture) -> Path:
    package, _, inside = picture.path.partition("/")
    project = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f'the sample pictures are part of {project}, which is not installed: pip install "dask-imgcurator[demo]"',
            name=package,
        )
    path = Path(spec.submodule_search_locations[0], inside)
    if not path.is_file():
        raise FileNotFoundError(
            f"the installed {project} has no {picture.path} (looked for {path}): "
            'reinstall it from a wheel, pip install --force-reinstall "dask-imgcurator[demo]"'
        )
    return path


def _plan(count: int) -> list[str]:
    """Kind of each sample: the unusual ones evenly spread, at most every third, each after two crops."""
    unusual = max(round(_UNUSUAL_SHARE * count), min(len(_UNUSUAL), count // 3)) if count >= 3 else 0
    kinds = ["crop"] * count
    for i in range(unusual):
        kinds[(i + 1) * count // unusual - 1] = _ROUND[i % len(_ROUND)]
    return kinds


class _Maker:
    """Makes samples one after the other; later ones may copy earlier crops."""

    def __init__(self, files: Mapping[str, Path], rng: random.Random) -> None:
        self.rng = rng
        self.images = {name: Image.open(path).convert("RGB") for name, path in files.items()}
        self.crops: dict[str, _Sample] = {}
        # Each picture whole once; then crops, round after round.
        self.turns = [
            picture for turn in range(max(p.weight for p in PICTURES)) for picture in PICTURES if picture.weight > turn
        ]
        self.photos = [picture for picture in PICTURES if picture.weight > 1]

    def make(self, key: str, kind: str) -> _Sample:
        if kind == "crop":
            sample = self.crop()
            self.crops[key] = sample
            return sample
        if kind in ("duplicate", "near_duplicate"):
            return self.copy(kind)
        if kind in ("noise", "flat", "garbage", "empty", "bomb"):
            return _Sample(kind, *self.generated(kind), *_GENERATED)
        picture = self.rng.choice(self.photos)
        image, ext = _spoil(kind, self.cut(picture))
        caption = self.rng.choice(picture.captions)
        return _Sample(kind, image, ext, caption, picture.name, picture.license, picture.credit)

    def crop(self) -> _Sample:
        turn = len(self.crops)
        picture = self.turns[turn % len(self.turns)]
        image = self.images[picture.name] if turn < len(PICTURES) else self.cut(picture)
        ext = self.rng.choices(("jpg", "png", "webp"), (8, 1, 1))[0]
        data = {"jpg": _jpeg, "png": _png, "webp": _webp}[ext](image)
        caption = self.rng.choice(picture.captions)
        return _Sample("crop", data, ext, caption, picture.name, picture.license, picture.credit)

    def cut(self, picture: Picture) -> Image.Image:
        """Cut out a part of half to the full size; one in six is made a thumbnail."""
        whole = self.images[picture.name]
        aspect = self.rng.choice(_ASPECTS)
        scale = self.rng.uniform(0.5, 1.0)
        width = max(_SMALLEST, round(scale * min(whole.width, whole.height * aspect)))
        height = max(_SMALLEST, round(scale * min(whole.height, whole.width / aspect)))
        left, top = self.rng.randint(0, whole.width - width), self.rng.randint(0, whole.height - height)
        part = whole.crop((left, top, left + width, top + height))
        if self.rng.random() < 1 / 6:
            short = self.rng.randint(_SMALLEST, 160)
            part = _shrink(part, min(1.0, short / min(part.size)))
        return part

    def copy(self, kind: str) -> _Sample:
        of = self.rng.choice(list(self.crops))
        first = self.crops[of]
        image, ext = first.image, first.ext
        assert image is not None  # every crop has one
        if kind == "near_duplicate":
            smaller = _shrink(Image.open(io.BytesIO(image)), self.rng.uniform(0.90, 0.97))
            image, ext = _jpeg(smaller, quality=self.rng.randint(40, 60)), "jpg"
        return _Sample(kind, image, ext, first.caption, first.source, first.license, first.credit, of=of)

    def generated(self, kind: str) -> tuple[bytes, str, str]:
        """Image bytes, extension and caption of something that comes from no picture."""
        if kind == "noise":
            side = self.rng.randint(160, 320)
            return (
                _jpeg(Image.frombytes("RGB", (side, side), self.rng.randbytes(side * side * 3))),
                "jpg",
                "noise",
            )
        if kind == "flat":
            red, green, blue = self.rng.randbytes(3)
            size = (self.rng.randint(160, 480), self.rng.randint(160, 480))
            return _jpeg(Image.new("RGB", size, (red, green, blue))), "jpg", "a plain colour"
        if kind == "garbage":
            return self.rng.randbytes(4096), "jpg", "a photo"
        if kind == "empty":
            return b"", "jpg", "a photo"
        return _bomb(), "png", "a very large black square"


def _spoil(kind: str, image: Image.Image) -> tuple[bytes | None, str]:
    """Encode an RGB image as a kind of sample wants it: bytes (None: no image member), extension."""
    match kind:
        case "blurred":
            return _jpeg(image.filter(ImageFilter.GaussianBlur(max(3.0, min(image.size) / 40)))), "jpg"
        case "dark":
            return _jpeg(ImageEnhance.Brightness(image).enhance(0.1)), "jpg"
        case "truncated":
            data = _jpeg(image)
            return data[: len(data) // 2], "jpg"
        case "no_image":
            return None, ""
        case "gray":
            return _jpeg(image.convert("L")), "jpg"
        case "cmyk":
            return _jpeg(image.convert("CMYK")), "jpg"
        case "rgba":
            see_through = image.copy()
            see_through.putalpha(Image.radial_gradient("L").point(lambda v: 255 - v).resize(image.size))
            return _png(see_through), "png"
        case "palette":
            return _png(image.quantize(64)), "png"
        case "png16":
            # v -> 257 v, by writing every byte twice: 0 stays 0 and 255 becomes 65535.
            eight = image.convert("L").tobytes()
            sixteen = bytes(byte for v in eight for byte in (v, v))
            return _png(Image.frombytes("I;16", image.size, sixteen)), "png"
        case "webp":
            return _webp(image), "webp"
        case "exif_rotated":
            exif = Image.Exif()
            exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
            return _jpeg(image.transpose(Image.Transpose.ROTATE_90), exif=exif), "jpg"
        case "wrong_ext":
            return _png(image), "jpg"
        case "upper_ext":
            return _jpeg(image), "JPG"
        case "tiny":
            return _png(image.resize((1, 1))), "png"
    raise ValueError(f"kind={kind!r} is not made from a picture; see KINDS")


def _jpeg(image: Image.Image, quality: int = 90, **options: Any) -> bytes:
    return _encode(image, "JPEG", quality=quality, **options)


def _png(image: Image.Image) -> bytes:
    return _encode(image, "PNG")


def _webp(image: Image.Image) -> bytes:
    return _encode(image, "WEBP", quality=85)


def _shrink(image: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _encode(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


@cache
def _bomb() -> bytes:
    """Black square as a PNG of one bit per pixel. Written by hand: Pillow would hold all the pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (_BOMB_SIDE + 7) // 8)  # filter type 0, then the pixels
    rows = b"".join(packer.compress(row * 100) for _ in range(_BOMB_SIDE // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", _BOMB_SIDE, _BOMB_SIDE, 1, 0, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _add(tar: tarfile.TarFile, key: str, sample: _Sample, uid: str) -> None:
    about = {
        "uid": uid,
        "kind": sample.kind,
        "source": sample.source,
        "license": sample.license,
        "credit": sample.credit,
    }
    members = {} if sample.image is None else {sample.ext: sample.image}
    members["txt"] = sample.caption.encode()
    members["json"] = json.dumps(about, ensure_ascii=False).encode()
    for ext, data in members.items():
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size, info.mtime, info.mode = len(data), _MTIME, 0o644
        tar.addfile(info, io.BytesIO(data))
