"""Bytes to pixels: open_clip's own preprocessing by DALI or Pillow, bad images set aside.

DALI fails a whole batch for one bad image and may take the process with it, so every image is looked at first: its
container is read by Pillow (which decodes nothing then) and, for JPEG, its markers are walked to the end. `DECODERS`
says who decodes what. A batch that DALI refuses all the same is decoded again by Pillow, image by image.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = [
    "DECODERS",
    "BadImage",
    "Batch",
    "Decoder",
    "Geometry",
    "ImageInfo",
    "Preprocess",
    "dali_problem",
    "inspect",
    "pil_pixels",
]


#: Who decodes what, by container and Pillow mode. Everything that is not listed goes to Pillow: open_clip resizes an
#: image in its own mode and converts it to RGB after that (a palette by nearest neighbour, alpha premultiplied),
#: which only Pillow
#: repeats exactly.
DECODERS = {("JPEG", "RGB"): "dali", ("JPEG", "L"): "dali"}


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
    """Look at an image's container, without decoding it.

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
    from PIL import UnidentifiedImageError

    if not data:
        raise BadImage("decode_error", "the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(data) as image:
                width, height = image.size
                format_, mode = image.format or "?", image.mode
                transform = image.info.get("adobe_transform")
                # The tag is in the header already; reading it costs nothing for files without EXIF.
                orientation = int(image.getexif().get(0x0112, 1)) if "exif" in image.info else 1
    except UnidentifiedImageError:
        raise BadImage("decode_error", f"no image format that Pillow knows (starts with {data[:8].hex(' ')})") from None
    except Exception as err:  # A damaged header can raise nearly anything in Pillow's plugins.
        raise BadImage("decode_error", f"damaged header: {type(err).__name__}: {err}") from None
    if width < 1 or height < 1:
        raise BadImage("decode_error", f"the image has no pixels ({width} x {height})", width, height)
    if max_pixels is not None and width * height > max_pixels:
        raise BadImage("too_large", f"{width} x {height} pixels, more than the limit of {max_pixels:,}", width, height)
    decoder = DECODERS.get((format_, mode), "pillow")
    if format_ == "JPEG":
        kind = _jpeg_kind(data, width, height)
        if kind != "plain" or (mode == "RGB" and transform == 0):
            decoder = "pillow"
    return ImageInfo(format_, mode, width, height, decoder, orientation)


_limit_lock = threading.Lock()


def _open(data: bytes) -> Image:
    """Open an image without Pillow's own limit on its pixels: `max_pixels` takes its place, and can be set."""
    from PIL import Image as pillow

    with _limit_lock:
        limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
        try:
            return pillow.open(io.BytesIO(data))
        finally:
            pillow.MAX_IMAGE_PIXELS = limit


def _jpeg_kind(data: bytes, width: int, height: int) -> str:
    """Walk a JPEG's markers to its first scan; ``plain`` is what every decoder reads.

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
            # Baseline, extended and progressive Huffman, 8 bits.
            kind = "plain" if marker <= 0xC2 and data[position + 4] == 8 else "odd"
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
    from open_clip.transform import center_crop_or_pad
    from PIL import ImageOps
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(data) as image:
                image.load()
                upright = ImageOps.exif_transpose(image) if adjust_orientation else image
                g = preprocess.geometry(upright.width, upright.height)
                resized = tv.resize(upright, [g.height, g.width], InterpolationMode(preprocess.interpolation))
                cut = center_crop_or_pad(resized, preprocess.size, fill=preprocess.fill_color)
                return tv.normalize(tv.to_tensor(cut.convert("RGB")), preprocess.mean, preprocess.std)
    except Exception as err:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise BadImage("decode_error", f"{type(err).__name__}: {err}") from None


# --- DALI -----------------------------------------------------------------------------------------


def dali_problem() -> str | None:
    """Say why DALI cannot be used here; None where it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as err:
        return f'DALI is not installed ({err}): pip install "dask-imgcurator[cpu]" (or [cu12], [cu13])'
    return None


def _build_pipeline(
    preprocess: Preprocess, device: str, device_id: int | None, batch_size: int, threads: int, upright: bool
) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    out_h, out_w = preprocess.size
    filter_ = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[preprocess.interpolation]
    pipe = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1, no_copy=True)
        size = fn.external_source(name="size", device="cpu", dtype=types.FLOAT, ndim=1)
        anchor = fn.external_source(name="anchor", device="cpu", dtype=types.INT32, ndim=1)
        # The hardware decoder share and nvJPEG's fancy upsampling only concern "mixed"; fancy upsampling is
        # what libjpeg
        # (so Pillow, so open_clip) does.
        extra: dict[str, Any] = {"hw_decoder_load": 0.9, "jpeg_fancy_upsampling": True} if device == "mixed" else {}
        image = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=upright, **extra)
        image = fn.resize(image, size=size, interp_type=filter_, antialias=True)
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
        pipe.set_outputs(image)
    pipe.build()
    return pipe


@dataclass
class Batch:
    """Decoded images, in the order of their bytes.

    Attributes
    ----------
    pixels : torch.Tensor
        float32 (n, 3, height, width) on the backend's device, normalised; zero where an image failed.
    infos : list of ImageInfo or BadImage
        One for each image.
    """

    pixels: torch.Tensor
    infos: list[ImageInfo | BadImage]

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
        Threads of DALI's pipeline.
    max_pixels : int, optional
        See `inspect`.
    adjust_orientation : bool
        Whether EXIF orientation is applied.

    Notes
    -----
    Not safe for use by several threads at once.
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
    ) -> None:
        self.preprocess, self.batch_size, self.device = preprocess, batch_size, device
        self.dali_device, self.threads = dali_device, threads
        self.max_pixels, self.adjust_orientation = max_pixels, adjust_orientation
        self._pipe: Any = None

    def __call__(self, blobs: Sequence[bytes | BadImage]) -> Batch:
        """Decode a batch.

        Parameters
        ----------
        blobs : sequence of bytes or BadImage
            Files; a `BadImage` (something that could not even be read) keeps its place.
        """
        import torch

        infos = [self._inspect(blob) for blob in blobs]
        height, width = self.preprocess.size
        pixels = torch.zeros((len(blobs), 3, height, width), dtype=torch.float32, device=self.device)
        by_dali: list[int] = []
        by_pillow: list[int] = []
        for i, info in enumerate(infos):
            if isinstance(info, ImageInfo):
                dali = info.decoder == "dali" and self.dali_device is not None
                (by_dali if dali else by_pillow).append(i)
        self._run_pillow(blobs, infos, by_pillow, pixels)
        if by_dali and not self._run_dali(blobs, infos, by_dali, pixels):
            self._run_pillow(blobs, infos, by_dali, pixels)
            # Pillow has told who is bad. DALI again for the others: their pixels must not depend on a bad neighbour.
            # (Where it refuses once more, Pillow's pixels stay.)
            rest = [i for i in by_dali if isinstance(infos[i], ImageInfo)]
            if 0 < len(rest) < len(by_dali):
                self._run_dali(blobs, infos, rest, pixels)
        return Batch(pixels, infos)

    def _inspect(self, blob: bytes | BadImage) -> ImageInfo | BadImage:
        if isinstance(blob, BadImage):
            return blob
        try:
            info = inspect(blob, self.max_pixels)
        except BadImage as bad:
            return bad
        # 1 x 65,535 pixels are few, but not when the shorter side is brought to 224.
        g = self.preprocess.geometry(info.width, info.height)
        if self.max_pixels is not None and g.width * g.height > self.max_pixels:
            message = (
                f"{info.width} x {info.height} pixels become {g.width} x {g.height} for this model, "
                f"more than the limit of {self.max_pixels:,}"
            )
            return BadImage("too_large", message, info.width, info.height)
        return info

    def _run_pillow(
        self, blobs: Sequence[Any], infos: list[ImageInfo | BadImage], rows: list[int], pixels: torch.Tensor
    ) -> None:
        for i in rows:
            info = infos[i]
            try:
                pixels[i] = pil_pixels(blobs[i], self.preprocess, self.adjust_orientation).to(self.device)
            except BadImage as bad:
                assert isinstance(info, ImageInfo)
                bad.width, bad.height = info.width, info.height
                infos[i] = bad

    def _run_dali(
        self, blobs: Sequence[Any], infos: list[ImageInfo | BadImage], rows: list[int], pixels: torch.Tensor
    ) -> bool:
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
            )
        sizes, anchors = [], []
        for i in rows:
            info = infos[i]
            assert isinstance(info, ImageInfo)
            turned = self.adjust_orientation and info.orientation in (5, 6, 7, 8)
            g = self.preprocess.geometry(*((info.height, info.width) if turned else (info.width, info.height)))
            sizes.append(np.array([g.height, g.width], np.float32))
            anchors.append(np.array([g.top, g.left], np.int32))
        encoded = [np.frombuffer(blobs[i], np.uint8) for i in rows]
        try:
            self._pipe.feed_input("encoded", encoded)
            self._pipe.feed_input("size", sizes)
            self._pipe.feed_input("anchor", anchors)
            (output,) = self._pipe.run()
            # DALI owns the memory until the next run: this copies out of it.
            decoded = torch.utils.dlpack.from_dlpack(output.as_tensor())
            pixels[torch.as_tensor(rows, device=self.device)] = decoded
            if self.device != "cpu":
                torch.cuda.current_stream().synchronize()
        except RuntimeError:
            # The pipeline cannot be used again after an error.
            self._pipe = None
            return False
        return True
