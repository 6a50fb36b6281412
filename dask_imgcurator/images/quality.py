"""Technical quality and perceptual hash of an image, from what its one decode gives.

All are taken of the whole image, not of the model's crop, brought to a small size first: `SIDE` x `SIDE` pixels (RGB,
bilinear with antialiasing, the aspect ratio given up) for the measures, 32 x 32 (gray, Lanczos) for the hash. So they
are comparable between images of all sizes, and cost little beside the encoder. Definitions are those of published
libraries; on the small image they agree with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["HASH_SIDE", "MEASURES", "SIDE", "View", "measure", "phash", "view"]

SIDE = 256
HASH_SIDE = 32

#: Columns of `measure`, in order.
MEASURES = ("brightness", "contrast", "blur", "entropy", "colourfulness")


@dataclass(frozen=True)
class View:
    """The small images of one image.

    Attributes
    ----------
    small : numpy.ndarray
        uint8 (3, SIDE, SIDE), RGB.
    gray : numpy.ndarray
        uint8 (HASH_SIDE, HASH_SIDE).
    """

    small: np.ndarray
    gray: np.ndarray


def view(image: Image) -> View:
    """Make the small images of a decoded one, by Pillow."""
    from PIL.Image import Resampling

    rgb = image.convert("RGB").resize((SIDE, SIDE), Resampling.BILINEAR)
    gray = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Resampling.LANCZOS)
    return View(np.asarray(rgb).transpose(2, 0, 1).copy(), np.asarray(gray))


def measure(small: torch.Tensor) -> torch.Tensor:
    """Measure a batch of small images.

    Parameters
    ----------
    small : torch.Tensor
        uint8 (n, 3, SIDE, SIDE), RGB.

    Returns
    -------
    torch.Tensor
        float32 (n, 5) on the same device, columns as `MEASURES`:

        - ``brightness``: mean of the gray value, 0 black to 1 white (`skimage.color.rgb2gray`);
        - ``contrast``: distance of the gray value's percentiles 1 and 99, 0 flat to 1 (what
          `skimage.exposure.is_low_contrast` compares with its threshold, in 8 bits);
        - ``blur``: 0 sharp to 1 blurred (`skimage.measure.blur_effect`; Crete et al. 2007, doi 10.1117/12.702790);
        - ``entropy``: of the histogram of gray values, 0 to 8 bits (`skimage.measure.shannon_entropy`);
        - ``colourfulness``: 0 gray, 15 slight, 59 quite, 109 extreme (M3 of Hasler and Süsstrunk 2003,
          doi 10.1117/12.477378).
    """
    import torch

    rgb = small.float()
    weights = torch.tensor([0.2125, 0.7154, 0.0721], device=small.device).reshape(1, 3, 1, 1)
    gray = (rgb * weights).sum(1, keepdim=True) / 255
    histogram = _histogram((gray * 255).round().to(torch.int64))
    columns = [
        gray.mean((1, 2, 3)),
        _contrast(histogram),
        _blur(gray),
        _entropy(histogram),
        _colourfulness(rgb),
    ]
    return torch.stack([column.float() for column in columns], 1)


def _histogram(gray: torch.Tensor) -> torch.Tensor:
    """Count the values 0 to 255 of each image: (n, 256)."""
    import torch

    flat = gray.reshape(len(gray), -1)
    counts = torch.zeros((len(gray), 256), dtype=torch.int64, device=gray.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))


def _contrast(histogram: torch.Tensor) -> torch.Tensor:
    """Percentiles as NumPy has them: between two values of the sorted pixels, linearly."""
    import torch

    upto = histogram.cumsum(1)
    last = SIDE * SIDE - 1

    def percentile(q: float) -> torch.Tensor:
        position = q * last
        low, high = int(position), min(int(position) + 1, last)
        a, b = ((upto <= index).sum(1).double() for index in (low, high))
        return a + (b - a) * (position - low)

    return torch.sub(percentile(0.99), percentile(0.01)) / 255


def _entropy(histogram: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.special.entr(histogram.double() / (SIDE * SIDE)).sum(1) / np.log(2)


def _blur(gray: torch.Tensor) -> torch.Tensor:
    """How little of the edges is lost when the image is blurred once more; the worse of both directions."""
    import torch

    worst = torch.zeros(len(gray), device=gray.device)
    for image in (gray[:, 0], gray[:, 0].transpose(1, 2)):
        sharp, soft = _edges(image), _edges(_mean_of_11(image))
        total, lost = sharp.sum((1, 2)), (sharp - soft).clamp_min(0).sum((1, 2))
        worst = torch.maximum(worst, (total - lost).abs() / total)
    return worst


def _edges(image: torch.Tensor) -> torch.Tensor:
    """Absolute Sobel derivative along the height, as scikit-image scales it, where `blur_effect` looks at it.

    By slices: a convolution of one channel takes ten times as long on a CPU.
    """
    across = image[:, :-2] - image[:, 2:]
    edges = ((across[:, :, :-2] + across[:, :, 2:]) / 2 + across[:, :, 1:-1]) / 4
    # One pixel is lost at each side; blur_effect leaves out one more at the beginning.
    return edges[:, 1:, 1:].abs().clamp_min(_EPSILON)


def _mean_of_11(image: torch.Tensor) -> torch.Tensor:
    """Running mean along the height, mirrored at the edge with the edge's own pixel twice, as scipy.ndimage has it."""
    import torch

    reach = 5
    padded = torch.cat([image[:, :reach].flip(1), image, image[:, -reach:].flip(1)], 1)
    upto = torch.nn.functional.pad(padded.double().cumsum(1), (0, 0, 1, 0))
    return ((upto[:, 2 * reach + 1 :] - upto[:, : -2 * reach - 1]) / (2 * reach + 1)).float()


#: Keeps a flat image from a division by zero; scikit-image's.
_EPSILON = float(np.spacing(1))


def _colourfulness(rgb: torch.Tensor) -> torch.Tensor:
    r, g, b = rgb.double().unbind(1)
    rg, yb = r - g, (r + g) / 2 - b
    spread = (rg.var((1, 2), correction=0) + yb.var((1, 2), correction=0)).sqrt()
    return spread + 0.3 * (rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2).sqrt()


def phash(gray: torch.Tensor) -> list[str]:
    """Hash small gray images: 64 bits that change little with the image.

    Parameters
    ----------
    gray : torch.Tensor
        uint8 (n, HASH_SIDE, HASH_SIDE).

    Returns
    -------
    list of str
        16 hexadecimal digits each: algorithm, order of the bits and notation of ``imagehash.phash`` (the signs of the
        64 lowest coefficients of the cosine transform, against their median). Computed on the tensor's device; the
        host sees the 8 bytes of each.
    """
    import torch

    if not len(gray):
        return []
    n = torch.arange(HASH_SIDE, dtype=torch.float64, device=gray.device)
    wave = torch.cos(torch.pi * n[:8, None] * (2 * n + 1) / (2 * HASH_SIDE))
    # Rounded, since in flat images coefficients are equal but for the last bits of their sums.
    low = (4 * wave @ gray.double() @ wave.T).reshape(-1, 64).round(decimals=6)
    median = low.sort(1).values[:, 31:33].mean(1, keepdim=True)
    places = 2 ** torch.arange(7, -1, -1, device=gray.device)
    packed = ((low > median).reshape(-1, 8, 8) * places).sum(2).to(torch.uint8)
    return [row.tobytes().hex() for row in packed.cpu().numpy()]


@cache
def provenance() -> dict[str, Any]:
    """What a score table records of the measures."""
    return {"side": SIDE, "hash_side": HASH_SIDE, "columns": list(MEASURES), "version": 1}
