"""The geometry of open_clip's own transform: the size to which an image is resized, and the crop."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: An image that would grow to more pixels than this is not resized whole: Pillow computes only the part that the crop
#: shows. This affects slivers (at size 224, those thinner than 1 to 334).
WHOLE_PIXELS = 1 << 24


@dataclass(frozen=True)
class Geometry:
    """What happens to one image: resized to `width` x `height`, then cropped (or padded) at `top`, `left`."""

    width: int
    height: int
    top: int
    left: int

    def height_first(self, width: int, height: int) -> bool:
        """Whether Pillow resizes the height first: from version 13 on, if that shrinks the image far more."""
        return _pillow_chooses() and height > self.height and height - self.height > 2 * (width - self.width)

    def between(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of an image of this size between the two passes of Pillow's resize."""
        return (self.height, width) if self.height_first(width, height) else (height, self.width)

    def grows_too_far(self, width: int, height: int) -> bool:
        """Whether an image of this size is too large to be resized whole."""
        return self.width * self.height > max(WHOLE_PIXELS, width * height)


@functools.cache
def _pillow_chooses() -> bool:
    import PIL

    return int(PIL.__version__.partition(".")[0]) >= 13


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
        Which side is resized to `size`: the shorter (then cropped), the longer (then padded), or both.
    fill_color : int
        Value of the padding, 0 to 255.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """Read the result of `open_clip.get_model_preprocess_cfg`."""
        size, mode = cfg["size"], cfg["resize_mode"]
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
        if mode not in ("shortest", "longest", "squash"):
            raise ValueError(
                f"unknown resize mode {mode!r} in the model's preprocessing: expected shortest, longest or squash"
            )
        bilinear = cfg["interpolation"] == "bilinear"
        if mode == "shortest" and height != width:
            bilinear = False  # open_clip does not pass its interpolation on in this one case
        return cls(
            (height, width),
            _per_channel(cfg["mean"]),
            _per_channel(cfg["std"]),
            "bilinear" if bilinear else "bicubic",
            mode,
            int(cfg["fill_color"]),
        )

    def geometry(self, width: int, height: int) -> Geometry:
        """Return open_clip's exact geometry for an image of this size.

        Rounding follows `torchvision.transforms.Resize`, `CenterCrop` and `open_clip.transform.ResizeKeepRatio`,
        `CenterCropOrPad`: the long side is truncated, offsets are rounded half to even.
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
            # open_clip itself fails if a side rounds to 0 (1 x 2000 pixels); keep one pixel here.
            new_w, new_h = max(1, round(width / ratio)), max(1, round(height / ratio))
        return Geometry(new_w, new_h, _offset(new_h, out_h), _offset(new_w, out_w))


def _per_channel(values: Any) -> tuple[float, float, float]:
    r, g, b = values if isinstance(values, (tuple, list)) else (values,) * 3
    return float(r), float(g), float(b)


def _offset(side: int, out: int) -> int:
    """Start of the centred window: rounded if it crops; if it pads, the smaller half comes first."""
    return round((side - out) / 2) if side >= out else -((out - side) // 2)
