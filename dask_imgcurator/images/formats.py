"""The supported image formats, and what a file's bytes reveal before anything opens it.

A format is one entry of `FORMATS`.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class BadImage(Exception):
    """An unusable image: its `status` for that column, and its size if the header gives it."""

    def __init__(self, status: str, message: str, width: int | None = None, height: int | None = None) -> None:
        super().__init__(message)
        self.status, self.width, self.height = status, width, height

    def __reduce__(self) -> tuple[Any, ...]:
        return BadImage, (self.status, str(self), self.width, self.height)


# --- sizes, for decoders that allocate, decode or refuse as soon as they open a file ------------------


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
    """Size in the header of a JPEG XL codestream."""
    if data[:2] != b"\xff\x0a":
        # A container holds the codestream in a box jxlc, or in parts, each after its number, in boxes jxlp.
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


# --- ends, for decoders that accept truncated files -----------------------------------------------------


def _check_boxes(data: bytes, title: str) -> None:
    """Walk the boxes of an ISO container: libheif does not notice that tiles are missing."""
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


def _check_codestream(data: bytes, title: str) -> None:
    """Look for the end of a JPEG 2000 codestream after its first tile: 0xFF90 and above are markers, never data."""
    if data.rfind(b"\xff\xd9") <= data.find(b"\xff\x90"):
        raise BadImage("decode_error", f"truncated {title}: no end-of-codestream marker in {len(data):,} bytes")


def _jpeg_is_plain(data: bytes) -> bool:
    """Walk a JPEG's markers to its first scan: do all decoders read it alike? `BadImage` if its end is missing.

    Bytes missing before an end marker go unnoticed: nothing proves their absence, libjpeg only warns, and both Pillow
    and DALI fill the rest with gray.
    """
    position, size, plain = 2, len(data), True
    while position + 4 <= size:
        if data[position] != 0xFF:
            return False
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            # Baseline, extended and progressive Huffman, 8 bits; and no components named R, G, B, which not every
            # decoder understands.
            plain = marker <= 0xC2 and data[position + 4] == 8 and data[position + 10 : position + 19 : 3] != b"RGB"
        if marker == 0xDA:
            # In entropy-coded data 0xFF is followed by 0 or a restart marker, so this cannot be a chance match.
            if data.rfind(b"\xff\xd9", position) < 0:
                raise BadImage("decode_error", f"truncated JPEG: no end-of-image marker in {size:,} bytes")
            return plain
        if marker == 0xD9:
            raise BadImage("decode_error", "the JPEG has no image data")
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise BadImage("decode_error", f"truncated JPEG: it ends in its header, after {size:,} bytes")


# --- the registry -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """One kind of image file: how to detect it, and what decodes it."""

    title: str
    #: Regular expression for its first bytes; names and extensions are never used.
    begin: bytes
    #: Pillow modes that DALI decodes, of files that are `plain`; Pillow decodes all others.
    dali: frozenset[str] = frozenset()
    plain: Callable[[bytes], bool] = lambda _data: True
    #: Feature with which Pillow must have been built (`PIL.features`).
    feature: str | None = None
    #: Module that adds the format to Pillow, the function to call if importing it is not enough, and its package.
    plugin: str | None = None
    register: str | None = None
    package: str | None = None
    #: Width and height from the bytes, to check `max_pixels` before the file is opened.
    size: Callable[[bytes], tuple[int, int] | None] = lambda _data: None
    #: Raises `BadImage` if the end of the file is missing, for its bytes and title.
    check_end: Callable[[bytes, str], None] = lambda _data, _title: None


#: The supported formats by Pillow's names; the first one whose beginning matches is used.
#:
#: DALI gets the images that it reproduces up to rounding: gray and YCbCr JPEGs. All others go to Pillow: open_clip
#: resizes an image in its own mode and converts it to RGB afterwards (a palette by nearest neighbour, alpha
#: premultiplied, 16 bits clipped), which only Pillow reproduces exactly.
#:
#: Pillow supports many more formats, which are left out on purpose: some have no signature and mistake random bytes for
#: an image (TGA), some run another program (EPS: Ghostscript), some decode before their size is known (ICO).
FORMATS: Mapping[str, Format] = {
    "JPEG": Format("JPEG", rb"\xff\xd8\xff", dali=frozenset({"RGB", "L"}), plain=_jpeg_is_plain),
    # Several JPEGs in one file, the first of which is the picture; Pillow detects this when it opens the JPEG.
    "MPO": Format("MPO", rb"\xff\xd8\xff"),
    "PNG": Format("PNG", rb"\x89PNG\r\n\x1a\n"),
    "WEBP": Format("WebP", rb"RIFF.{4}WEBP", feature="webp", size=_webp_size),
    "GIF": Format("GIF", rb"GIF8[79]a"),
    "BMP": Format("BMP", rb"BM"),
    "TIFF": Format("TIFF", rb"II[*+]\0|MM\0[*+]"),
    # Its brand may only be among the compatible ones, after a general one (mif1).
    "AVIF": Format("AVIF", rb".{4}ftyp(?:.{4}){0,16}?avi[fs]", feature="avif", size=_heif_size, check_end=_check_boxes),
    "HEIF": Format(
        "HEIC",
        rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|m[is]f1)",
        plugin="pillow_heif",
        register="register_heif_opener",
        package="pillow-heif",
        size=_heif_size,
        check_end=_check_boxes,
    ),
    "JXL": Format(
        "JPEG XL",
        rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
        plugin="pillow_jxl",
        package="pillow-jxl-plugin",
        size=_jxl_size,
    ),
    "JPEG2000": Format(
        "JPEG 2000", rb"\xffO\xffQ|\0\0\0\x0cjP  \r\n\x87\n", feature="jpg_2000", check_end=_check_codestream
    ),
    # Not the plain-text variants: there is no way to tell whether their last digit is missing.
    "PPM": Format("PNM", rb"P[4-6f]\s"),
}


def format_table() -> list[tuple[str, str, str]]:
    """`FORMATS` for the documentation: title, decoder, and the package it needs besides Pillow."""
    rows = []
    for format_ in FORMATS.values():
        modes = ", ".join(sorted(format_.dali, reverse=True))
        rows.append((format_.title, f"DALI ({modes}), else Pillow" if modes else "Pillow", format_.package or ""))
    return rows


def format_of(data: bytes) -> str | None:
    """Return a file's format (a key of `FORMATS`) by its first bytes; None for anything else."""
    return next((name for name, format_ in FORMATS.items() if re.match(format_.begin, data, re.DOTALL)), None)


def recognise(data: bytes) -> str:
    """Return a file's format (a key of `FORMATS`), ready for Pillow to open."""
    if not data:
        raise BadImage("decode_error", "the file is empty (0 bytes)")
    name = format_of(data)
    if name is None:
        known = ", ".join(format_.title for format_ in FORMATS.values())
        raise BadImage("decode_error", f"unsupported image format (starts with {data[:8].hex(' ')}; known: {known})")
    if (problem := _problem(name)) is not None:
        raise BadImage("decode_error", problem)
    return name


@functools.cache
def _problem(name: str) -> str | None:
    """Load a format's plugin, once per process; say what is missing."""
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
