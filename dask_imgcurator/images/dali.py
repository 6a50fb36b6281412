"""Pixels from DALI, on a GPU or on the CPU; they differ from open_clip's own transform by rounding."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.device import is_out_of_memory
from .preprocess import Preprocess
from .quality import HASH_SIDE, SIDE

if TYPE_CHECKING:
    import torch

#: Share of the JPEGs for a GPU's JPEG engines; nvJPEG's kernels and the CPU's threads decode the others.
HW_DECODER_LOAD = 0.9

#: Images with a shorter side go to Pillow: with so few source pixels, DALI is off by more than one level.
SHORTEST_SIDE = 8

#: How DALI names the image of a batch that it cannot decode, in its message only.
_FAILED = re.compile(r"Failed to decode sample #(\d+)")


def dali_problem() -> str | None:
    """Say why DALI cannot be used here; None if it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as err:
        return f'DALI is not installed ({err}): pip install "dask-imgcurator[cpu]" (or [cu12], [cu13])'
    return None


def geometry(preprocess: Preprocess, sizes: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Target sizes and crops for images of these sizes (width, height), by pipeline input: (n, 2) each."""
    shapes = [preprocess.geometry(*size) for size in sizes]
    return {
        "between": np.array([g.between(*size) for g, size in zip(shapes, sizes, strict=True)], np.float32),
        "size": np.array([(g.height, g.width) for g in shapes], np.float32),
        "anchor": np.array([(g.top, g.left) for g in shapes], np.int32),
    }


class Refused(Exception):
    """DALI did not decode a batch: because of the image at `place`, for lack of memory, or for an unknown reason."""

    def __init__(self, place: int | None = None, out_of_memory: bool = False) -> None:
        super().__init__(place, out_of_memory)
        self.place, self.out_of_memory = place, out_of_memory


class Pipeline:
    """Decodes batches with a DALI pipeline, which is built for the first batch and after each that DALI refused.

    On a GPU, DALI works on its own streams, concurrently with the encoder, and the calling thread waits only for those.
    The copy out of DALI's memory is queued on the default stream, behind the encoder's batch, without waiting: the
    pixels can be used at once on that stream. DALI gets its memory back with the next batch, after a wait for that
    copy, because it does not know the default stream; this also keeps decoders from running far ahead of the encoder.
    """

    def __init__(
        self, preprocess: Preprocess, batch_size: int, device: str, threads: int, upright: bool, views: bool
    ) -> None:
        self.preprocess, self.batch_size, self.device = preprocess, batch_size, device
        self.threads, self.upright, self.views = threads, upright, views
        self._pipe: Any = None
        self._held: Any = None

    def __call__(
        self, images: Sequence[bytes], sizes: Sequence[tuple[int, int]], targets: Sequence[torch.Tensor], rows: Any
    ) -> None:
        """Decode images of these sizes (width, height) into rows of the targets: pixels, small and gray views."""
        import torch

        if self._pipe is None:
            self._pipe = self._build()
        try:
            self._pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in images])
            for name, values in geometry(self.preprocess, sizes).items():
                self._pipe.feed_input(name, values)
            if self._held is not None:
                self._held[0].synchronize()
            outputs = self._pipe.run()  # returns once the images are decoded
            for target, output in zip(targets, outputs, strict=True):
                # A copy: the tensor is a view of DALI's memory, and Pillow may have filled other rows of the batch.
                target[rows] = torch.utils.dlpack.from_dlpack(output.as_tensor())
            if self.device != "cpu":
                copied = torch.cuda.Event()
                copied.record()
                self._held = copied, outputs
        except RuntimeError as err:
            self._pipe = self._held = None  # no pipeline can be used again after an error
            if is_out_of_memory(err):
                # Its memory pools never shrink by themselves.
                backend: Any = importlib.import_module("nvidia.dali.backend")
                backend.ReleaseUnusedMemory()
                raise Refused(out_of_memory=True) from err
            failed = _FAILED.search(str(err))
            raise Refused(int(failed[1]) if failed and int(failed[1]) < len(images) else None) from err

    def _build(self) -> Any:
        import torch
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline as DaliPipeline

        p = self.preprocess
        filter_ = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[p.interpolation]
        pipe = DaliPipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=None if self.device == "cpu" else torch.cuda.current_device(),
            prefetch_queue_depth=1,
        )
        with pipe:
            encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1, no_copy=True)
            between = fn.external_source(name="between", device="cpu", dtype=types.FLOAT, ndim=1)
            size = fn.external_source(name="size", device="cpu", dtype=types.FLOAT, ndim=1)
            anchor = fn.external_source(name="anchor", device="cpu", dtype=types.INT32, ndim=1)
            # For "mixed" only. libjpeg (hence Pillow and open_clip) upsamples colours in the fancy way.
            # The load goes to the JPEG engines of GPUs that have them (A100, A30, H100 …).
            mixed: dict[str, Any] = {"hw_decoder_load": HW_DECODER_LOAD, "jpeg_fancy_upsampling": True}
            image: Any = fn.decoders.image(
                encoded,
                device=self.device,
                output_type=types.RGB,
                adjust_orientation=self.upright,
                **(mixed if self.device == "mixed" else {}),
            )
            small = _views(image) if self.views else ()
            # One side after the other, each rounded to 8 bits, as in Pillow: if the first pass overshoots (at the edges
            # of text), the second must start from clipped values.
            for target in (between, size):
                image = fn.resize(image, size=target, interp_type=filter_, antialias=True)
            # By name: given by position, the shape would be a constant in GPU memory.
            image = fn.slice(
                image,
                start=anchor,
                shape=list(p.size),
                axis_names="HW",
                out_of_bounds_policy="pad",
                fill_values=float(p.fill_color),
            )
            image = fn.crop_mirror_normalize(
                image,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * m for m in p.mean],
                std=[255 * s for s in p.std],
            )
            pipe.set_outputs(image, *small)
        pipe.build()
        return pipe


def _views(image: Any) -> tuple[Any, Any]:
    """Small views like those of `quality.views`; bits of the hash that are near their threshold may differ."""
    from nvidia.dali import fn, types

    small: Any = fn.resize(image, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
    gray: Any = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    gray = fn.resize(gray, size=[HASH_SIDE, HASH_SIDE], interp_type=types.INTERP_LANCZOS3, antialias=True)
    return fn.transpose(small, perm=[2, 0, 1]), fn.squeeze(gray, axes=[2])
