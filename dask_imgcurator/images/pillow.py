"""Headers and pixels by Pillow; the pixels are those of open_clip's own transform, bit for bit."""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import quality
from .formats import FORMATS, BadImage, recognise
from .preprocess import Preprocess

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class _Quiet:
    """Silences only Pillow's warnings about files that it reads, since other threads may give warnings too.

    Warning filters belong to the process: with `warnings.catch_warnings` in several threads, one would restore the
    filters while another still needs them changed, and the last one could restore the wrong ones.
    """

    _modules = "|".join(["PIL", "torchvision", __package__, *(f.plugin for f in FORMATS.values() if f.plugin)])

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.filterwarnings("ignore", module=self._modules)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._before.__exit__(None, None, None)


#: Context in which Pillow's warnings are silent.
quiet = _Quiet()
_limit_lock = threading.Lock()


@contextlib.contextmanager
def open_image(data: bytes) -> Iterator[Image]:
    """Open a file without Pillow's own limit on pixels, which `max_pixels` replaces."""
    from PIL import Image as pillow

    name = recognise(data)
    with quiet:
        with _limit_lock:
            limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
            try:
                image = pillow.open(io.BytesIO(data), formats=[name])
            finally:
                pillow.MAX_IMAGE_PIXELS = limit
        with image:
            yield image


# --- headers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageInfo:
    """What an image's header says, and which decoder takes it."""

    format: str
    mode: str
    width: int
    height: int
    decoder: Literal["dali", "pillow"]
    orientation: int = 1


def inspect(data: bytes, max_pixels: int | None = None) -> ImageInfo:
    """Read a file's header; raise `BadImage` if it is not an image, is too large, or ends early.

    Nothing is decoded, except by JPEG XL's plugin, which has no other way.
    """
    name = recognise(data)
    format_ = FORMATS[name]
    if (size := format_.size(data)) is not None:
        _check_size(*size, max_pixels)
    format_.check_end(data, format_.title)
    try:
        with open_image(data) as image:
            width, height = image.size
            found, mode = image.format or name, image.mode
            transform = image.info.get("adobe_transform")
            # Checking every file would cost time; only those with EXIF data have the tag.
            orientation = int(image.getexif().get(0x0112, 1)) if "exif" in image.info else 1
    except Exception as err:  # a damaged header can raise nearly anything in Pillow's plugins
        raise BadImage("decode_error", _header_problem(name, err)) from None
    _check_size(width, height, max_pixels)
    try:
        plain = format_.plain(data)
    except BadImage as bad:
        bad.width, bad.height = width, height
        raise
    # Transform 0 in an Adobe marker says that three components are RGB; DALI would take them for YCbCr.
    by_dali = found == name and mode in format_.dali and plain and not (mode == "RGB" and transform == 0)
    return ImageInfo(found, mode, width, height, "dali" if by_dali else "pillow", orientation)


#: The limit of the columns `width` and `height`, beyond what any decoder accepts. Damaged headers can exceed it.
_LONGEST_SIDE = 2**31 - 1


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    if width < 1 or height < 1:
        raise BadImage("decode_error", f"the image has no pixels ({width} x {height})", width, height)
    if max(width, height) > _LONGEST_SIDE:
        raise BadImage("too_large", f"{width} x {height} pixels, more than supported (a side of {_LONGEST_SIDE:,})")
    if max_pixels is not None and width * height > max_pixels:
        raise BadImage("too_large", f"{width} x {height} pixels, more than the limit of {max_pixels:,}", width, height)


def _reason(err: Exception) -> str:
    """Kind and message of an error, on one line."""
    return f"{type(err).__name__}: {' '.join(str(err).split())}"


def _header_problem(name: str, err: Exception) -> str:
    from PIL import UnidentifiedImageError

    title = FORMATS[name].title
    if isinstance(err, UnidentifiedImageError):  # its message gives an address in memory and no reason
        return f"{title} with a header that Pillow cannot read: damaged, or of an unsupported kind"
    return f"{title} with a damaged header: {_reason(err)}"


# --- pixels -----------------------------------------------------------------------------------------


def decode(
    data: bytes,
    preprocess: Preprocess,
    adjust_orientation: bool = False,
    scale_high_bit_depth: bool = False,
    views: bool = False,
) -> list[torch.Tensor]:
    """Decode an image to its last row, or raise `BadImage`.

    Returns the model's normalised pixels, float32 (3, height, width), and `quality.views` if wanted.
    """
    from PIL import ImageOps
    from torchvision.transforms import functional as tv

    try:
        with open_image(data) as image:
            image.load()
            upright = ImageOps.exif_transpose(image) if adjust_orientation else image
            if scale_high_bit_depth and is_deep(upright.mode):
                upright = to_8_bits(upright)
            cut = resize_and_cut(upright, preprocess)
            pixels = tv.normalize(tv.to_tensor(cut.convert("RGB")), preprocess.mean, preprocess.std)
            return [pixels, *(quality.views(upright) if views else ())]
    except BadImage:
        raise
    except Exception as err:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise BadImage("decode_error", _reason(err)) from None


def is_deep(mode: str) -> bool:
    """Whether samples have more than 8 bits in a mode of Pillow, which clips them at 255 when it makes RGB of them."""
    return mode.startswith("I") or mode == "F"


def to_8_bits(image: Image) -> Image:
    """Stretch the samples of a deep image linearly: the smallest becomes black, the largest white."""
    from PIL import Image as pillow

    samples: Any = np.array(image, np.float64 if image.mode == "I" else np.float32)
    finite = samples[np.isfinite(samples)] if image.mode == "F" else samples
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low == high:
        return image
    np.nan_to_num(samples, copy=False, nan=low, posinf=high, neginf=low)
    samples -= low
    samples *= 255 / (high - low)
    return pillow.fromarray(np.rint(samples, out=samples).astype(np.uint8))


def resize_and_cut(image: Image, preprocess: Preprocess) -> Image:
    """Resize an image, then crop or pad it; if it would grow too large, resize only the part that the crop shows.

    That part's pixels equal those of the whole up to rounding (1 of 255 in some), because Pillow holds the bounds of
    the source in single precision.
    """
    from open_clip.transform import center_crop_or_pad
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    g = preprocess.geometry(image.width, image.height)
    if g.grows_too_far(image.width, image.height):
        out_h, out_w = preprocess.size
        x = _Window.of(image.width, g.width, g.left, out_w)
        y = _Window.of(image.height, g.height, g.top, out_h)
        height_first = g.height_first(image.width, image.height)
        resized = _resize_window(image, x, y, preprocess.interpolation, height_first)
    else:
        resized = tv.resize(image, [g.height, g.width], InterpolationMode(preprocess.interpolation))
    return center_crop_or_pad(resized, preprocess.size, fill=preprocess.fill_color)


@dataclass(frozen=True)
class _Window:
    """One axis: pixels `begin` to `end` of the source, and the stretch of it that becomes `out` pixels."""

    begin: int
    end: int
    low: float
    high: float
    out: int

    @classmethod
    def of(cls, side: int, new: int, offset: int, out: int) -> _Window:
        """The source of `out` pixels at `offset` when `side` pixels are resized to `new`."""
        scale = side / new
        first, out = max(0, offset), min(out, new)
        low, high = first * scale, min((first + out) * scale, side)
        # Filters reach two pixels of the coarser grid to each side. Bounds are relative to the start of the part:
        # single precision is finer for small numbers.
        reach = math.ceil(2 * max(scale, 1)) + 1
        begin, end = max(0, math.floor(low) - reach), min(side, math.ceil(high) + reach)
        return cls(begin, end, low - begin, high - begin, out)


def _resize_window(image: Image, x: _Window, y: _Window, interpolation: str, height_first: bool) -> Image:
    """Resize a part of an image as Pillow resizes the whole: alpha premultiplied, one side after the other."""
    from PIL.Image import Resampling

    filter_ = Resampling[interpolation.upper()]
    part = image.crop((x.begin, y.begin, x.end, y.end))
    if premultiplied := {"RGBA": "RGBa", "LA": "La"}.get(image.mode):
        part = part.convert(premultiplied)
    # In one call, Pillow might choose a different order for the part than for the whole.
    for across in (False, True) if height_first else (True, False):
        if across:
            part = part.resize((x.out, part.height), filter_, (x.low, 0, x.high, part.height))
        else:
            part = part.resize((part.width, y.out), filter_, (0, y.low, part.width, y.high))
    return part.convert(image.mode) if premultiplied else part
