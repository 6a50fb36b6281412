"""Every kind of image file against open_clip's own transform; run as a script, it prints the table of them."""

from __future__ import annotations

import importlib
import io
import random
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageCms, ImageOps, features

from dask_imgcurator.images import formats
from dask_imgcurator.images.dali import dali_problem
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.images.formats import FORMATS, BadImage, format_table
from dask_imgcurator.images.pillow import ImageInfo, inspect
from dask_imgcurator.images.preprocess import Preprocess

CFG = PreprocessCfg(size=96)
PLUGINS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}


def plugin(name: str) -> Any:
    """Make Pillow ready for a format, as the plugin's own page says; None where it is not installed."""
    try:
        module = importlib.import_module(PLUGINS[name])
    except ImportError:
        return None
    if name == "HEIF":
        module.register_heif_opener()
    return module


# --- pictures and files -----------------------------------------------------------------------------


def picture(width: int = 150, height: int = 110, seed: int = 0) -> Image.Image:
    """A photograph's part where there is one, else waves."""
    try:
        from skimage import data

        whole = Image.fromarray(data.chelsea()).crop((90, 40, 390, 260))
        turned = whole.rotate(0 if seed == 0 else 17 * seed, expand=False)
        return turned.resize((width, height), Image.Resampling.LANCZOS)
    except ImportError:
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * (0.05 + c / 40) + y * 0.04 + seed + c) for c in range(3)]
        return Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))


def encode(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def translucent(image: Image.Image) -> Image.Image:
    """With an alpha channel from 0 to 255."""
    out = image.copy()
    out.putalpha(Image.radial_gradient("L").resize(image.size))
    return out


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def resampled_jpeg(luma: int, width: int, height: int, like: str) -> bytes:
    """A JPEG with a chroma subsampling that Pillow does not write.

    4:1:1 has as many blocks in a unit as 4:2:0, and 4:4:0 as 4:2:2: sampling factors and size are written over. The
    units stand in other places then, but the file is as good as any.
    """
    data = bytearray(encode(picture(width, height), subsampling=like, quality=90))
    frame = data.index(b"\xff\xc0")
    new = {0x41: (2 * width, height // 2), 0x12: (width // 2, 2 * height)}[luma]
    data[frame + 5 : frame + 9] = struct.pack(">HH", new[1], new[0])
    data[frame + 11] = luma
    return bytes(data)


def adobe(data: bytes, transform: int | None) -> bytes:
    """Set the colour transform in a JPEG's Adobe marker, or take the marker out."""
    at = data.index(b"\xff\xee\x00\x0eAdobe")
    if transform is None:
        return data[:at] + data[at + 16 :]
    return data[: at + 15] + bytes([transform]) + data[at + 16 :]


def jpegs() -> Iterator[tuple[str, bytes]]:
    rgb = picture()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "with a thumbnail"
    yield "gray (4:0:0)", encode(rgb.convert("L"), quality=90)
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield sampling, encode(rgb, subsampling=sampling, quality=90)
        yield f"{sampling}, progressive", encode(rgb, subsampling=sampling, quality=85, progressive=True)
    yield "4:1:1", resampled_jpeg(0x41, 112, 288, "4:2:0")
    yield "4:4:0", resampled_jpeg(0x12, 288, 112, "4:2:2")
    yield "gray, progressive", encode(rgb.convert("L"), quality=85, progressive=True)
    yield "restart markers", encode(rgb, restart_marker_blocks=3)
    yield "EXIF-rotated", encode(rgb, exif=oriented(6), quality=90)
    yield "ICC profile", encode(rgb, icc_profile=profile, quality=90)
    yield "ICC profile in three parts", encode(rgb, icc_profile=random.Random(0).randbytes(150_000))
    yield "EXIF with thumbnail", encode(rgb, exif=exif.tobytes() + encode(picture(32, 24)))
    yield "bytes behind the end", encode(rgb) + bytes(500)
    cmyk = encode(rgb.convert("CMYK"), quality=90)
    yield "CMYK", adobe(cmyk, 0)
    yield "YCCK", adobe(cmyk, 2)
    yield "CMYK without Adobe marker", adobe(cmyk, None)
    components = encode(rgb, keep_rgb=True, quality=90)
    yield "RGB", components
    yield "RGB without Adobe marker", adobe(components, None)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(samples: np.ndarray, depth: int, colour: int, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """Write a PNG by hand, from samples (height, width, channels) of `depth` bits."""
    height, width, _ = samples.shape
    raw = b""
    for x, y, dx, dy in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[y::dy, x::dx]
        if part.size == 0:
            continue
        rows = part.reshape(len(part), -1)
        if depth == 16:
            packed = rows.astype(">u2").view(np.uint8)
        else:
            bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
            packed = np.packbits(bits.reshape(len(rows), -1), axis=-1)
        raw += b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pngs() -> Iterator[tuple[str, bytes]]:
    rgb = np.asarray(picture()).astype(np.int64)
    gray = np.asarray(picture().convert("L"))[..., None].astype(np.int64)
    rgba = np.asarray(translucent(picture())).astype(np.int64)
    la = rgba[..., [1, 3]]
    noise = np.random.default_rng(0).integers(0, 256, rgba.shape)  # the lower byte of 16 bits
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    palettes = {depth: chunk(b"PLTE", colours[: 2**depth].tobytes()) for depth in (1, 2, 4, 8)}
    seen_through = palettes[8] + chunk(b"tRNS", bytes(range(200)))
    for interlaced in (False, True):
        tail = ", interlaced" if interlaced else ""
        for depth in (1, 2, 4, 8):
            yield f"gray {depth} bit{tail}", png(gray >> 8 - depth, depth, 0, interlaced)
            yield f"palette {depth} bit{tail}", png(gray >> 8 - depth, depth, 3, interlaced, palettes[depth])
        yield f"palette with transparency{tail}", png(gray, 8, 3, interlaced, seen_through)
        yield f"gray 16 bit{tail}", png(gray << 8 | noise[..., :1], 16, 0, interlaced)
        yield f"gray with transparent level{tail}", png(gray, 8, 0, interlaced, chunk(b"tRNS", b"\0\x60"))
        yield f"RGB 8 bit{tail}", png(rgb, 8, 2, interlaced)
        yield f"RGB 16 bit{tail}", png(rgb << 8 | noise[..., :3], 16, 2, interlaced)
        yield f"gray and alpha 8 bit{tail}", png(la, 8, 4, interlaced)
        yield f"gray and alpha 16 bit{tail}", png(la << 8 | noise[..., :2], 16, 4, interlaced)
        yield f"RGBA 8 bit{tail}", png(rgba, 8, 6, interlaced)
        yield f"RGBA 16 bit{tail}", png(rgba << 8 | noise, 16, 6, interlaced)
    yield "RGB with transparent colour", png(rgb, 8, 2, False, chunk(b"tRNS", struct.pack(">HHH", 90, 80, 70)))
    yield "EXIF-rotated", encode(picture(), "PNG", exif=oriented(8))
    yield "animated", encode(picture(), "PNG", save_all=True, append_images=[picture(seed=1), picture(seed=2)])
    yield "one pixel", png(rgb[:1, :1], 8, 2)


def webps() -> Iterator[tuple[str, bytes]]:
    frames = [picture(seed=i) for i in range(3)]
    yield "lossy", encode(frames[0], "WEBP", quality=80)
    yield "lossless", encode(frames[0], "WEBP", lossless=True)
    yield "alpha", encode(translucent(frames[0]), "WEBP", quality=80)
    yield "alpha, lossless", encode(translucent(frames[0]), "WEBP", lossless=True)
    yield "EXIF-rotated", encode(frames[0], "WEBP", exif=oriented(3))
    yield "animated", encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def gifs() -> Iterator[tuple[str, bytes]]:
    frames = [picture(seed=i).quantize(64) for i in range(3)]
    yield "still", encode(frames[0], "GIF", interlace=0)
    yield "interlaced", encode(frames[0], "GIF", interlace=1)
    yield "transparent", encode(frames[0], "GIF", transparency=5)
    yield "gray", encode(picture().convert("L"), "GIF")
    yield "animated", encode(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2)
    # The first frame covers a part of the screen only.
    small = bytearray(encode(frames[0], "GIF"))
    small[6:10] = struct.pack("<HH", 180, 130)
    at = small.index(b"\x2c\0\0\0\0", 13)
    small[at + 1 : at + 5] = struct.pack("<HH", 20, 9)
    yield "first frame in a larger screen", bytes(small)


def bmp(width: int, height: int, bits: int, compression: int, pixels: bytes, tail: bytes = b"") -> bytes:
    """Write a BMP by hand; `tail` holds the masks or the palette."""
    colours = len(tail) // 4 if bits <= 8 else 0
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 1, 1, colours, 0) + tail
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


def bmps() -> Iterator[tuple[str, bytes]]:
    rgb = picture(152, 110)
    array = np.asarray(rgb)
    yield "24 bit", encode(rgb, "BMP")
    yield "1 bit", encode(rgb.convert("1"), "BMP")
    yield "8 bit gray", encode(rgb.convert("L"), "BMP")
    yield "8 bit palette", encode(rgb.quantize(200), "BMP")
    yield "32 bit, alpha", encode(translucent(rgb), "BMP")
    yield "top row first", bmp(152, -110, 24, 0, array[..., ::-1].tobytes())
    r, g, b = (array[::-1, :, c].astype(np.uint16) for c in range(3))
    yield "16 bit (5-5-5)", bmp(152, 110, 16, 0, (r >> 3 << 10 | g >> 3 << 5 | b >> 3).astype("<u2").tobytes())
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    yield "16 bit (5-6-5)", bmp(152, 110, 16, 3, (r >> 3 << 11 | g >> 2 << 5 | b >> 3).astype("<u2").tobytes(), masks)
    levels = b"".join(bytes((i, i, i, 0)) for i in range(256))
    rows = np.asarray(rgb.convert("L"))[::-1]
    runs = b"".join(b"".join(bytes((1, v)) for v in row.tolist()) + b"\0\0" for row in rows) + b"\0\1"
    yield "8 bit, run lengths", bmp(152, 110, 8, 1, runs, levels)
    nibbles = rows[:, 0::2] >> 4 << 4 | rows[:, 1::2] >> 4
    steps = b"".join(bytes((17 * i, 17 * i, 255 - 17 * i, 0)) for i in range(16))
    yield "4 bit palette", bmp(152, 110, 4, 0, nibbles.tobytes(), steps)


def tiffs() -> Iterator[tuple[str, bytes]]:
    rgb = picture()
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257 ^ 0x0155)
    yield "raw", encode(rgb, "TIFF")
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield name.removeprefix("tiff_"), encode(rgb, "TIFF", compression=name)
    yield "group 4, 1 bit", encode(rgb.convert("1"), "TIFF", compression="group4")
    yield "gray 16 bit", encode(deep, "TIFF")
    yield "gray 16 bit, deflate", encode(deep, "TIFF", compression="tiff_adobe_deflate")
    yield "float", encode(rgb.convert("F"), "TIFF")
    yield "palette", encode(rgb.quantize(99), "TIFF")
    yield "alpha", encode(translucent(rgb), "TIFF")
    yield "CMYK", encode(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw")
    yield "Lab", encode(rgb.convert("LAB"), "TIFF")
    yield "several pages", encode(rgb, "TIFF", save_all=True, append_images=[picture(seed=1)])
    yield "BigTIFF", encode(rgb, "TIFF", big_tiff=True)
    try:
        import tifffile
    except ImportError:
        return
    array = np.asarray(rgb)
    noise = np.random.default_rng(2).integers(0, 256, array.shape, np.uint16)

    def write(data: np.ndarray, photometric: str = "rgb", **options: Any) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, data, photometric=photometric, **options)
        return buffer.getvalue()

    yield "tiled", write(array, tile=(32, 48))
    yield "tiled, deflate, predictor", write(array, tile=(64, 64), compression="zlib", predictor=True)
    yield "big-endian", write(array, byteorder=">")
    yield "RGB 16 bit", write(array.astype(np.uint16) << 8 | noise)
    yield "planes apart", write(np.ascontiguousarray(array.transpose(2, 0, 1)), planarconfig="separate")
    yield "white is zero", write(array[..., 1], "miniswhite")


def avifs() -> Iterator[tuple[str, bytes]]:
    if not features.check("avif"):
        return
    frames = [picture(seed=i) for i in range(3)]
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield sampling, encode(frames[0], "AVIF", subsampling=sampling)
    yield "gray (4:0:0)", encode(frames[0].convert("L"), "AVIF")
    yield "alpha", encode(translucent(frames[0]), "AVIF")
    yield "EXIF-rotated", encode(frames[0], "AVIF", exif=oriented(6))
    yield "animated", encode(frames[0], "AVIF", save_all=True, append_images=frames[1:])


def heics() -> Iterator[tuple[str, bytes]]:
    if plugin("HEIF") is None:
        return
    rgb = picture()
    yield "4:2:0", encode(rgb, "HEIF", quality=80)
    yield "4:4:4", encode(rgb, "HEIF", quality=80, chroma=444)
    yield "gray", encode(rgb.convert("L"), "HEIF", quality=80)
    yield "alpha", encode(translucent(rgb), "HEIF", quality=80)
    yield "EXIF-rotated", encode(rgb, "HEIF", quality=80, exif=oriented(6))
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    yield "gray 10 bit", encode(deep, "HEIF", quality=80)
    yield "tiles", encode(picture(600, 500), "HEIF", quality=60, tile_size=256)
    yield "several pictures", encode(rgb, "HEIF", save_all=True, append_images=[picture(seed=1)])


def jxls() -> Iterator[tuple[str, bytes]]:
    if plugin("JXL") is None:
        return
    rgb = picture()
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257 ^ 0x0155)
    yield "lossy", encode(rgb, "JXL", quality=80)
    yield "lossless", encode(rgb, "JXL", lossless=True)
    yield "alpha", encode(translucent(rgb), "JXL", lossless=True)
    yield "gray", encode(rgb.convert("L"), "JXL")
    yield "gray and alpha", encode(translucent(rgb).convert("LA"), "JXL")
    yield "gray 16 bit", encode(deep, "JXL", lossless=True)
    yield "container", encode(rgb, "JXL", use_container=True)
    yield "EXIF", encode(rgb, "JXL", exif=oriented(6))


def others() -> Iterator[tuple[str, bytes]]:
    rgb = picture()
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257 ^ 0x0155)
    yield "MPO", encode(rgb, "MPO", save_all=True, append_images=[picture(seed=1)])
    if features.check("jpg_2000"):
        yield "JPEG 2000", encode(rgb, "JPEG2000")
        yield "JPEG 2000, codestream alone", encode(rgb, "JPEG2000", no_jp2=True)
        yield "JPEG 2000, tiles", encode(rgb, "JPEG2000", tile_size=(32, 32))
        yield "JPEG 2000, alpha", encode(translucent(rgb), "JPEG2000")
    yield "PNM, P6", encode(rgb, "PPM")
    yield "PNM, P5, 16 bit", encode(deep, "PPM")
    yield "PNM, P4", encode(rgb.convert("1"), "PPM")
    yield "PNM, Pf", encode(rgb.convert("F"), "PPM")


FAMILIES: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
    "JPEG": jpegs,
    "PNG": pngs,
    "WebP": webps,
    "GIF": gifs,
    "BMP": bmps,
    "TIFF": tiffs,
    "AVIF": avifs,
    "HEIC": heics,
    "JPEG XL": jxls,
    "other": others,
}


@dataclass(frozen=True)
class File:
    """A made file, and who is to decode it."""

    family: str
    name: str
    data: bytes

    @property
    def decoder(self) -> str:
        other = any(word in self.name for word in ("CMYK", "YCCK", "RGB"))
        return "pillow" if self.family != "JPEG" or other or dali_problem() is not None else "dali"


@cache
def made(family: str) -> list[File]:
    return [File(family, name, data) for name, data in FAMILIES[family]()]


# --- pixels -----------------------------------------------------------------------------------------


def decoder_for(cfg: PreprocessCfg, count: int, **options: Any) -> Decoder:
    device = "cpu" if dali_problem() is None else None
    return Decoder(Preprocess.from_open_clip(vars(cfg)), count, dali_device=device, **options)


def theirs(cfg: PreprocessCfg, image: Image.Image) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow has something to say of palettes with transparency.
        return image_transform_v2(cfg, is_train=False)(image)


def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Absolute difference in 1/255 of the range."""
    return (a - b).abs() * torch.tensor(CFG.std)[:, None, None] * 255


def measure(files: list[File]) -> Iterator[tuple[File, ImageInfo | BadImage, float, float]]:
    """Decode files in one batch; yield who decoded each, and its mean and largest difference to open_clip's pixels."""
    batch = decoder_for(CFG, len(files))([file.data for file in files])
    for file, info, pixels in zip(files, batch.infos, batch.pixels, strict=True):
        difference = levels(pixels, theirs(CFG, Image.open(io.BytesIO(file.data))))
        yield file, info, difference.mean().item(), difference.max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_open_clips(family: str, record_property: Callable[[str, object], None]) -> None:
    files = made(family)
    if not files:
        pytest.skip(f"nothing here writes {family}")
    for file, info, mean, largest in measure(files):
        record_property(file.name, f"mean {mean:.4f}, max {largest:.2f}")
        assert isinstance(info, ImageInfo), (file.name, info)
        assert info.decoder == file.decoder, file.name
        assert FORMATS[info.format].title == family or family == "other", file.name
        assert (info.width, info.height) == Image.open(io.BytesIO(file.data)).size, file.name
        if info.decoder == "pillow":
            assert largest == 0, file.name
        else:
            assert mean <= 1, file.name


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "JPEG"])  # tests/test_decode.py has these
def test_a_cut_file_is_an_error_or_lacks_nothing(
    family: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the end of the file is not needed for the first picture, its pixels are all there."""
    monkeypatch.setattr(picture, "__defaults__", (56, 40, 0))
    for name, data in FAMILIES[family]():
        ends = {*range(0, len(data), max(1, len(data) // 12)), *range(max(0, len(data) - 6), len(data))}
        whole, *cut = zip(*_decode([data, *(data[:end] for end in sorted(ends))]), strict=True)
        assert isinstance(whole[0], ImageInfo), name
        for info, pixels in cut:
            if isinstance(info, BadImage):
                assert info.status == "decode_error"
                assert str(info).isprintable(), name
            else:
                assert torch.equal(pixels, whole[1]), name
        assert sum(isinstance(info, BadImage) for info, _ in cut) >= 4, name
    capfd.readouterr()  # libjpeg and libtiff write what they miss


def test_a_jpeg_2000_without_its_last_tiles_is_an_error() -> None:
    """openjpeg takes it for whole when the cut is behind a tile's first marker."""
    data = encode(picture(56, 40), "JPEG2000", tile_size=(32, 32))
    behind = [i + 2 for i in range(len(data)) if data.startswith(b"\xff\x90", i)]
    assert len(behind) == 4
    for end in behind:
        assert Image.open(io.BytesIO(data[:end])).load() is not None
    for end in (*behind, len(data) - 2):
        with pytest.raises(BadImage, match="truncated JPEG 2000"):
            inspect(data[:end])
    assert inspect(data).mode == "RGB"


def test_a_heic_without_its_last_tiles_is_an_error() -> None:
    """libheif takes it for whole."""
    if plugin("HEIF") is None:
        pytest.skip("pillow-heif is not installed")
    data = encode(picture(600, 500), "HEIF", quality=60, tile_size=256)
    assert Image.open(io.BytesIO(data[: len(data) * 2 // 3])).load() is not None
    for end in (len(data) // 2, len(data) * 2 // 3, len(data) - 1):
        with pytest.raises(BadImage, match=f"truncated HEIC: box 'mdat' goes to byte {len(data):,} of {end:,}"):
            inspect(data[:end])


def _decode(blobs: list[bytes], **options: Any) -> tuple[list[ImageInfo | BadImage], torch.Tensor]:
    batch = decoder_for(CFG, len(blobs), **options)(blobs)
    return batch.infos, batch.pixels


@pytest.mark.parametrize("family", FAMILIES)
def test_orientation_is_applied_only_when_asked_for(family: str) -> None:
    files = [file for file in made(family) if "EXIF-rotated" in file.name]
    if not files:
        pytest.skip("no EXIF-rotated file of this family")
    for file in files:
        image = Image.open(io.BytesIO(file.data))
        upright = theirs(CFG, ImageOps.exif_transpose(image))
        assert levels(_decode([file.data], adjust_orientation=True)[1][0], upright).mean() < 1
        # libheif turns the picture itself, and says so.
        turned = family != "HEIC"
        assert (levels(_decode([file.data])[1][0], upright).mean() > 5) == turned


# --- what is taken for what -------------------------------------------------------------------------


def test_names_and_extensions_are_never_asked(tmp_path: Path) -> None:
    import tarfile

    from dask_imgcurator.models.encoders import resolve_encoder
    from dask_imgcurator.steps.embed import EmbedSpec, embed_partition
    from dask_imgcurator.steps.read import ReadSpec, index_partition

    files = [made(family)[0] for family in FAMILIES if made(family)]
    frames = []
    for shard, extensions in (("right", None), ("wrong", ["jpg", "png", "webp"])):
        path = tmp_path / f"{shard}.tar"
        with tarfile.open(path, "w") as tar:
            for i, file in enumerate(files):
                extension = extensions[i % 3] if extensions else {"other": "jpg"}.get(file.family, "tiff")
                info = tarfile.TarInfo(f"{i:03}.{extension}")
                info.size = len(file.data)
                tar.addfile(info, io.BytesIO(file.data))
        spec = EmbedSpec(resolve_encoder("starter"), batch_size=4)
        frames.append(embed_partition(index_partition([str(path)], ReadSpec()), spec))
    right, wrong = frames
    assert right.status.tolist() == wrong.status.tolist() == ["ok"] * len(files)
    assert right.ext.tolist() != wrong.ext.tolist()
    for a, b in zip(right.embedding, wrong.embedding, strict=True):
        assert np.array_equal(a, b)


def icon() -> bytes:
    """An icon whose directory says 16 x 16, and whose picture is a PNG of another size."""
    inside = png(np.zeros((300, 400, 3), np.int64), 8, 2)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 24, len(inside), 22) + inside


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        icon(),
        encode(picture(20, 10), "TGA"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"P3\n1 1\n255\n255 0 0\n",
    ],
    ids=["EPS", "ICO", "TGA", "SVG", "plain PNM"],
)
def test_other_formats_are_left_out_by_name(data: bytes) -> None:
    with pytest.raises(BadImage, match=f"unsupported image format .starts with {data[:2].hex(' ')}.*JPEG XL"):
        inspect(data)
    for name in ("EPS", "ICO", "TGA"):
        assert name not in FORMATS


@pytest.fixture
def plugins_anew() -> Iterator[None]:
    formats._problem.cache_clear()
    yield
    formats._problem.cache_clear()


HEADS = {
    "HEIF": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "JXL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100),
    "AVIF": b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafavif" + bytes(100),
    "WEBP": b"RIFF\x40\0\0\0WEBPVP8 " + bytes(100),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [("HEIF", "HEIC image: pip install pillow-heif"), ("JXL", "JPEG XL image: pip install pillow-jxl-plugin")],
)
def test_a_missing_plugin_is_named_with_its_remedy(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, plugins_anew: None
) -> None:
    monkeypatch.setitem(sys.modules, PLUGINS[name], None)  # so that importing it fails
    (info, good), pixels = _decode([HEADS[name], encode(picture())])
    assert isinstance(info, BadImage)
    assert info.status == "decode_error"
    assert str(info).startswith(message)
    assert isinstance(good, ImageInfo)
    assert pixels[1].any()


@pytest.mark.parametrize(("name", "title"), [("AVIF", "AVIF"), ("WEBP", "WebP")])
def test_a_pillow_that_lacks_a_format_is_named(
    name: str, title: str, monkeypatch: pytest.MonkeyPatch, plugins_anew: None
) -> None:
    monkeypatch.setattr(features, "check", lambda feature: feature != title.lower())
    with pytest.raises(BadImage, match=f"{title} image: this Pillow was built without it: pip install"):
        inspect(HEADS[name])


def test_plugins_are_imported_when_their_format_is_met_and_not_before() -> None:
    import subprocess

    code = (
        "import sys; from dask_imgcurator.images.decoder import Decoder, Preprocess; "
        "Decoder(Preprocess((48, 48), (0.5,) * 3, (0.5,) * 3), 1, dali_device=None)([sys.stdin.buffer.read()]); "
        "print(sorted({'pillow_heif', 'pillow_jxl'} & set(sys.modules)))"
    )
    for data, expected in ((encode(picture()), "[]"), (HEADS["JXL"], "['pillow_jxl']" if plugin("JXL") else "[]")):
        run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True, timeout=120)
        assert run.stdout.decode().strip() == expected


# --- sizes ------------------------------------------------------------------------------------------


def jxl_header(width: int, height: int) -> bytes:
    """Begin of a JPEG XL codestream: both sides less one in 18 bits, no ratio; least significant bit first."""
    bits = "0" + "01" + f"{height - 1:018b}"[::-1] + "000" + "01" + f"{width - 1:018b}"[::-1]
    padded = bits.ljust(48, "0")
    return b"\xff\x0a" + bytes(int(padded[i : i + 8][::-1], 2) for i in range(0, 48, 8)) + bytes(40)


def large(width: int, height: int) -> Iterator[tuple[str, bytes]]:
    """Small files that claim to be of a size."""
    small = picture(40, 30)
    jpeg, gif, tiff = encode(small), encode(small.quantize(9), "GIF"), bytearray(encode(small, "TIFF"))
    at = jpeg.index(b"\xff\xc0")
    yield "JPEG", jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    yield "PNG", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    yield "WebP", b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + canvas + bytes(100)
    yield "GIF", gif[:6] + struct.pack("<HH", width, height) + gif[10:]
    yield "BMP", bmp(width, height, 24, 0, bytes(1000))
    for tag, value in ((256, width), (257, height)):
        entry = tiff.index(struct.pack("<H", tag), 8)
        tiff[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, value)
    yield "TIFF", bytes(tiff)
    yield "AVIF", HEADS["AVIF"] + b"\0\0\0\x14ispe" + struct.pack(">III", 0, width, height)
    yield "HEIC", HEADS["HEIF"] + b"\0\0\0\x14ispe" + struct.pack(">III", 0, width, height)
    yield "JPEG XL", jxl_header(width, height)
    if features.check("jpg_2000"):
        codestream = encode(small, "JPEG2000", no_jp2=True)
        at = codestream.index(b"\xff\x51") + 6
        yield "JPEG 2000", codestream[:at] + struct.pack(">II", width, height) + codestream[at + 8 :]
    yield "PNM", b"P6 %d %d 255\n" % (width, height) + bytes(1000)


LIMIT = 178_956_970


@pytest.mark.parametrize(("width", "height"), [(65_500, 65_500), (65_500, 2_733), (2_733, 65_500)])
def test_a_bomb_of_any_format_is_too_large(width: int, height: int) -> None:
    assert width * height > LIMIT
    for title, data in large(width, height):
        if title in ("HEIC", "JPEG XL") and plugin({"HEIC": "HEIF"}.get(title, "JXL")) is None:
            continue
        with pytest.raises(BadImage) as caught:
            inspect(data, LIMIT)
        bad = caught.value
        assert (bad.status, bad.width, bad.height) == ("too_large", width, height), title
        assert str(bad) == f"{width} x {height} pixels, more than the limit of 178,956,970", title


@pytest.mark.parametrize("limit", [LIMIT, None])
def test_a_side_that_no_column_can_hold_is_not_reported(limit: int | None) -> None:
    for width, height in ((2**32 - 200, 3), (1, 2**31), (2**32 - 1, 2**32 - 1)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
        with pytest.raises(BadImage, match=f"{width} x {height} pixels, more than supported") as caught:
            inspect(data, limit)
        assert (caught.value.status, caught.value.width, caught.value.height) == ("too_large", None, None)


def test_a_small_file_that_claims_a_size_within_the_limit_is_an_error() -> None:
    blobs = dict(large(1900, 2100))
    infos, pixels = _decode(list(blobs.values()), max_pixels=1900 * 2100)
    for title, info, one in zip(blobs, infos, pixels, strict=True):
        # A JPEG of either kind that lacks data inside, but has its end marker, is filled up; and a screen larger than
        # its frame is in order in GIF.
        if title in ("JPEG", "JPEG 2000", "GIF"):
            assert isinstance(info, ImageInfo), title
            assert (info.width, info.height) == (1900, 2100)
        else:
            assert isinstance(info, BadImage), title
            assert info.status == "decode_error", (title, info)
            assert not one.any()


SIZES = [(1, 1), (8, 8), (16, 8), (40, 30), (30, 20), (160, 90), (50, 40), (24, 20), (256, 256), (264, 256), (513, 11)]


@pytest.mark.parametrize("family", ["WebP", "AVIF", "HEIC", "JPEG XL"])
def test_sizes_read_before_opening_are_the_decoders(family: str) -> None:
    if not made(family):
        pytest.skip(f"nothing here writes {family}")
    name = next(name for name, format_ in FORMATS.items() if format_.title == family)
    variants: list[dict[str, Any]] = [{}]
    if name == "WEBP":
        variants = [{}, {"lossless": True}, {"exif": oriented(1)}]
    if name == "JXL":
        variants = [{}, {"use_container": True}, {"lossless": True}]
    read = FORMATS[name].size
    assert read is not None
    for options in variants:
        # HEVC codes pairs of pixels, and the container cuts them; the largest size is the coded one.
        for size in [(w, h) for w, h in SIZES if name != "HEIF" or (w % 2 == h % 2 == 0 and w >= 16)]:
            data = encode(picture(*size), name, **options)
            assert Image.open(io.BytesIO(data)).size == size
            found = read(data)
            assert found is not None
            assert found == size if name != "HEIF" else found[0] >= size[0] and found[1] >= size[1], (size, options)
            # So the limit holds before the file is opened, and an image at the limit passes.
            assert inspect(data, found[0] * found[1]).width == size[0]
            with pytest.raises(BadImage, match="more than the limit"):
                inspect(data, found[0] * found[1] - 1)


# --- the table --------------------------------------------------------------------------------------


def test_the_table_names_every_format_once() -> None:
    rows = format_table()
    assert [title for title, _, _ in rows] == [format_.title for format_ in FORMATS.values()]
    assert len({title for title, _, _ in rows}) == len(rows)
    assert set(FAMILIES) - {"other"} <= {title for title, _, _ in rows}
    assert ("JPEG", "DALI (RGB, L), else Pillow", "") in rows
    assert ("HEIC", "Pillow", "pillow-heif") in rows


def test_no_two_formats_claim_the_same_bytes() -> None:
    for family in FAMILIES:
        for file in made(family):
            names = {name for name, format_ in FORMATS.items() if re.match(format_.begin, file.data, re.DOTALL)}
            # An AVIF's general brand may be HEIF's too: it stands first in the table.
            assert len(names - {"MPO"} - ({"HEIF"} if "AVIF" in names else set())) == 1, (family, file.name)


def markdown() -> str:
    """The table of formats: works, by which decoder, how far from open_clip's pixels."""
    lines = ["| format | kind | works | decoder | difference, mean | max |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        if not made(family):
            lines.append(f"| {family} | | not tried: nothing here writes it | | | |")
            continue
        for file, info, mean, largest in measure(made(family)):
            decoder = {"dali": "DALI", "pillow": "Pillow"}[info.decoder] if isinstance(info, ImageInfo) else str(info)
            works = "yes" if isinstance(info, ImageInfo) else "no"
            lines.append(f"| {family} | {file.name} | {works} | {decoder} | {mean:.3f} | {largest:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
