"""Technical quality and perceptual hash of an image, from the same decode as its embedding.

All are taken from the whole image, not from the model's crop, at a small size: `SIDE` x `SIDE` pixels (RGB, bilinear
with antialiasing, ignoring the aspect ratio) for the measures, `HASH_SIDE` x `HASH_SIDE` (gray, Lanczos) for the hash.
This makes images of all sizes comparable, at little cost compared with the encoder. Definitions are those of published
libraries, and the results on the small image agree with theirs.

A measure is a column with the step ``measure`` in `dask_imgcurator.schema`, and a function of its name here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schema import MEASURES

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

SIDE = 256
HASH_SIDE = 32


def views(image: Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the small versions of an image, with Pillow: uint8 (3, SIDE, SIDE) and (HASH_SIDE, HASH_SIDE)."""
    import torch
    from PIL.Image import Resampling

    rgb = np.array(image.convert("RGB").resize((SIDE, SIDE), Resampling.BILINEAR))
    gray = np.array(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Resampling.LANCZOS))
    return torch.from_numpy(rgb).permute(2, 0, 1), torch.from_numpy(gray)


# --- measures: from a batch of images to a number each ------------------------------------------------


class Images:
    """A batch of small images, in the forms that measures take."""

    def __init__(self, small: torch.Tensor) -> None:
        import torch

        #: 0 to 255, float32 (n, 3, SIDE, SIDE).
        self.rgb = small.float()
        weights = torch.tensor([0.2125, 0.7154, 0.0721], device=small.device).reshape(1, 3, 1, 1)
        #: 0 to 1, float32 (n, SIDE, SIDE), as `skimage.color.rgb2gray`.
        self.gray = (self.rgb * weights).sum(1) / 255

    @cached_property
    def histogram(self) -> torch.Tensor:
        """Pixels of each gray value 0 to 255: int64 (n, 256)."""
        import torch

        values = (self.gray * 255).round().to(torch.int64).flatten(1)
        counts = torch.zeros((len(values), 256), dtype=torch.int64, device=values.device)
        return counts.scatter_add_(1, values, torch.ones_like(values))


def brightness(images: Images) -> torch.Tensor:
    """Mean of the gray value."""
    return images.gray.mean((1, 2))


def contrast(images: Images) -> torch.Tensor:
    """Percentile 99 minus percentile 1, as in `skimage.exposure.is_low_contrast`; interpolated linearly, like NumPy."""
    upto = images.histogram.cumsum(1)
    last = SIDE * SIDE - 1

    def percentile(q: float) -> torch.Tensor:
        position = q * last
        low, high = int(position), min(int(position) + 1, last)
        a, b = ((upto <= index).sum(1).double() for index in (low, high))
        return a + (b - a) * (position - low)

    return (percentile(0.99) - percentile(0.01)) / 255


def blur(images: Images) -> torch.Tensor:
    """How little edge strength is lost if the image is blurred once more, in the worse direction.

    `skimage.measure.blur_effect`; Crete et al. 2007, doi 10.1117/12.702790.
    """
    import torch

    worst = torch.zeros(len(images.gray), device=images.gray.device)
    for image in (images.gray, images.gray.transpose(1, 2)):
        sharp, soft = _edges(image), _edges(_mean_of_11(image))
        total, lost = sharp.sum((1, 2)), (sharp - soft).clamp_min(0).sum((1, 2))
        worst = torch.maximum(worst, (total - lost).abs() / total)
    return worst


#: Prevents a division by zero for flat images; scikit-image's value.
_EPSILON = float(np.spacing(1))


def _edges(image: torch.Tensor) -> torch.Tensor:
    """Absolute Sobel derivative along the height, scaled as in scikit-image's `blur_effect`.

    Uses slices: on a CPU, a convolution of one channel takes ten times as long.
    """
    across = image[:, :-2] - image[:, 2:]
    edges = ((across[:, :, :-2] + across[:, :, 2:]) / 2 + across[:, :, 1:-1]) / 4
    # One pixel is lost on each side; blur_effect leaves out one more at the beginning.
    return edges[:, 1:, 1:].abs().clamp_min(_EPSILON)


def _mean_of_11(image: torch.Tensor) -> torch.Tensor:
    """Running mean along the height, with scipy.ndimage's reflection (the pixel at the edge counts twice)."""
    import torch

    reach = 5
    padded = torch.cat([image[:, :reach].flip(1), image, image[:, -reach:].flip(1)], 1)
    upto = torch.nn.functional.pad(padded.double().cumsum(1), (0, 0, 1, 0))
    return ((upto[:, 2 * reach + 1 :] - upto[:, : -2 * reach - 1]) / (2 * reach + 1)).float()


def entropy(images: Images) -> torch.Tensor:
    """Entropy of the histogram (`skimage.measure.shannon_entropy`)."""
    import torch

    return torch.special.entr(images.histogram.double() / (SIDE * SIDE)).sum(1) / np.log(2)


def colourfulness(images: Images) -> torch.Tensor:
    """M3 of Hasler and Süsstrunk 2003, doi 10.1117/12.477378."""
    r, g, b = images.rgb.double().unbind(1)
    rg, yb = r - g, (r + g) / 2 - b
    spread = (rg.var((1, 2), correction=0) + yb.var((1, 2), correction=0)).sqrt()
    return spread + 0.3 * (rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2).sqrt()


#: Fails at import if the table has a measure without a function.
_FUNCTIONS: Mapping[str, Callable[[Images], torch.Tensor]] = {name: globals()[name] for name in MEASURES}


def measure(small: torch.Tensor) -> torch.Tensor:
    """Measure small images, uint8 (n, 3, SIDE, SIDE): float32 (n, measures), in the order of `MEASURES`."""
    import torch

    images = Images(small)
    return torch.stack([function(images).float() for function in _FUNCTIONS.values()], 1)


def phash(gray: torch.Tensor) -> list[str]:
    """Hash small gray images, uint8 (n, HASH_SIDE, HASH_SIDE): 64 bits that change little with the image.

    Algorithm, order of bits and notation (16 hexadecimal digits) are those of ``imagehash.phash``: the 64 lowest
    coefficients of the cosine transform, compared with their median. Only the 8 bytes of each reach the host.
    """
    import torch

    if not len(gray):
        return []
    n = torch.arange(HASH_SIDE, dtype=torch.float64, device=gray.device)
    wave = torch.cos(torch.pi * n[:8, None] * (2 * n + 1) / (2 * HASH_SIDE))
    # Rounded, because the coefficients of flat images differ only in the last bits of their sums.
    low = (4 * wave @ gray.double() @ wave.T).reshape(-1, 64).round(decimals=6)
    median = low.sort(1).values[:, 31:33].mean(1, keepdim=True)
    places = 2 ** torch.arange(7, -1, -1, device=gray.device)
    packed = ((low > median).reshape(-1, 8, 8) * places).sum(2).to(torch.uint8)
    return [row.tobytes().hex() for row in packed.cpu().numpy()]


def provenance() -> dict[str, Any]:
    """What a score table records about the measures."""
    return {"side": SIDE, "hash_side": HASH_SIDE, "columns": list(MEASURES), "version": 1}
