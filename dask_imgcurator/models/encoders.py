"""Image encoders: any open_clip model, the starter, or one that a package registered; loaded once per process."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import config, plugins
from ..engine.cache import cache
from ..engine.device import Graphed, full_float32, graphs_problem, is_out_of_memory, pass_size, release
from ..images.preprocess import Preprocess
from . import ModelError, open_clip, starter

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that determines an encoder's output.

    Attributes
    ----------
    model : str
        open_clip's name of an architecture, ``starter``, or a registered name.
    pretrained : str
        open_clip's tag, the absolute path of a checkpoint, ``random:SEED``, or empty (for ``starter`` and for models
        that carry their weights in their name, such as ``hf-hub:…``).
    weights_sha256 : str
        Hash of a local checkpoint; empty otherwise.
    dtype : str
        ``auto`` or one of `DTYPES`; the processor that loads the model resolves ``auto``.
    graphs : bool
        Whether a GPU replays the forward pass as a CUDA graph, if possible.
    """

    model: str
    pretrained: str = ""
    weights_sha256: str = ""
    dtype: str = "auto"
    graphs: bool = True

    @property
    def is_starter(self) -> bool:
        """Whether this is the built-in preview model."""
        return self.model == "starter"


def resolve_encoder(model: str, pretrained: str | None = None, dtype: str | None = None) -> EncoderSpec:
    """Check the names of a model and its weights on the client, and fix them as values.

    Names that packages registered take precedence over open_clip's; without `dtype`, `imgcurator.dtype` applies.
    """
    dtype = config.get("dtype", dtype)
    if dtype not in ("auto", *DTYPES):
        raise ModelError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    weights: str | Path = ""
    if model == "starter":
        if pretrained:
            raise ModelError(f"the starter model carries its own weights: leave out pretrained={pretrained!r}")
    elif model.startswith(("hf-hub:", "local-dir:")):
        if pretrained:
            raise ModelError(f"{model!r} names its weights itself: leave out pretrained={pretrained!r}")
    elif model in plugins.registered(plugins.ENCODERS):
        path = Path(pretrained or "").expanduser()
        weights = path if path.is_file() else pretrained or ""
    else:
        model, weights = open_clip.resolve(model, pretrained)
    spec = EncoderSpec(model, str(weights), "", dtype, bool(config.get("cuda-graphs")))
    if isinstance(weights, Path):
        path = weights.absolute()
        spec = replace(spec, pretrained=str(path), weights_sha256=_sha256(path, path.stat().st_mtime_ns))
    return spec


def width_of(spec: EncoderSpec) -> int | None:
    """Width of a model's embeddings, if known without loading it."""
    if spec.is_starter:
        return len(starter.load_arrays()["map_b"])
    listed = ":" not in spec.model and spec.model not in plugins.registered(plugins.ENCODERS)
    return open_clip.width_of(spec.model) if listed else None


@once
def _sha256(path: Path, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- dtype ------------------------------------------------------------------------------------------


def best_dtype(device: str = "cpu") -> str:
    """Return the fastest dtype that a device supports in hardware.

    On a GPU: bfloat16 from compute capability 8.0 on, else float16. On a CPU: bfloat16 with AMX, and with AVX512-BF16
    if a matrix product shows that it pays (on some processors it takes twice as long as float32); else float32.
    """
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16"):
        return "bfloat16"
    return "bfloat16" if has.get("avx512_bf16") and _bfloat16_gain() > 1.2 else "float32"


@once
def _bfloat16_gain() -> float:
    """Time of a matrix product in float32 divided by that in bfloat16: the best of five each, about 50 ms in total."""
    import torch

    best: dict[torch.dtype, float] = {}
    operands = {dtype: torch.ones((768, 768), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(5):
        for dtype, x in operands.items():
            begin = time.perf_counter()
            torch.mm(x, x)
            best[dtype] = min(best.get(dtype, 1e9), time.perf_counter() - begin)
    return best[torch.float32] / best[torch.bfloat16]


# --- encoders ---------------------------------------------------------------------------------------


class Encoder:
    """A loaded model.

    The dtype in `spec` is resolved, `width` is the embeddings' length, `provenance` is what a score table records, and
    `model` is open_clip's, whose text half `text_tower` uses, or None for other models.
    """

    _unit = "image"

    def __init__(
        self,
        spec: EncoderSpec,
        forward: Callable[[torch.Tensor], torch.Tensor],
        preprocess: Preprocess,
        width: int,
        device: str,
        provenance: dict[str, Any],
        model: Any = None,
    ) -> None:
        self.spec, self.preprocess, self.width, self.device = spec, preprocess, width, device
        self.provenance, self.model = provenance, model
        graphed = spec.graphs and graphs_problem(device) is None
        self._forward = Graphed(forward) if graphed else forward
        self._fits: int | None = None
        # Partitions in one process take turns: each forward pass gets all threads, and memory for only one is needed.
        self._turn = threading.Lock()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encode a batch of pixels, as `Decoder` returns them: float32 (n, `width`), L2-normalised, on the device."""
        import torch

        exact = self.device != "cpu" and self.spec.dtype == "float32"
        with self._turn, torch.inference_mode(), full_float32(exact):
            features = self._forward(self._prepare(inputs)).float()
            return torch.nn.functional.normalize(features, dim=-1)

    def _prepare(self, inputs: torch.Tensor) -> torch.Tensor:
        import torch

        return inputs.to(self.device, getattr(torch, self.spec.dtype))

    def encode(self, inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Encode any number of images in whole batches, the rest in powers of two; in smaller ones if memory runs out.

        The batch size affects the last bits of an embedding. So these depend on the image's place in its partition, by
        `pass_size`, but not on its neighbours. If memory runs out, the size is halved for the rest of this process, and
        the images that did not fit are encoded again. Embeddings from other batch sizes differ by rounding, like those
        of two machines: by less than the tolerances between CPU and GPU.
        """
        import torch

        if not len(inputs):
            return torch.empty((0, self.width), device=self.device)
        parts: list[torch.Tensor] = []
        done = 0
        while done < len(inputs):
            size = pass_size(len(inputs) - done, min(batch_size, self._fits or batch_size))
            encoded = self._encode_whole(inputs[done : done + size], size)
            # By now the error has been freed, and with it the memory that its traceback held.
            if encoded is None:
                self._shrink(size)
            else:
                parts.append(encoded)
                done += len(encoded)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encode_whole(self, inputs: torch.Tensor, size: int) -> torch.Tensor | None:
        """Encode a batch padded to a size; None if memory ran out."""
        from torch.nn import functional

        n = len(inputs)
        try:
            return self(functional.pad(inputs, (0,) * (2 * inputs.ndim - 1) + (size - n,)) if n < size else inputs)[:n]
        except Exception as err:
            if not is_out_of_memory(err):
                raise
            return None

    def _shrink(self, size: int) -> None:
        if isinstance(self._forward, Graphed):
            self._forward.forget()
        release(self.device)
        if size == 1:
            raise ModelError(
                f"{self.spec.model!r} in {self.spec.dtype} does not fit into the memory of {self.device!r}, not even "
                f"with one {self._unit} at a time: end other programs, start fewer workers, or use a smaller model"
            )
        self._fits = size // 2
        warnings.warn(f"out of memory with {size} {self._unit}s per batch: continuing with {self._fits}", stacklevel=4)


# --- loading ----------------------------------------------------------------------------------------

#: Threads that measure at the same time would disturb each other, and might choose different dtypes.
_settling = threading.Lock()


def load_encoder(spec: EncoderSpec, device: str = "cpu") -> Encoder:
    """Load a model, or return the one that this process has.

    Raises `ModelError` if its weights are unavailable, or differ from those that the client saw.
    """
    if spec.dtype == "auto":
        # Resolved before the lookup: "auto" and the dtype that it means are the same model, loaded once.
        # The starter is small and convolutional: its gain from bfloat16 is not worth the lost digits.
        with _settling:
            spec = replace(spec, dtype="float32" if spec.is_starter else best_dtype(device))
    return cache.get("encoder", (spec, device), lambda: _load(spec, device))


def _load(spec: EncoderSpec, device: str) -> Encoder:
    if spec.is_starter:
        return _load_starter(spec, device)
    weights = _check_weights(spec)
    own = plugins.registered(plugins.ENCODERS).get(spec.model)
    if own is not None:
        return _load_own(spec, device, plugins.package_of(own), weights)
    loaded = open_clip.load(spec, device)
    model, preprocess = loaded.model, loaded.preprocess
    about = {"model": spec.model, **weights, "dtype": spec.dtype, "preprocess": asdict(preprocess), **loaded.provenance}
    return Encoder(spec, model.encode_image, preprocess, loaded.width, device, about, model)


def _load_starter(spec: EncoderSpec, device: str) -> Encoder:
    import torch

    model = starter.load_starter(device).to(getattr(torch, spec.dtype))
    model = model.to(memory_format=torch.channels_last)
    preprocess = Preprocess.from_open_clip({"fill_color": 0, **starter.PREPROCESS})
    about = {"model": "starter", "dtype": spec.dtype, **starter.provenance()}
    return Encoder(spec, model, preprocess, 512, device, about)


def _load_own(spec: EncoderSpec, device: str, package: str, weights: dict[str, Any]) -> Encoder:
    """Load an encoder that a package registered; see `plugins.OwnEncoder`."""
    load = plugins.load(plugins.ENCODERS, spec.model)
    try:
        own: plugins.OwnEncoder = load(spec, device)
        preprocess, width, forward = own.preprocess, int(own.width), own.forward
    # Any error in another package is reported with its name.
    except Exception as err:
        raise ModelError(f"cannot load {spec.model!r} of {package}: {type(err).__name__}: {err}") from err
    if not isinstance(preprocess, Preprocess):
        raise ModelError(f"{spec.model!r} of {package} has preprocess={preprocess!r}: it must be a Preprocess")
    about = {"model": spec.model, "package": package, **weights, "dtype": spec.dtype, "preprocess": asdict(preprocess)}
    return Encoder(spec, forward, preprocess, width, device, {**about, **getattr(own, "provenance", {})})


def _check_weights(spec: EncoderSpec) -> dict[str, Any]:
    """Return the provenance of the weights; a checkpoint must be the one that the client saw."""
    if not spec.weights_sha256:
        return {"pretrained": spec.pretrained}
    path = Path(spec.pretrained)
    if not path.is_file():
        raise ModelError(
            f"checkpoint {path} is not visible to the process on {os.uname().nodename}: "
            "put it where every worker can read it"
        )
    found = _sha256(path, path.stat().st_mtime_ns)
    if found != spec.weights_sha256:
        raise ModelError(
            f"checkpoint {path} has sha256 {found} here, {spec.weights_sha256} on the client: "
            "copy the same file to both"
        )
    return {"pretrained": path.name, "weights_sha256": found}
