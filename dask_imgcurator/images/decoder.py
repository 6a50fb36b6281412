"""Bytes to pixels: DALI or Pillow decodes each image of a batch, and bad images are set aside.

DALI fails a whole batch because of one bad image and may crash the process, so every image is inspected first: Pillow
reads its container and, for JPEG, its markers are walked up to the first scan. An image that DALI still refuses goes to
Pillow by itself, so no image's pixels depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..engine.device import to_device
from . import dali, pillow
from .formats import BadImage
from .pillow import ImageInfo
from .preprocess import Preprocess
from .quality import HASH_SIDE, SIDE

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """Decoded images, in the order of the files given."""

    #: float32 (n, 3, height, width) on the decoder's device, normalised; zero where an image failed.
    pixels: torch.Tensor
    infos: list[ImageInfo | BadImage]
    #: Views of the whole images for `quality`, if requested: uint8 (n, 3, SIDE, SIDE) and (n, HASH_SIDE, HASH_SIDE).
    small: torch.Tensor | None = None
    gray: torch.Tensor | None = None

    @property
    def good(self) -> list[int]:
        """Positions of the images that could be decoded."""
        return [i for i, info in enumerate(self.infos) if isinstance(info, ImageInfo)]

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor], infos: list[ImageInfo | BadImage]) -> Batch:
        """Build a batch from its `tensors`."""
        pixels, *views = tensors
        return cls(pixels, infos, *views)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Pixels and, if there are any, views."""
        return [t for t in (self.pixels, self.small, self.gray) if t is not None]


@dataclass(eq=False)
class Decoder:
    """Decodes batches for one model on one device; not thread-safe.

    `dali_device` is where DALI decodes (``"cpu"`` or ``"mixed"``); if it is None, Pillow decodes everything.
    """

    preprocess: Preprocess
    batch_size: int
    device: str = "cpu"
    dali_device: str | None = "cpu"
    threads: int = 1
    max_pixels: int | None = None
    adjust_orientation: bool = False
    scale_high_bit_depth: bool = False
    views: bool = False
    _pipeline: dali.Pipeline | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._fits = self.batch_size
        # Pillow and torchvision release the interpreter lock while they compute.
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pillow")

    def __call__(self, blobs: Sequence[bytes | BadImage]) -> Batch:
        """Decode a batch; a `BadImage` among the files (one that could not be read at all) keeps its place."""
        import torch

        def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.zeros((len(blobs), *shape), dtype=dtype, device=self.device)

        with pillow.quiet:  # once, not for each image
            infos = [self._inspect(blob) for blob in blobs]
        batch = Batch(zeros(3, *self.preprocess.size, dtype=torch.float32), infos)
        if self.views:
            batch.small, batch.gray = zeros(3, SIDE, SIDE), zeros(HASH_SIDE, HASH_SIDE)
        rows: dict[str, list[int]] = {"dali": [], "pillow": []}
        for i in batch.good:
            rows[self._info(batch, i).decoder].append(i)
        self._by_pillow(blobs, rows["pillow"], batch)
        self._by_dali(blobs, rows["dali"], batch)
        return batch

    @staticmethod
    def _info(batch: Batch, row: int) -> ImageInfo:
        info = batch.infos[row]
        assert isinstance(info, ImageInfo)
        return info

    def _inspect(self, blob: bytes | BadImage) -> ImageInfo | BadImage:
        if isinstance(blob, BadImage):
            return blob
        try:
            info = pillow.inspect(blob, self.max_pixels)
        except BadImage as bad:
            return bad
        size = self._upright(info)
        # 1 x 65,500 pixels are few, but not once the shorter side is resized to 224.
        odd = min(size) < dali.SHORTEST_SIDE or self.preprocess.geometry(*size).grows_too_far(*size)
        return replace(info, decoder="pillow") if odd or self.dali_device is None else info

    def _upright(self, info: ImageInfo) -> tuple[int, int]:
        """Width and height of the image before resizing: upright, if the orientation is applied."""
        turned = self.adjust_orientation and info.orientation in (5, 6, 7, 8)
        return (info.height, info.width) if turned else (info.width, info.height)

    # --- DALI -------------------------------------------------------------------------------------

    def _by_dali(self, blobs: Sequence[Any], rows: list[int], batch: Batch) -> None:
        """Decode with DALI, and images that DALI refuses with Pillow: those it names, or those that bisection finds."""
        waiting = [rows]
        while waiting:
            rows = waiting.pop()
            named = None
            if len(rows) <= self._fits:
                try:
                    self._run_dali(blobs, rows, batch)
                    continue
                except dali.Refused as refused:
                    named = 0 if len(rows) == 1 else refused.place
                    if refused.out_of_memory:
                        self._fits = max(1, len(rows) // 2)
            if named is None:
                middle = len(rows) // 2
                waiting += [rows[middle:], rows[:middle]]
            else:
                i = rows[named]
                batch.infos[i] = replace(self._info(batch, i), decoder="pillow")
                self._by_pillow(blobs, [i], batch)
                waiting.append(rows[:named] + rows[named + 1 :])

    def _run_dali(self, blobs: Sequence[Any], rows: list[int], batch: Batch) -> None:
        if not rows:
            return
        if self._pipeline is None:
            options = self.threads, self.adjust_orientation, self.views
            self._pipeline = dali.Pipeline(self.preprocess, self.batch_size, str(self.dali_device), *options)
        sizes = [self._upright(self._info(batch, i)) for i in rows]
        self._pipeline([blobs[i] for i in rows], sizes, batch.tensors, self._places(rows))

    # --- Pillow -----------------------------------------------------------------------------------

    def _by_pillow(self, blobs: Sequence[Any], rows: list[int], batch: Batch) -> None:
        import torch

        options = self.adjust_orientation, self.scale_high_bit_depth, self.views

        def decode(i: int) -> list[torch.Tensor] | BadImage:
            try:
                return pillow.decode(blobs[i], self.preprocess, *options)
            except BadImage as bad:
                return bad

        decoded: dict[int, list[torch.Tensor]] = {}
        for i, result in zip(rows, self._pool.map(decode, rows), strict=True):
            if isinstance(result, BadImage):
                info = self._info(batch, i)
                result.width, result.height = info.width, info.height
                batch.infos[i] = result
            else:
                decoded[i] = result
        if decoded:
            places = self._places(list(decoded))
            for target, values in zip(batch.tensors, zip(*decoded.values(), strict=True), strict=True):
                target[places] = to_device(torch.stack(values), self.device)

    def _places(self, rows: list[int]) -> Any:
        """Index of these rows that needs no wait: a list would be copied to the GPU synchronously."""
        import torch

        if rows == list(range(rows[0], rows[-1] + 1)):
            return slice(rows[0], rows[-1] + 1)
        return to_device(torch.tensor(rows), self.device)
