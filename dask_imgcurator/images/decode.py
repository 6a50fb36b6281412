"""Bytes to pixels: open_clip's own preprocessing by DALI or Pillow, bad images set aside.

DALI fails a whole batch for one bad image and may take the process with it, so every image is looked at first: its
container is read by Pillow and, for JPEG, its markers are walked to the first scan. `FORMATS` says what is decoded and
by whom. A batch that DALI refuses all the same is halved until the images that it refuses stand alone: these go to
Pillow, so that nobody's pixels depend on a neighbour.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..engine.device import is_out_of_memory, to_device
from .quality import HASH_SIDE, SIDE, View, view

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = [
    "FORMATS",
    "BadImage",
    "Batch",
    "Decoder",
    "Format",
    "Geometry",
    "ImageInfo",
    "Preprocess",
    "dali_problem",
    "format_table",
    "inspect",
    "pil_pixels",
]


T = TypeVar("T")


# --- sizes that are read before Pillow opens a file -------------------------------------------------


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas of a WebP, from the header of its first chunk."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


_ISPE = re.compile(rb"\0\0\0\x14ispe\0{4}(.{4})(.{4})", re.DOTALL)


def _heif_size(data: bytes) -> tuple[int, int] | None:
    """Largest image that an ISO container (HEIF, AVIF) declares, from its ``ispe`` properties."""
    sizes = [(int.from_bytes(w, "big"), int.from_bytes(h, "big")) for w, h in _ISPE.findall(data, 0, 1 << 20)]
    return max(sizes, key=math.prod, default=None)


#: JPEG XL's width as a multiple of its height, by the header's ratio field (ISO/IEC 18181-1, SizeHeader).
_JXL_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def _jxl_size(data: bytes) -> tuple[int, int] | None:
    """Size that a JPEG XL codestream's header tells (ISO/IEC 18181-1, SizeHeader)."""
    if data[:2] != b"\xff\x0a":
        # In a container, the codestream lies in a box jxlc, or in parts, each behind its number, in boxes jxlp.
        at = min((i + skip for name, skip in ((b"jxlc", 4), (b"jxlp", 8)) if (i := data.find(name)) >= 0), default=0)
        data = data[at : at + 16]
        if data[:2] != b"\xff\x0a":
            return None
    bits, position = int.from_bytes(data[2:16], "little"), 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return bits >> position - count & (1 << count) - 1

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    over, under = _JXL_RATIOS[take(3)]
    return (height * over // under if over else side()), height


# --- formats --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """One kind of image file: how it is known, and who decodes it.

    Attributes
    ----------
    title : str
        Its usual name.
    begin : re.Pattern of bytes
        What its first bytes match. Names and extensions are never asked.
    dali : frozenset of str
        Pillow modes that DALI decodes; Pillow decodes all others.
    feature : str or None
        What Pillow must have been built with (`PIL.features`).
    plugin : str or None
        Module that adds the format to Pillow; it is imported when the first such image is met.
    register : str or None
        Function of the plugin to be called; None: importing it is enough.
    package : str or None
        Package to install where the plugin is missing.
    size : callable or None
        Reads width and height from the bytes. For decoders that take memory for the pixels, or decode them, as soon
        as they open a file, or that have limits of their own there: `max_pixels` is checked before.
    """

    title: str
    begin: re.Pattern[bytes]
    dali: frozenset[str] = frozenset()
    feature: str | None = None
    plugin: str | None = None
    register: str | None = None
    package: str | None = None
    size: Callable[[bytes], tuple[int, int] | None] | None = None


def _begins(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


#: What is decoded and by whom, by Pillow's name of the format; the first whose beginning matches is taken.
#:
#: DALI has what it repeats of open_clip to a rounding error: JPEGs that are gray or YCbCr. All others go to Pillow:
#: open_clip resizes an image in its own mode and makes it RGB after that (a palette by nearest neighbour, alpha
#: premultiplied, 16 bits clipped), which only Pillow repeats exactly.
#:
#: Pillow knows many more formats. They are left out on purpose: some have no mark of their own and take random bytes
#: for an image (TGA), some run another program (EPS, by Ghostscript), some decode before their size is known (ICO).
FORMATS: Mapping[str, Format] = {
    "JPEG": Format("JPEG", _begins(rb"\xff\xd8\xff"), dali=frozenset({"RGB", "L"})),
    # Several JPEGs in one file, the first being the picture; Pillow finds out when it opens the JPEG.
    "MPO": Format("MPO", _begins(rb"\xff\xd8\xff")),
    "PNG": Format("PNG", _begins(rb"\x89PNG\r\n\x1a\n")),
    "WEBP": Format("WebP", _begins(rb"RIFF.{4}WEBP"), feature="webp", size=_webp_size),
    "GIF": Format("GIF", _begins(rb"GIF8[79]a")),
    "BMP": Format("BMP", _begins(rb"BM")),
    "TIFF": Format("TIFF", _begins(rb"II[*+]\0|MM\0[*+]")),
    # The brand of either may stand among the compatible ones only, behind a general one (mif1).
    "AVIF": Format("AVIF", _begins(rb".{4}ftyp(?:.{4}){0,16}?avi[fs]"), feature="avif", size=_heif_size),
    "HEIF": Format(
        "HEIC",
        _begins(rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|m[is]f1)"),
        plugin="pillow_heif",
        register="register_heif_opener",
        package="pillow-heif",
        size=_heif_size,
    ),
    "JXL": Format(
        "JPEG XL",
        _begins(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
        plugin="pillow_jxl",
        package="pillow-jxl-plugin",
        size=_jxl_size,
    ),
    "JPEG2000": Format("JPEG 2000", _begins(rb"\xffO\xffQ|\0\0\0\x0cjP  \r\n\x87\n"), feature="jpg_2000"),
    # Not its variants in plain text: where the last digit is missing, nobody can tell.
    "PPM": Format("PNM", _begins(rb"P[4-6f]\s")),
}


def format_table() -> list[tuple[str, str, str]]:
    """Return `FORMATS` for people: title, who decodes it, what must be installed beside Pillow.

    Returns
    -------
    list of (str, str, str)
        As ``("JPEG", "DALI (RGB, L), else Pillow", "")`` and ``("HEIC", "Pillow", "pillow-heif")``.
    """
    rows = []
    for format_ in FORMATS.values():
        modes = ", ".join(sorted(format_.dali, reverse=True))
        rows.append((format_.title, f"DALI ({modes}), else Pillow" if modes else "Pillow", format_.package or ""))
    return rows


def _recognise(data: bytes) -> str:
    """Find the format of a file (a key of `FORMATS`) and make Pillow ready for it."""
    if not data:
        raise BadImage("decode_error", "the file is empty (0 bytes)")
    name = next((name for name, format_ in FORMATS.items() if format_.begin.match(data)), None)
    if name is None:
        known = ", ".join(format_.title for format_ in FORMATS.values())
        raise BadImage("decode_error", f"no image format known here (starts with {data[:8].hex(' ')}; known: {known})")
    if (problem := _problem(name)) is not None:
        raise BadImage("decode_error", problem)
    return name


@functools.cache
def _problem(name: str) -> str | None:
    """Load what a format needs, once per process; say what is missing."""
    from PIL import features

    format_ = FORMATS[name]
    if format_.feature is not None and not features.check(format_.feature):
        return f"{format_.title} image: this Pillow was built without it: pip install --force-reinstall pillow"
    if format_.plugin is None:
        return None
    try:
        plugin = importlib.import_module(format_.plugin)
    except ImportError as err:
        return f"{format_.title} image: pip install {format_.package} ({err})"
    if format_.register is not None:
        getattr(plugin, format_.register)()
    return None


class BadImage(Exception):
    """An image that cannot be used; `status` is the value for that column.

    Attributes
    ----------
    status : str
        ``decode_error`` or ``too_large``.
    width, height : int or None
        Where the header tells them.
    """

    def __init__(self, status: str, message: str, width: int | None = None, height: int | None = None) -> None:
        super().__init__(message)
        self.status, self.width, self.height = status, width, height

    def __reduce__(self) -> tuple[Any, ...]:
        return BadImage, (self.status, str(self), self.width, self.height)


@dataclass(frozen=True)
class Geometry:
    """Where one image goes: resized to `width` x `height`, then cut (or padded) at `top`, `left`."""

    width: int
    height: int
    top: int
    left: int


@dataclass(frozen=True)
class Preprocess:
    """A model's image preprocessing, as open_clip describes it (`open_clip.PreprocessCfg`).

    Attributes
    ----------
    size : (int, int)
        Height and width of the model's input, pixels.
    mean, std : tuple of float
        Per channel, for pixels in 0 to 1.
    interpolation : {"bicubic", "bilinear"}
        Filter, always with antialiasing (as Pillow).
    resize_mode : {"shortest", "longest", "squash"}
        Which side is brought to `size`: the shorter (then cut), the longer (then padded), or both.
    fill_color : int
        Of the padding, 0 to 255.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def from_open_clip(cls, cfg: dict[str, Any]) -> Preprocess:
        """Read the result of `open_clip.get_model_preprocess_cfg`."""
        size = cfg["size"]
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
        mean, std = (v if isinstance(v, (tuple, list)) else (v,) * 3 for v in (cfg["mean"], cfg["std"]))
        interpolation = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
        mode = cfg["resize_mode"]
        if mode not in ("shortest", "longest", "squash"):
            raise ValueError(
                f"unknown resize mode {mode!r} in the model's preprocessing: expected shortest, longest or squash"
            )
        if mode == "shortest" and height != width:
            # open_clip does not hand its interpolation on in this one case.
            interpolation = "bicubic"
        return cls(
            (height, width),
            _three(mean),
            _three(std),
            interpolation,
            mode,
            int(cfg["fill_color"]),
        )

    def geometry(self, width: int, height: int) -> Geometry:
        """Return open_clip's exact geometry for an image of this size.

        The rounding is that of `torchvision.transforms.Resize`, `CenterCrop` and of
        `open_clip.transform.ResizeKeepRatio`, `CenterCropOrPad`: the long side is truncated, offsets are
        rounded half to even.
        """
        out_h, out_w = self.size
        if self.resize_mode == "squash":
            return Geometry(out_w, out_h, 0, 0)
        if self.resize_mode == "shortest" and out_h == out_w:
            if width <= height:
                new_w, new_h = out_w, int(out_w * height / width)
            else:
                new_w, new_h = int(out_h * width / height), out_h
        else:
            pick = max if self.resize_mode == "longest" else min
            ratio = pick(height / out_h, width / out_w)
            # open_clip itself fails where a side rounds to 0 (1 x 2000 pixels): one pixel is kept here.
            new_w, new_h = max(1, round(width / ratio)), max(1, round(height / ratio))
        return Geometry(new_w, new_h, _offset(new_h, out_h), _offset(new_w, out_w))


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    r, g, b = map(float, values)
    return r, g, b


def _offset(side: int, out: int) -> int:
    """Begin of the centred window: rounded when it cuts; when it pads, the smaller half is in front."""
    return round((side - out) / 2) if side >= out else -((out - side) // 2)


@dataclass(frozen=True)
class ImageInfo:
    """What an image's header says."""

    format: str
    mode: str
    width: int
    height: int
    decoder: str
    orientation: int = 1


def inspect(data: bytes, max_pixels: int | None = None) -> ImageInfo:
    """Look at an image's container, without decoding it (JPEG XL's plugin knows no other way and does).

    What is found here is a file whose end is missing. Bytes that are missing inside a JPEG which has its end marker
    are not found: no sign of it is sure, libjpeg only warns of it, and Pillow and DALI alike fill the rest with gray.

    Parameters
    ----------
    data : bytes
        The file.
    max_pixels : int, optional
        Largest width x height that is accepted.

    Raises
    ------
    BadImage
        If it is no image, too large, or a JPEG that ends early.
    """
    name = _recognise(data)
    read_size = FORMATS[name].size
    if read_size is not None and (size := read_size(data)) is not None:
        _check_size(*size, max_pixels)
    if name in ("AVIF", "HEIF"):
        _check_boxes(data, FORMATS[name].title)
    # What is 0xFF90 and more is a marker, never data: this is the end of the codestream, sought behind its first tile.
    if name == "JPEG2000" and data.rfind(b"\xff\xd9") <= data.find(b"\xff\x90"):
        raise BadImage("decode_error", f"truncated JPEG 2000: no end-of-codestream marker in {len(data):,} bytes")
    try:
        with _quiet, _open(data, name) as image:
            width, height = image.size
            format_, mode = image.format or name, image.mode
            transform = image.info.get("adobe_transform")
            # The tag is in the header already; reading it costs nothing for files without EXIF.
            orientation = int(image.getexif().get(0x0112, 1)) if "exif" in image.info else 1
    except Exception as err:  # A damaged header can raise nearly anything in Pillow's plugins.
        raise BadImage("decode_error", _header_problem(name, err)) from None
    _check_size(width, height, max_pixels)
    known = FORMATS.get(format_)
    decoder = "dali" if known is not None and mode in known.dali else "pillow"
    if name == "JPEG":
        kind = _jpeg_kind(data, width, height)
        if kind != "plain" or (mode == "RGB" and transform == 0):
            decoder = "pillow"
    return ImageInfo(format_, mode, width, height, decoder, orientation)


#: What the columns `width` and `height` can hold, and more than any decoder takes. A damaged header says more.
_LONGEST_SIDE = 2**31 - 1


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    if width < 1 or height < 1:
        raise BadImage("decode_error", f"the image has no pixels ({width} x {height})", width, height)
    if max(width, height) > _LONGEST_SIDE:
        raise BadImage("too_large", f"{width} x {height} pixels, more than can be (a side of {_LONGEST_SIDE:,})")
    if max_pixels is not None and width * height > max_pixels:
        raise BadImage("too_large", f"{width} x {height} pixels, more than the limit of {max_pixels:,}", width, height)


def _check_boxes(data: bytes, title: str) -> None:
    """Walk the boxes of an ISO container: decoders take a picture of many tiles for whole where some are missing."""
    position, size = 0, len(data)
    while position < size:
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        end = size if length == 0 else position + max(length, 8)
        if end > size:
            kind = data[position + 4 : position + 8].decode("latin-1")
            raise BadImage("decode_error", f"truncated {title}: box {kind!r} goes to byte {end:,} of {size:,}")
        position = end


def _reason(err: Exception) -> str:
    """Kind and message of an error, on one line."""
    return f"{type(err).__name__}: {' '.join(str(err).split())}"


def _header_problem(name: str, err: Exception) -> str:
    from PIL import UnidentifiedImageError

    title = FORMATS[name].title
    if isinstance(err, UnidentifiedImageError):  # Its message tells an address in memory and no reason.
        return f"{title} with a header that Pillow cannot read: damaged, or of a kind that it does not decode"
    return f"{title} with a damaged header: {_reason(err)}"


class _Quiet:
    """Keeps Pillow from warning of what it reads.

    Warning filters are the process's: with `warnings.catch_warnings` in several threads, one of them would bring back
    the filters under another's feet, and the last would leave its own behind.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._before.__exit__(None, None, None)


_quiet = _Quiet()
_limit_lock = threading.Lock()


def _open(data: bytes, name: str) -> Image:
    """Open an image without Pillow's own limit on its pixels: `max_pixels` takes its place, and can be set."""
    from PIL import Image as pillow

    with _limit_lock:
        limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
        try:
            return pillow.open(io.BytesIO(data), formats=[name])
        finally:
            pillow.MAX_IMAGE_PIXELS = limit


def _jpeg_kind(data: bytes, width: int, height: int) -> str:
    """Walk a JPEG's markers to its first scan; ``plain`` is what every decoder reads alike.

    Raises
    ------
    BadImage
        If the end-of-image marker is missing: what follows would be gray.
    """
    position, size = 2, len(data)
    kind = "plain"
    while position + 4 <= size:
        if data[position] != 0xFF:
            return "odd"
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            # Baseline, extended and progressive Huffman, 8 bits; and no components called R, G, B, which not every
            # decoder takes for what they are.
            plain = marker <= 0xC2 and data[position + 4] == 8 and data[position + 10 : position + 19 : 3] != b"RGB"
            kind = "plain" if plain else "odd"
        if marker == 0xDA:
            # In entropy-coded data 0xFF is followed by 0 or a restart marker, so this cannot be a chance match.
            if data.rfind(b"\xff\xd9", position) < 0:
                raise BadImage(
                    "decode_error", f"truncated JPEG: no end-of-image marker in {size:,} bytes", width, height
                )
            return kind
        if marker == 0xD9:
            raise BadImage("decode_error", "the JPEG has no image data", width, height)
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise BadImage("decode_error", f"truncated JPEG: it ends in its header, after {size:,} bytes", width, height)


# --- Pillow ---------------------------------------------------------------------------------------

#: An image that would grow to more pixels than this is not resized whole: Pillow computes the part that the crop shows.
#: Only slivers do (at 224, of sides of more than 1 to 334).
WHOLE_PIXELS = 1 << 24


#: Images with a shorter side go to Pillow: where DALI has few pixels to resize from, it differs by more than a level.
DALI_SIDE = 8


def _grows_too_far(width: int, height: int, g: Geometry) -> bool:
    return g.width * g.height > max(WHOLE_PIXELS, width * height)


def pil_pixels(data: bytes, preprocess: Preprocess, adjust_orientation: bool = False) -> torch.Tensor:
    """Decode and preprocess one image as open_clip's own transform does: by Pillow and torchvision.

    Returns
    -------
    torch.Tensor
        float32 (3, height, width), normalised.

    Raises
    ------
    BadImage
        If it cannot be decoded to its last row.
    """
    return _pil_decode(data, preprocess, adjust_orientation, views=False)[0]


def _pil_decode(
    data: bytes, preprocess: Preprocess, adjust_orientation: bool, views: bool
) -> tuple[torch.Tensor, View | None]:
    """Pixels for the model, and the small views of the whole image if they are wanted."""
    from PIL import ImageOps
    from torchvision.transforms import functional as tv

    name = _recognise(data)
    try:
        with _quiet, _open(data, name) as image:
            image.load()
            upright = ImageOps.exif_transpose(image) if adjust_orientation else image
            cut = _resize_and_cut(upright, preprocess)
            pixels = tv.normalize(tv.to_tensor(cut.convert("RGB")), preprocess.mean, preprocess.std)
            return pixels, view(upright) if views else None
    except Exception as err:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise BadImage("decode_error", _reason(err)) from None


def _resize_and_cut(image: Image, preprocess: Preprocess) -> Image:
    """Resize an image and cut or pad it; of one that grows too far, only the part that the cut shows is resized.

    The pixels of that part are those of the whole to a rounding error (one of 255 in some of them): Pillow holds the
    stretch of the source in single precision.
    """
    from open_clip.transform import center_crop_or_pad
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    g = preprocess.geometry(image.width, image.height)
    out_h, out_w = preprocess.size
    if _grows_too_far(image.width, image.height, g):
        x = _source_window(image.width, g.width, g.left, out_w)
        y = _source_window(image.height, g.height, g.top, out_h)
        resized = _resize_window(image, x, y, preprocess.interpolation, _height_first(image.width, image.height, g))
    else:
        resized = tv.resize(image, [g.height, g.width], InterpolationMode(preprocess.interpolation))
    return center_crop_or_pad(resized, preprocess.size, fill=preprocess.fill_color)


@dataclass(frozen=True)
class _Window:
    """One axis: pixels `begin` to `end` of the source, and the stretch of them that becomes `out` pixels."""

    begin: int
    end: int
    low: float
    high: float
    out: int


def _source_window(side: int, new: int, offset: int, out: int) -> _Window:
    """Find what of `side` pixels the window of `out` pixels at `offset` shows, when the side is resized to `new`."""
    scale = side / new
    first, out = max(0, offset), min(out, new)
    low, high = first * scale, min((first + out) * scale, side)
    # The filters reach two pixels to each side, of the coarser grid. The stretch is counted from the cut's begin: the
    # smaller its numbers, the finer single precision is.
    reach = math.ceil(2 * max(scale, 1)) + 1
    begin, end = max(0, math.floor(low) - reach), min(side, math.ceil(high) + reach)
    return _Window(begin, end, low - begin, high - begin, out)


def _resize_window(image: Image, x: _Window, y: _Window, interpolation: str, height_first: bool) -> Image:
    """Resize a part of an image as Pillow resizes the whole: alpha premultiplied, one side after the other."""
    from PIL.Image import Resampling

    filter_ = Resampling[interpolation.upper()]
    part = image.crop((x.begin, y.begin, x.end, y.end))
    if premultiplied := {"RGBA": "RGBa", "LA": "La"}.get(image.mode):
        part = part.convert(premultiplied)
    # In one call Pillow might choose another order for the part than for the whole.
    for across in (False, True) if height_first else (True, False):
        if across:
            part = part.resize((x.out, part.height), filter_, (x.low, 0, x.high, part.height))
        else:
            part = part.resize((part.width, y.out), filter_, (0, y.low, part.width, y.high))
    return part.convert(image.mode) if premultiplied else part


# --- DALI -----------------------------------------------------------------------------------------


def dali_problem() -> str | None:
    """Say why DALI cannot be used here; None where it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as err:
        return f'DALI is not installed ({err}): pip install "dask-imgcurator[cpu]" (or [cu12], [cu13])'
    return None


def _release_dali() -> None:
    """Have DALI give back what its memory pools keep for later."""
    backend: Any = importlib.import_module("nvidia.dali.backend")
    backend.ReleaseUnusedMemory()


#: Share of the JPEGs that a card's own JPEG engines decode; nvJPEG's kernels and the CPU's threads have the others.
HW_DECODER_LOAD = 0.9


def _build_pipeline(
    preprocess: Preprocess,
    device: str,
    device_id: int | None,
    batch_size: int,
    threads: int,
    upright: bool,
    views: bool,
) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    out_h, out_w = preprocess.size
    filter_ = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[preprocess.interpolation]
    pipe = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1, no_copy=True)
        between = fn.external_source(name="between", device="cpu", dtype=types.FLOAT, ndim=1)
        size = fn.external_source(name="size", device="cpu", dtype=types.FLOAT, ndim=1)
        anchor = fn.external_source(name="anchor", device="cpu", dtype=types.INT32, ndim=1)
        # These only concern "mixed". Fancy upsampling of the colours is what libjpeg (so Pillow, so open_clip) does.
        # The load goes to the JPEG engines of those cards that have them (A100, A30, H100 …); others do without.
        extra: dict[str, Any] = {"hw_decoder_load": HW_DECODER_LOAD, "jpeg_fancy_upsampling": True}
        extra = extra if device == "mixed" else {}
        image = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=upright, **extra)
        small = _dali_views(image) if views else ()
        # One side after the other, each rounded to 8 bits, as Pillow does it: where the first pass overshoots (the
        # edges of text), what is clipped there would come back to bite in the second.
        for target in (between, size):
            image = fn.resize(image, size=target, interp_type=filter_, antialias=True)
        image = fn.slice(
            image,
            anchor,
            [out_h, out_w],
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=float(preprocess.fill_color),
        )
        image = fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in preprocess.mean],
            std=[255 * s for s in preprocess.std],
        )
        pipe.set_outputs(image, *small)
    pipe.build()
    return pipe


def _dali_views(image: Any) -> tuple[Any, Any]:
    """Small views as `quality.view` makes them; bits of the hash near their threshold may fall to the other side."""
    from nvidia.dali import fn, types

    small = fn.resize(image, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
    gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    gray = fn.resize(gray, size=[HASH_SIDE, HASH_SIDE], interp_type=types.INTERP_LANCZOS3, antialias=True)
    return fn.transpose(small, perm=[2, 0, 1]), fn.squeeze(gray, axes=[2])


def _between(width: int, height: int, g: Geometry) -> tuple[int, int]:
    """Height and width of an image between the two passes of Pillow's resize."""
    return (g.height, width) if _height_first(width, height, g) else (height, g.width)


def _height_first(width: int, height: int, g: Geometry) -> bool:
    """Whether Pillow resizes the height first: from version 13 on, where that shrinks the image by far more."""
    return _pillow_chooses() and height > g.height and height - g.height > 2 * (width - g.width)


@functools.cache
def _pillow_chooses() -> bool:
    import PIL

    return int(PIL.__version__.partition(".")[0]) >= 13


@dataclass
class Batch:
    """Decoded images, in the order of their bytes.

    Attributes
    ----------
    pixels : torch.Tensor
        float32 (n, 3, height, width) on the backend's device, normalised; zero where an image failed.
    infos : list of ImageInfo or BadImage
        One for each image.
    small, gray : torch.Tensor or None
        Small views of the whole images (see `dask_imgcurator.images.quality`): uint8 (n, 3, SIDE, SIDE) and
        (n, HASH_SIDE, HASH_SIDE) on the same device, where the decoder was asked for them.
    """

    pixels: torch.Tensor
    infos: list[ImageInfo | BadImage]
    small: torch.Tensor | None = None
    gray: torch.Tensor | None = None

    @property
    def good(self) -> list[int]:
        """Positions of the images that were decoded."""
        return [i for i, info in enumerate(self.infos) if isinstance(info, ImageInfo)]


class Decoder:
    """Decodes batches for one model on one device.

    Parameters
    ----------
    preprocess : Preprocess
        The model's preprocessing.
    batch_size : int
        Largest batch.
    device : str
        torch device of the result.
    dali_device : {"cpu", "mixed"} or None
        DALI's device for decoding; None: Pillow decodes everything.
    threads : int
        Threads that decode.
    max_pixels : int, optional
        See `inspect`.
    adjust_orientation : bool
        Whether EXIF orientation is applied.
    views : bool
        Whether batches have small views of the whole images, for `dask_imgcurator.images.quality`.

    Notes
    -----
    Not safe for use by several threads at once.

    On a card DALI works on streams of its own, beside the encoder, and the thread that calls waits for these alone. The
    copy out of DALI's memory is queued on the default stream, behind the encoder's batch, and nobody waits for it: the
    pixels may be used at once, on that stream. DALI gets its memory back at the next batch, after waiting for that
    copy, since it does not know of the default stream; this also keeps decoders from running far ahead of the encoder.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        batch_size: int,
        device: str = "cpu",
        dali_device: str | None = "cpu",
        threads: int = 1,
        max_pixels: int | None = None,
        adjust_orientation: bool = False,
        views: bool = False,
    ) -> None:
        self.views = views
        self.preprocess, self.batch_size, self.device = preprocess, batch_size, device
        self.dali_device, self.threads = dali_device, threads
        self.max_pixels, self.adjust_orientation = max_pixels, adjust_orientation
        self._pipe: Any = None
        self._pool: ThreadPoolExecutor | None = None
        self._largest = batch_size
        self._held: Any = None

    def __call__(self, blobs: Sequence[bytes | BadImage]) -> Batch:
        """Decode a batch.

        Parameters
        ----------
        blobs : sequence of bytes or BadImage
            Files; a `BadImage` (something that could not even be read) keeps its place.
        """
        import torch

        batch = Batch(self._zeros(len(blobs), 3, *self.preprocess.size), [self._inspect(blob) for blob in blobs])
        if self.views:
            batch.small = self._zeros(len(blobs), 3, SIDE, SIDE, dtype=torch.uint8)
            batch.gray = self._zeros(len(blobs), HASH_SIDE, HASH_SIDE, dtype=torch.uint8)
        by_dali: list[int] = []
        by_pillow: list[int] = []
        for i, info in enumerate(batch.infos):
            if isinstance(info, ImageInfo):
                (by_dali if info.decoder == "dali" else by_pillow).append(i)
        self._run_pillow(blobs, by_pillow, batch)
        if by_dali:
            self._halve(blobs, by_dali, batch)
        return batch

    def _zeros(self, *shape: int, dtype: Any = None) -> torch.Tensor:
        import torch

        return torch.zeros(shape, dtype=dtype or torch.float32, device=self.device)

    def _halve(self, blobs: Sequence[Any], rows: list[int], batch: Batch) -> None:
        """Decode by DALI, and by Pillow the images that DALI refuses one by one."""
        if len(rows) <= self._largest and self._run_dali(blobs, rows, batch):
            return
        if len(rows) > 1:
            middle = len(rows) // 2
            self._halve(blobs, rows[:middle], batch)
            self._halve(blobs, rows[middle:], batch)
            return
        info = batch.infos[rows[0]]
        assert isinstance(info, ImageInfo)
        batch.infos[rows[0]] = replace(info, decoder="pillow")
        self._run_pillow(blobs, rows, batch)

    def _inspect(self, blob: bytes | BadImage) -> ImageInfo | BadImage:
        if isinstance(blob, BadImage):
            return blob
        try:
            info = inspect(blob, self.max_pixels)
        except BadImage as bad:
            return bad
        # 1 x 65,500 pixels are few, but not when the shorter side is brought to 224.
        too_far = _grows_too_far(info.width, info.height, self._geometry(info))
        too_small = min(info.width, info.height) < DALI_SIDE
        return replace(info, decoder="pillow") if too_far or too_small or self.dali_device is None else info

    def _upright(self, info: ImageInfo) -> tuple[int, int]:
        turned = self.adjust_orientation and info.orientation in (5, 6, 7, 8)
        return (info.height, info.width) if turned else (info.width, info.height)

    def _geometry(self, info: ImageInfo) -> Geometry:
        return self.preprocess.geometry(*self._upright(info))

    def _run_pillow(self, blobs: Sequence[Any], rows: list[int], batch: Batch) -> None:
        import torch

        infos = batch.infos

        def decode(i: int) -> tuple[torch.Tensor, View | None] | BadImage:
            try:
                return _pil_decode(blobs[i], self.preprocess, self.adjust_orientation, self.views)
            except BadImage as bad:
                return bad

        decoded: dict[int, tuple[torch.Tensor, View | None]] = {}
        for i, result in zip(rows, self._side_by_side(decode, rows), strict=True):
            if isinstance(result, BadImage):
                info = infos[i]
                assert isinstance(info, ImageInfo)
                result.width, result.height = info.width, info.height
                infos[i] = result
            else:
                decoded[i] = result
        if not decoded:
            return
        places = self._places(list(decoded))
        batch.pixels[places] = to_device(torch.stack([pixels for pixels, _ in decoded.values()]), self.device)
        views = [view for _, view in decoded.values() if view is not None]
        if batch.small is not None and batch.gray is not None:
            batch.small[places] = to_device(torch.from_numpy(np.stack([v.small for v in views])), self.device)
            batch.gray[places] = to_device(torch.from_numpy(np.stack([v.gray for v in views])), self.device)

    def _side_by_side(self, function: Callable[[int], T], rows: list[int]) -> Iterator[T]:
        """Apply a function in threads: Pillow and torchvision let go of the interpreter while they compute."""
        if self.threads == 1 or len(rows) < 2:
            return map(function, rows)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pillow")
        return self._pool.map(function, rows)

    def _places(self, rows: list[int]) -> Any:
        """Index of some images of a batch that nobody waits for: a list would be copied to a card with a wait."""
        import torch

        if rows == list(range(rows[0], rows[-1] + 1)):
            return slice(rows[0], rows[-1] + 1)
        return to_device(torch.tensor(rows), self.device)

    def _run_dali(self, blobs: Sequence[Any], rows: list[int], batch: Batch) -> bool:
        """Decode some images of a batch by DALI; False if it refused one of them."""
        import torch

        if self._pipe is None:
            device_id = None if self.dali_device == "cpu" else torch.cuda.current_device()
            self._pipe = _build_pipeline(
                self.preprocess,
                str(self.dali_device),
                device_id,
                self.batch_size,
                self.threads,
                self.adjust_orientation,
                self.views,
            )
        between, sizes, anchors = [], [], []
        for i in rows:
            info = batch.infos[i]
            assert isinstance(info, ImageInfo)
            g = self._geometry(info)
            between.append(np.array(_between(*self._upright(info), g), np.float32))
            sizes.append(np.array([g.height, g.width], np.float32))
            anchors.append(np.array([g.top, g.left], np.int32))
        encoded = [np.frombuffer(blobs[i], np.uint8) for i in rows]
        try:
            self._pipe.feed_input("encoded", encoded)
            self._pipe.feed_input("between", between)
            self._pipe.feed_input("size", sizes)
            self._pipe.feed_input("anchor", anchors)
            if self._held is not None:
                self._held[0].synchronize()
            # Returns when the images are there.
            outputs = self._pipe.run()
            places = self._places(rows)
            for target, output in zip((batch.pixels, batch.small, batch.gray), outputs, strict=False):
                assert target is not None
                # A view of DALI's memory. The copy is the batch's own, and brings images that Pillow decoded beside it.
                target[places] = torch.utils.dlpack.from_dlpack(output.as_tensor())
            if self.dali_device != "cpu":
                copied = torch.cuda.Event()
                copied.record()
                self._held = copied, outputs
        except RuntimeError as err:
            # The pipeline cannot be used again after an error.
            self._pipe = self._held = None
            if is_out_of_memory(err):
                self._largest = max(1, len(rows) // 2)
                _release_dali()
            return False
        return True
