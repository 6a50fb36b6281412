"""Decoding against open_clip's own transform, and damaged images in every place where they can be met."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, ResizeKeepRatio, image_transform_v2
from PIL import Image, ImageOps

from dask_imgcurator.images import dali, pillow, preprocess
from dask_imgcurator.images.dali import dali_problem
from dask_imgcurator.images.decoder import Batch, Decoder
from dask_imgcurator.images.formats import BadImage
from dask_imgcurator.images.pillow import ImageInfo, decode, inspect, is_deep
from dask_imgcurator.images.preprocess import Geometry, Preprocess

needs_dali = pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))

CONFIGS = {
    "openai": PreprocessCfg(size=224),
    "bilinear": PreprocessCfg(size=256, interpolation="bilinear"),
    "squash": PreprocessCfg(size=224, resize_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3),
    "squash, wide, bilinear": PreprocessCfg(size=(96, 161), resize_mode="squash", interpolation="bilinear"),
    "longest": PreprocessCfg(size=225, resize_mode="longest", fill_color=77),
    "longest, tall, bilinear": PreprocessCfg(
        size=(160, 97), resize_mode="longest", interpolation="bilinear", fill_color=255
    ),
    "shortest, wide": PreprocessCfg(size=(97, 160), interpolation="bilinear"),
}
SMALL = PreprocessCfg(size=48)


def ours(cfg: PreprocessCfg) -> Preprocess:
    return Preprocess.from_open_clip(vars(cfg))


def theirs(cfg: PreprocessCfg, data: bytes | Image.Image) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    return image_transform_v2(cfg, is_train=False)(image)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth waves: no two seeds look alike, and no pixel is noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * rng.uniform(0.002, 0.06) + y * rng.uniform(0.002, 0.06) + rng.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))


def encode(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [
        encode(
            picture(rng.randint(16, 600), rng.randint(16, 600), seed + i).convert(rng.choice(["RGB", "RGB", "L"])),
            quality=rng.choice([60, 85, 95]),
            subsampling=rng.choice([0, 1, 2]),
            progressive=rng.random() < 0.3,
        )
        for i in range(count)
    ]


def only_bad(batch: Batch, at: int) -> BadImage:
    """The bad image at this place of a batch in which all others are good."""
    assert batch.good == [i for i in range(len(batch.infos)) if i != at]
    bad = batch.infos[at]
    assert isinstance(bad, BadImage)
    assert not batch.pixels[at].any()
    return bad


# --- geometry ---------------------------------------------------------------------------------------


def torchvision_geometry(cfg: PreprocessCfg, width: int, height: int) -> tuple[list[int], list[int], list[int]]:
    """What open_clip's own steps make of an image: its size, and which rows and columns the crop shows.

    No pixel is computed: the resize runs on torch's meta device, the crop on numbered rows and columns; 0 is padding.
    """
    resize, *crop = image_transform_v2(cfg, is_train=False).transforms[:-3]
    if isinstance(resize, ResizeKeepRatio):
        new_h, new_w = resize.get_params(SimpleNamespace(size=(width, height)), resize.size, resize.longest)
        # Where this is 0, its resize raises.
        new_h, new_w = max(1, new_h), max(1, new_w)
    else:
        new_h, new_w = resize(torch.empty((1, height, width), device="meta")).shape[-2:]
    rows = torch.arange(1, new_h + 1).reshape(1, -1, 1).expand(1, new_h, new_w)
    columns = torch.arange(1, new_w + 1).reshape(1, 1, -1).expand(1, new_h, new_w)
    if crop:
        crop[0].fill = 0
        rows, columns = crop[0](rows), crop[0](columns)
    return [new_w, new_h], rows[0].amax(1).tolist(), columns[0].amax(0).tolist()


def shown(begin: int, out: int, side: int) -> list[int]:
    return [i + 1 if 0 <= i < side else 0 for i in range(begin, begin + out)]


side = st.integers(1, 3000)
target = st.integers(1, 400)


@given(side, side, st.one_of(target, st.tuples(target, target)), st.sampled_from(["shortest", "longest", "squash"]))
@example(1, 3000, 224, "longest")
@example(3000, 1, (31, 400), "longest")
@example(1, 3000, (31, 400), "shortest")
@example(2999, 1, 399, "shortest")
@settings(max_examples=400, deadline=None)
def test_geometry_is_open_clips(width: int, height: int, size: int | tuple[int, int], mode: str) -> None:
    cfg = PreprocessCfg(size=size, resize_mode=mode)
    preprocess = ours(cfg)
    out_h, out_w = preprocess.size
    assert (out_h, out_w) == ((size, size) if isinstance(size, int) else size)
    g = preprocess.geometry(width, height)
    resized, rows, columns = torchvision_geometry(cfg, width, height)
    assert [g.width, g.height] == resized
    assert shown(g.top, out_h, g.height) == rows
    assert shown(g.left, out_w, g.width) == columns


def test_geometry_by_hand() -> None:
    assert ours(PreprocessCfg(size=224)).geometry(301, 450) == Geometry(224, 334, 55, 0)
    # 10 rows in 15: 5 are missing, 2 in front and 3 behind.
    assert ours(PreprocessCfg(size=15, resize_mode="longest")).geometry(30, 20) == Geometry(15, 10, -2, 0)


def test_a_sliver_keeps_a_pixel_where_open_clip_fails() -> None:
    cfg = PreprocessCfg(size=32, resize_mode="longest")
    sliver = picture(1, 2000)
    with pytest.raises(ValueError, match="height and width must be"):
        theirs(cfg, sliver)
    assert ours(cfg).geometry(1, 2000) == Geometry(1, 32, 0, -15)
    pixels = decode(encode(sliver, "PNG"), ours(cfg))[0]
    padding = theirs(cfg, Image.new("RGB", (32, 32)))
    different = (pixels != padding).any(0).any(0).nonzero().flatten().tolist()
    assert different == [15]


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "RN50"])
def test_reads_what_open_clip_says_of_a_model(name: str) -> None:
    tag = open_clip.list_pretrained_tags_by_model(name)[0]
    cfg = open_clip.get_pretrained_cfg(name, tag)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    merged = {**vars(PreprocessCfg(size=size)), **{k: v for k, v in cfg.items() if k in ("mean", "std", "resize_mode")}}
    preprocess = Preprocess.from_open_clip(merged)
    assert preprocess.size == (size, size)
    assert preprocess.mean == tuple(cfg["mean"])
    assert preprocess.resize_mode == cfg["resize_mode"]


def test_a_preprocessing_config_with_single_numbers_and_an_unknown_mode() -> None:
    plain = vars(PreprocessCfg())
    one = Preprocess.from_open_clip({**plain, "size": [64], "mean": 0.5, "std": 0.25, "interpolation": "random"})
    assert one == Preprocess((64, 64), (0.5,) * 3, (0.25,) * 3, "bicubic", "shortest", 0)
    with pytest.raises(ValueError, match=r"'stretch'.*shortest, longest or squash"):
        Preprocess.from_open_clip({**plain, "resize_mode": "stretch"})


# --- pixels -----------------------------------------------------------------------------------------


def levels(a: torch.Tensor, b: torch.Tensor, cfg: PreprocessCfg) -> torch.Tensor:
    """Absolute difference in 1/255 of the range."""
    return (a - b).abs() * torch.tensor(cfg.std)[:, None, None] * 255


def photographs(folder: Path, count: int) -> list[bytes]:
    # The name's hash, so that the choice is spread over the sources.
    found = sorted(folder.glob("*/*.jpg"), key=lambda p: zlib.crc32(p.name.encode()))
    return [p.read_bytes() for p in found if p.stat().st_size < 400_000][:count]


def compare(cfg: PreprocessCfg, blobs: list[bytes], record: Callable[[str, object], None]) -> None:
    decoder = Decoder(ours(cfg), 8)
    worst_mean = worst = 0.0
    for start in range(0, len(blobs), 8):
        batch = decoder(blobs[start : start + 8])
        assert len(batch.good) == len(batch.infos)
        for pixels, info, data in zip(batch.pixels, batch.infos, blobs[start : start + 8], strict=True):
            assert isinstance(info, ImageInfo)
            assert info.decoder == "dali"
            difference = levels(pixels, theirs(cfg, data), cfg)
            worst_mean, worst = max(worst_mean, difference.mean().item()), max(worst, difference.max().item())
            assert difference.mean() <= 1, info
    record("worst_mean_difference", worst_mean)
    record("max_difference", worst)


@needs_dali
@pytest.mark.parametrize("name", CONFIGS)
def test_dali_pixels_are_open_clips(name: str, record_property: Callable[[str, object], None]) -> None:
    compare(CONFIGS[name], jpegs(16, seed=100), record_property)


@needs_dali
@pytest.mark.parametrize("name", ["openai", "squash", "longest"])
def test_dali_pixels_of_photographs(shared: Path, name: str, record_property: Callable[[str, object], None]) -> None:
    blobs = photographs(shared / "images", 16)
    assert len(blobs) == 16
    compare(CONFIGS[name], blobs, record_property)


@needs_dali
@pytest.mark.parametrize("name", ["openai", "squash", "longest"])
def test_dali_differs_from_pillow_only_at_the_rim(name: str) -> None:
    """A geometry that is off by one pixel would show everywhere; filters treat the picture's rim in two ways."""
    cfg = CONFIGS[name]
    blob = encode(picture(301, 450, 5), quality=95)
    difference = levels(Decoder(ours(cfg), 1)([blob]).pixels[0], theirs(cfg, blob), cfg)
    g = ours(cfg).geometry(301, 450)
    top, left = max(0, -g.top) + 3, max(0, -g.left) + 3
    inner = difference[:, top : top + min(g.height, cfg.size) - 6, left : left + min(g.width, cfg.size) - 6]
    assert inner.numel() > 3 * 100 * 100
    assert inner.max() <= 2.01
    shifted = levels(theirs(cfg, blob).roll(1, dims=2), theirs(cfg, blob), cfg)
    assert shifted[:, top:-3, left:-3].max() > 5  # so that an offset would be seen


@pytest.mark.parametrize("name", CONFIGS)
def test_pillow_alone_is_open_clip_exactly(name: str) -> None:
    cfg = CONFIGS[name]
    blobs = jpegs(6, seed=200)
    batch = Decoder(ours(cfg), 8, dali_device=None)(blobs)
    assert batch.good == list(range(6))
    assert batch.pixels.dtype == torch.float32
    for pixels, data in zip(batch.pixels, blobs, strict=True):
        assert torch.equal(pixels, theirs(cfg, data))


def deep_pictures(levels: np.ndarray, low: int = 300) -> dict[str, bytes]:
    """Files whose samples are `low` plus 200 times the levels 0 to 255, in each depth."""
    samples = low + 200 * levels.astype(np.int64)
    fractions = (samples / 1e6).astype(np.float32)
    holes = fractions.copy()
    holes[0, :3] = np.nan, np.inf, -np.inf
    big = Image.frombytes("I;16B", levels.shape[::-1], samples.astype(">u2").tobytes())
    return {
        "PNG, 16 bit": encode(Image.fromarray(samples.astype(np.uint16)), "PNG"),
        "TIFF, 16 bit": encode(Image.fromarray(samples.astype(np.uint16)), "TIFF"),
        "TIFF, 16 bit, big endian": encode(big, "TIFF"),
        "TIFF, 32 bit": encode(Image.fromarray((samples - 40_000).astype(np.int32)), "TIFF"),
        "TIFF, float": encode(Image.fromarray(fractions), "TIFF"),
        "TIFF, float, holes": encode(Image.fromarray(holes), "TIFF"),
        "PGM, 16 bit": encode(Image.fromarray(samples.astype(np.uint16)), "PPM"),
        "JPEG 2000, 16 bit": encode(Image.fromarray(samples.astype(np.uint16)), "JPEG2000"),
    }


@pytest.mark.parametrize("name", list(deep_pictures(np.zeros((8, 8)))))
def test_deep_samples_are_clipped_or_stretched(name: str) -> None:
    found: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    views = []
    for seed in (1, 2):
        levels = np.asarray(picture(83, 61, seed).convert("L")).copy()
        levels[0, :3], levels[-1, -2:] = (0, 255, 0), (0, 255)
        data = deep_pictures(levels)[name]
        info = inspect(data)
        assert is_deep(info.mode)
        for scale, pixels in found.items():
            batch = Decoder(ours(SMALL), 1, dali_device=None, scale_high_bit_depth=scale, views=True)([data])
            pixels.append(batch.pixels[0])
        assert batch.small is not None
        views.append(batch.small[0])
        assert torch.equal(found[False][-1], theirs(SMALL, data))
        assert torch.equal(found[True][-1], theirs(SMALL, encode(Image.fromarray(levels), "PNG")))
    # Half of those of 32 bits are negative, and so black; Pillow resizes big-endian ones in a way of its own.
    if name not in ("TIFF, 32 bit", "TIFF, 16 bit, big endian"):
        assert torch.equal(*found[False])
    assert not torch.equal(*found[True])
    assert not torch.equal(*views)


@pytest.mark.parametrize("value", [0.5, np.nan, 70_000.0])
def test_deep_pictures_of_one_value_stay_as_they_are(value: float) -> None:
    data = encode(Image.fromarray(np.full((30, 30), value, np.float32)), "TIFF")
    plain, scaled = (Decoder(ours(SMALL), 1, dali_device=None, scale_high_bit_depth=s)([data]) for s in (False, True))
    assert torch.equal(plain.pixels, scaled.pixels)


def formats() -> dict[str, bytes]:
    rgb = picture(83, 61, 1)
    alpha = picture(83, 61, 2).convert("L")
    gray = rgb.convert("L")
    palette = rgb.quantize(37)
    deep = Image.fromarray((np.asarray(gray).astype(np.uint16) * 257) ^ 0x0155)
    assert deep.mode == "I;16"
    rgba, la = rgb.copy(), gray.convert("LA")
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    frames = [picture(83, 61, 10 + i) for i in range(3)]
    return {
        "PNG": encode(rgb, "PNG"),
        "PNG, palette": encode(palette, "PNG"),
        "PNG, palette, transparent": encode(palette, "PNG", transparency=3),
        "PNG, alpha": encode(rgba, "PNG"),
        "PNG, gray": encode(gray, "PNG"),
        "PNG, gray, alpha": encode(la, "PNG"),
        "PNG, 16 bit": encode(deep, "PNG"),
        "PNG, 1 bit": encode(rgb.convert("1"), "PNG"),
        "PNG, 1 pixel": encode(picture(1, 1, 3), "PNG"),
        "JPEG, CMYK": encode(rgb.convert("CMYK"), quality=90),
        "JPEG, RGB": encode(rgb, quality=90, keep_rgb=True),
        "GIF": encode(palette, "GIF"),
        "GIF, animated": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "BMP": encode(rgb, "BMP"),
        "BMP, 1 bit": encode(rgb.convert("1"), "BMP"),
        "TIFF": encode(rgb, "TIFF", compression="tiff_lzw"),
        "TIFF, 16 bit": encode(deep, "TIFF"),
        "TIFF, CMYK": encode(rgb.convert("CMYK"), "TIFF"),
        "TIFF, float": encode(gray.convert("F"), "TIFF"),
        "WebP": encode(rgb, "WEBP", quality=80),
        "WebP, alpha": encode(rgba, "WEBP", lossless=True),
        "PPM": encode(rgb, "PPM"),
        "MPO": encode(rgb, "MPO", save_all=True, append_images=frames[1:]),
    }


FORMATS = formats()


@pytest.mark.parametrize("cfg", [SMALL, PreprocessCfg(size=(40, 57), resize_mode="longest"), CONFIGS["squash"]])
def test_every_other_format_is_pillows_exactly(cfg: PreprocessCfg) -> None:
    decoder = Decoder(ours(cfg), len(FORMATS), dali_device="cpu" if dali_problem() is None else None)
    batch = decoder(list(FORMATS.values()))
    for (name, data), pixels, info in zip(FORMATS.items(), batch.pixels, batch.infos, strict=True):
        assert isinstance(info, ImageInfo), (name, info)
        assert info.decoder == "pillow", name
        assert (info.width, info.height) == Image.open(io.BytesIO(data)).size, name
        assert torch.equal(pixels, theirs(cfg, data)), name


@needs_dali
def test_gray_and_colour_jpegs_go_to_dali_in_one_batch() -> None:
    blobs = [encode(picture(70, 50, 1)), encode(picture(70, 50, 2).convert("L")), encode(picture(50, 70, 3))]
    batch = Decoder(ours(SMALL), 3)(blobs)
    for pixels, info, data in zip(batch.pixels, batch.infos, blobs, strict=True):
        assert isinstance(info, ImageInfo)
        assert info.decoder == "dali"
        assert levels(pixels, theirs(SMALL, data), SMALL).mean() < 1


# --- EXIF -------------------------------------------------------------------------------------------


def with_orientation(image: Image.Image, orientation: int, format_: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format_, exif=exif.tobytes(), **({"quality": 95} if format_ == "JPEG" else {}))


@pytest.mark.parametrize("dali_device", [pytest.param("cpu", marks=needs_dali), None])
def test_orientation_is_applied_only_when_asked_for(dali_device: str | None) -> None:
    blobs = [with_orientation(picture(90, 60, 4), o) for o in range(1, 9)]
    blobs += [with_orientation(picture(60, 90, 4), o, "PNG") for o in (3, 6)]
    as_stored = Decoder(ours(SMALL), 16, dali_device=dali_device)(blobs)
    upright = Decoder(ours(SMALL), 16, dali_device=dali_device, adjust_orientation=True)(blobs)
    for i, data in enumerate(blobs):
        info = as_stored.infos[i]
        assert isinstance(info, ImageInfo)
        image = Image.open(io.BytesIO(data))
        assert (info.width, info.height) == image.size
        turned = theirs(SMALL, ImageOps.exif_transpose(image))
        assert levels(as_stored.pixels[i], theirs(SMALL, data), SMALL).mean() < 1
        assert levels(upright.pixels[i], turned, SMALL).mean() < 1
        if info.orientation != 1:
            assert levels(turned, theirs(SMALL, data), SMALL).mean() > 5
    assert [info.orientation for info in as_stored.infos if isinstance(info, ImageInfo)] == [*range(1, 9), 3, 6]


# --- what is looked at before decoding --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_a_truncated_jpeg_is_found_at_every_byte(options: dict[str, Any]) -> None:
    data = encode(picture(64, 48), quality=60, **options)
    assert inspect(data).decoder == "dali"
    scan = data.index(b"\xff\xda")
    for length in range(len(data)):
        with pytest.raises(BadImage) as caught:
            inspect(data[:length])
        assert caught.value.status == "decode_error"
        if length > scan + 16:
            assert f"truncated JPEG: no end-of-image marker in {length:,} bytes" in str(caught.value)
            assert (caught.value.width, caught.value.height) == (64, 48)


@pytest.mark.parametrize("name", ["PNG", "PNG, 16 bit", "GIF", "BMP", "TIFF", "WebP", "PPM", "JPEG, CMYK", "JPEG, RGB"])
def test_half_a_file_of_any_format_is_an_error(name: str) -> None:
    data, whole = FORMATS[name], FORMATS["PNG"]
    bad = only_bad(Decoder(ours(SMALL), 2, dali_device=None)([whole, data[: len(data) // 2]]), 1)
    assert bad.status == "decode_error"
    assert str(bad)


def test_what_is_no_image() -> None:
    with pytest.raises(BadImage, match="empty") as caught:
        inspect(b"")
    assert caught.value.status == "decode_error"
    for data in (b"\0", bytes(1000), b"<html>", random.Random(0).randbytes(5000)):
        with pytest.raises(BadImage, match=f"starts with {data[:1].hex()}") as caught:
            inspect(data)
        assert (caught.value.status, caught.value.width) == ("decode_error", None)


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 400), st.binary(max_size=8))
@settings(max_examples=300, deadline=None)
def test_damage_is_a_bad_image_and_never_another_error(name: str, at: int, patch: bytes) -> None:
    data = FORMATS[name][:at] + patch + FORMATS[name][at + len(patch) :]
    batch = Decoder(ours(SMALL), 2, dali_device=None, max_pixels=100_000)([data, FORMATS["BMP"]])
    assert torch.equal(batch.pixels[1], theirs(SMALL, FORMATS["BMP"]))
    info = batch.infos[0]
    if isinstance(info, BadImage):
        assert info.status in ("decode_error", "too_large")
        assert not batch.pixels[0].any()


def test_bytes_behind_the_end_do_no_harm() -> None:
    data = encode(picture(64, 48))
    for tail in (b"\0" * 700, b"\r\n", random.Random(1).randbytes(100), FORMATS["PNG"]):
        assert inspect(data + tail) == inspect(data)
        assert torch.equal(decode(data + tail, ours(SMALL))[0], theirs(SMALL, data))


def test_a_thumbnails_end_is_not_the_images_end() -> None:
    thumbnail = encode(picture(16, 12))
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encode(picture(64, 48), exif=exif.tobytes() + thumbnail)
    assert thumbnail in data
    assert inspect(data).decoder == "dali"
    for length in (data.rindex(b"\xff\xda") + 20, len(data) - 2):
        assert b"\xff\xd9" in data[:length]
        with pytest.raises(BadImage, match="truncated JPEG"):
            inspect(data[:length])


def frame_header(data: bytes | bytearray) -> int:
    """Where the marker of a JPEG's frame header (SOF) lies."""
    return max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))


@pytest.mark.parametrize(("marker", "process"), [(0xC3, "lossless"), (0xC9, "arithmetic"), (0xCA, "arithmetic")])
def test_unusual_jpegs_go_to_pillow(marker: int, process: str) -> None:
    data = bytearray(encode(picture(64, 48)))
    data[frame_header(data) + 1] = marker
    assert inspect(bytes(data)).decoder == "pillow", process
    # The bytes are not really so coded: whatever is made of them, the neighbour is whole.
    whole = encode(picture(64, 48, 1))
    batch = Decoder(ours(SMALL), 2, dali_device=None)([bytes(data), whole])
    assert torch.equal(batch.pixels[1], theirs(SMALL, whole))


def test_a_12_bit_jpeg_is_an_error_by_name() -> None:
    data = bytearray(encode(picture(64, 48)))
    data[frame_header(data) + 4] = 12
    with pytest.raises(BadImage, match="JPEG with a header that Pillow cannot read"):
        inspect(bytes(data))


def test_jpegs_that_are_not_ycc_go_to_pillow() -> None:
    assert inspect(FORMATS["JPEG, RGB"]).decoder == "pillow"
    assert inspect(FORMATS["JPEG, CMYK"]).decoder == "pillow"
    assert inspect(encode(picture(8, 8))).decoder == "dali"


def png_of_size(width: int, height: int) -> bytes:
    """A PNG's header alone: enough for its size to be known."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    empty = b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 0) + empty + struct.pack(">I", zlib.crc32(empty))


def test_max_pixels_takes_the_place_of_pillows_own_limit() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None
    data = png_of_size(20_000, 20_000)
    assert 2 * limit < 20_000 * 20_000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    assert inspect(data).width == 20_000
    assert inspect(data, max_pixels=400_000_000).height == 20_000
    with pytest.raises(BadImage, match="20000 x 20000 pixels, more than the limit of 399,999,999") as caught:
        inspect(data, max_pixels=399_999_999)
    assert (caught.value.status, caught.value.width, caught.value.height) == ("too_large", 20_000, 20_000)
    with pytest.raises(BadImage, match="limit of 99"):
        inspect(encode(picture(10, 10)), max_pixels=99)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("limit", [2000, 4000])
def test_pillows_own_limit_does_not_reach_the_decoder(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Above the smaller one, Pillow raises; above the other, it warns."""
    data = FORMATS["PNG"]
    expected = theirs(SMALL, data)
    assert 4000 < 83 * 61 < 8000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert torch.equal(Decoder(ours(SMALL), 1, dali_device=None)([data]).pixels[0], expected)
    assert limit == Image.MAX_IMAGE_PIXELS


# --- slivers: few pixels, of which the resize makes very many --------------------------------------


@pytest.mark.parametrize("dali_device", [pytest.param("cpu", marks=needs_dali), None])
@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 65_500), (65_500, 1), (3, 40_000)])
def test_slivers_are_decoded(size: tuple[int, int], dali_device: str | None) -> None:
    rng = np.random.default_rng(5)
    sliver = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    cfg = PreprocessCfg(size=224)
    blobs = [encode(sliver), encode(picture(300, 300)), encode(sliver, "PNG")]
    batch = Decoder(ours(cfg), 3, dali_device=dali_device, max_pixels=178_956_970)(blobs)
    assert batch.good == [0, 1, 2]
    info = batch.infos[0]
    assert isinstance(info, ImageInfo)
    assert (info.width, info.height, info.decoder) == (*size, "pillow")
    assert torch.equal(batch.pixels[1], Decoder(ours(cfg), 1, dali_device=dali_device)(blobs[1:2]).pixels[0])
    # The middle of the sliver, by hand: the window of 224 pixels shows 224 / 224 * its width.
    short, long = sorted(size)
    middle = sliver.transpose(Image.Transpose.TRANSPOSE) if size[0] > size[1] else sliver
    cut = middle.crop((0, long // 2 - 40 * short, short, long // 2 + 40 * short))
    expected = theirs(cfg, cut.transpose(Image.Transpose.TRANSPOSE) if size[0] > size[1] else cut)
    assert levels(batch.pixels[2], expected, cfg).max() <= 1.01


def noise(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 512, (height, width)).astype(np.uint16))
    if mode == "P":
        return rgb.quantize(37)
    if mode in ("RGBA", "LA"):
        rgb.putalpha(Image.fromarray(rng.integers(60, 256, (height, width), np.uint8)))
    return rgb.convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "I;16", "F"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_window_of_a_sliver_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, mode: str, interpolation: str
) -> None:
    """Against the whole resized image, where that can be afforded: no size would be too far, or every one is."""
    for width, height, size in (
        (1, 700, 224),
        (3, 1201, 224),
        (901, 2, (97, 160)),
        (110, 1003, 224),
        (7, 900, (97, 160)),
        (220, 1300, 224),
    ):
        image = noise(mode, width, height)
        for resize_mode in ("shortest", "squash", "longest"):
            cfg = PreprocessCfg(size=size, interpolation=interpolation, resize_mode=resize_mode)
            monkeypatch.setattr(preprocess, "WHOLE_PIXELS", 1 << 40)
            whole = pillow.resize_and_cut(image, ours(cfg))
            monkeypatch.setattr(preprocess, "WHOLE_PIXELS", 0)
            window = pillow.resize_and_cut(image, ours(cfg))
            assert (window.mode, window.size) == (whole.mode, whole.size)
            a, b = (np.asarray(im.convert("RGB")).astype(int) for im in (whole, window))
            # Single precision moves what lies between two levels, or (for a palette) between two pixels; where alpha
            # is small, dividing by it makes more of a level.
            different = (a != b).any(-1).mean()
            assert different <= 0.011, (width, height, resize_mode)
            if mode not in ("P", "1"):
                assert abs(a - b).max() <= {"RGBA": 5, "LA": 5, "YCbCr": 3}.get(mode, 1), (width, height, resize_mode)


def test_only_what_grows_is_cut_first() -> None:
    for width, height, far in (
        (1, 334, False),
        (1, 335, True),
        (1, 65_500, True),
        (230, 90_000, False),
        (3000, 3000, False),
    ):
        g = ours(PreprocessCfg(size=224)).geometry(width, height)
        assert g.grows_too_far(width, height) == far


def test_a_sliver_costs_little_memory() -> None:
    """Whole, it would take 13 GB; with its window, the child lives within 3 GB of addresses more than it had."""
    code = """
    import io, resource
    from PIL import Image
    from dask_imgcurator.images.decoder import Decoder
    from dask_imgcurator.images.preprocess import Preprocess

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((1, 65500)).save(buffer, "JPEG")
    decoder = Decoder(Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3), 1, dali_device=None)
    decoder([b"\\xff\\xd8\\xff"])  # loads all that it needs
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3_000_000_000,) * 2)
    assert decoder([buffer.getvalue()]).good == [0]
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr


# --- one bad image costs itself only ----------------------------------------------------------------


def dali_raises(data: bytes) -> bool:
    """Whether DALI's own decoder, alone, refuses these bytes."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1)
        pipe.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    pipe.build()
    pipe.feed_input("encoded", [np.frombuffer(data, np.uint8)])
    try:
        pipe.run()
    except Exception:
        return True
    return False


@pytest.fixture(scope="module")
def refused() -> list[bytes]:
    """JPEGs that look whole from outside and that DALI cannot decode: their tables are damaged."""
    found: list[bytes] = []
    rng = random.Random(7)
    for attempt in range(200):
        data = bytearray(encode(picture(60, 44, attempt)))
        table = data.index(b"\xff\xc4") + 5
        for _ in range(4):
            data[table + rng.randrange(20)] = rng.randrange(256)
        try:
            info = inspect(bytes(data))
        except BadImage:
            continue
        if info.decoder == "dali" and dali_raises(bytes(data)):
            found.append(bytes(data))
        if len(found) == 3:
            return found
    pytest.fail("the search found no JPEG that passes the check and that DALI refuses")


@needs_dali
@pytest.mark.parametrize("named", [True, False])
def test_an_image_that_only_dali_refuses_goes_to_pillow_alone(named: bool) -> None:
    """Its neighbours keep DALI's pixels, wherever it stands, and whether or not DALI names it."""
    blobs = jpegs(9, seed=700)

    class Refusing(Decoder):
        def _run_dali(self, given: Any, rows: list[int], batch: Batch) -> None:
            if refused := [k for k, i in enumerate(rows) if given[i] == odd]:
                raise dali.Refused(refused[0] if named else None)
            super()._run_dali(given, rows, batch)

    expected = Decoder(ours(SMALL), 9)(blobs).pixels
    for at, odd in enumerate(blobs):
        batch = Refusing(ours(SMALL), 9)(blobs)
        assert [info.decoder for info in batch.infos if isinstance(info, ImageInfo)].index("pillow") == at
        assert torch.equal(batch.pixels[at], theirs(SMALL, odd))
        others = [i for i in range(9) if i != at]
        assert torch.equal(batch.pixels[others], expected[others])


@needs_dali
def test_dali_pixels_do_not_depend_on_neighbours() -> None:
    blobs = jpegs(7, seed=300)
    decoder = Decoder(ours(SMALL), 8)
    together = decoder(blobs).pixels
    alone = torch.cat([decoder([data]).pixels for data in blobs])
    backwards = decoder(blobs[::-1]).pixels.flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, backwards)


@pytest.mark.parametrize("dali_device", [pytest.param("cpu", marks=needs_dali), None])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_bad_image_leaves_the_others_as_they_are(dali_device: str | None, at: int) -> None:
    good = [*jpegs(2, seed=400), FORMATS["PNG"], FORMATS["GIF"]]
    decoder = Decoder(ours(SMALL), 8, dali_device=dali_device, max_pixels=1_000_000)
    expected = decoder(good).pixels
    broken: dict[str, bytes | BadImage] = {
        "cut": good[0][: len(good[0]) // 2],
        "random": random.Random(3).randbytes(3000),
        "empty": b"",
        "cut PNG": FORMATS["PNG"][:300],
        "large": png_of_size(5000, 5000),
        "unread": BadImage("read_error", "the disk is gone"),
    }
    for name, data in broken.items():
        batch = decoder([*good[:at], data, *good[at:]])
        bad = only_bad(batch, at)
        assert bad.status == {"large": "too_large", "unread": "read_error"}.get(name, "decode_error")
        rest = torch.cat([batch.pixels[:at], batch.pixels[at + 1 :]])
        assert torch.equal(rest, expected), name


@needs_dali
def test_a_batch_that_dali_refuses(refused: list[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    good = jpegs(3, seed=500)
    decoder = Decoder(ours(SMALL), 8)
    expected = decoder(good).pixels
    for data in refused:
        batch = decoder([good[0], data, good[1], good[2]])
        bad = only_bad(batch, 1)
        assert (bad.status, bad.width, bad.height) == ("decode_error", 60, 44)
        assert torch.equal(batch.pixels[[0, 2, 3]], expected)
        # Later batches are as if nothing had been.
        assert torch.equal(decoder(good).pixels, expected)
    batch = decoder([*refused, good[0]])
    assert batch.good == [3]
    assert torch.equal(batch.pixels[3], expected[0])
    batch = decoder(refused)
    assert batch.good == []
    capfd.readouterr()  # libjpeg writes what is wrong with the tables


@needs_dali
def test_dali_is_built_anew_once_for_each_image_that_it_names(
    refused: list[bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Halving 16 images would take four steps, and a pipeline for each."""
    built: list[int] = []
    build = dali.Pipeline._build

    def count(self: dali.Pipeline) -> Any:
        built.append(1)
        return build(self)

    monkeypatch.setattr(dali.Pipeline, "_build", count)
    good = jpegs(14, seed=800)
    expected = Decoder(ours(SMALL), 16)(good).pixels
    for bad in (refused[:1], refused[:2], []):
        built.clear()
        blobs = [*good[:9], *bad, *good[9:]]
        batch = Decoder(ours(SMALL), 16)(blobs)
        assert batch.good == [i for i in range(len(blobs)) if blobs[i] not in bad]
        assert torch.equal(batch.pixels[batch.good], expected)
        assert len(built) == 1 + len(bad)
    capfd.readouterr()


@needs_dali
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_damage_costs_one_image(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(seed)
    good = jpegs(3, seed=600)
    decoder = Decoder(ours(SMALL), 4, max_pixels=1_000_000)
    expected = decoder(good).pixels
    for attempt in range(100):
        whole = encode(
            picture(rng.randint(30, 120), rng.randint(30, 120), attempt),
            progressive=rng.random() < 0.4,
            restart_marker_blocks=rng.choice([0, 4]),
        )
        data = bytearray(whole)
        begin = data.index(rng.choice([b"\xff\xc4", b"\xff\xda", whole[frame_header(whole) :][:2]])) + 2
        for _ in range(rng.choice([1, 4, 16])):
            data[rng.randrange(begin, min(begin + rng.choice([20, 2000]), len(data) - 2))] = rng.randrange(256)
        batch = decoder([good[0], bytes(data), *good[1:]])
        assert torch.equal(batch.pixels[[0, 2, 3]], expected), (seed, attempt)
        assert {0, 2, 3} <= set(batch.good)
        if 1 in batch.good:  # Then Pillow can decode it too.
            assert decode(bytes(data), ours(SMALL))[0].shape == (3, 48, 48)
    capfd.readouterr()


@needs_dali
def test_bad_images_that_are_found_before_leave_stderr_clean_and_the_process_alive() -> None:
    code = """
    import io, random
    from PIL import Image
    from dask_imgcurator.images.decoder import Decoder
    from dask_imgcurator.images.preprocess import Preprocess

    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG")
    data = buffer.getvalue()
    decoder = Decoder(Preprocess((48, 48), (0.5,) * 3, (0.5,) * 3), 8)
    for seed in range(5):
        rng = random.Random(seed)
        cut = data[: rng.randrange(len(data) - 2)]
        batch = decoder([data, b"", rng.randbytes(2000), cut, b"\\xff\\xd8\\xff", data])
        assert batch.good == [0, 5], batch.infos
    print("done")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "done", "")


def test_warnings_of_pillow_do_not_get_out_of_its_threads() -> None:
    """Here a warning is an error, so each that came through would cost an image."""
    data = encode(picture(83, 61).quantize(37), "PNG", transparency=bytes(range(37)))
    with pytest.warns(UserWarning, match="Palette images with Transparency"):
        Image.open(io.BytesIO(data)).convert("RGB")
    before = list(warnings.filters)
    decoder = Decoder(ours(SMALL), 64, dali_device=None, threads=4)
    for _ in range(10):
        assert len(decoder([data] * 64).good) == 64
    assert list(warnings.filters) == before


def test_warnings_of_others_are_heard_while_pillow_reads() -> None:
    with pillow.open_image(FORMATS["PNG"]), pytest.warns(UserWarning, match="of the encoder"):
        warnings.warn("of the encoder", stacklevel=1)


def test_an_empty_batch() -> None:
    batch = Decoder(ours(SMALL), 8, dali_device=None)([])
    assert batch.pixels.shape == (0, 3, 48, 48)
    assert batch.good == []
