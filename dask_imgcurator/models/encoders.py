"""Image encoders: any open_clip model, or the starter model; loaded once a process and kept by their whole spec."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import config, plugins
from ..engine.device import Graphed, full_float32, graphs_problem, is_out_of_memory, release
from ..images.preprocess import Preprocess
from . import starter

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "Encoder",
    "EncoderSpec",
    "ModelError",
    "best_dtype",
    "load_encoder",
    "needs_quick_gelu",
    "resolve_encoder",
]

DTYPES = ("float32", "bfloat16", "float16")

_RANDOM = re.compile(r"random:(\d+)")


class ModelError(ValueError):
    """A model, its weights or its dtype cannot be used."""


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that changes what an encoder gives.

    Attributes
    ----------
    model : str
        open_clip's name of an architecture, or ``starter``.
    pretrained : str
        open_clip's tag, the absolute path of a checkpoint, ``random:SEED``, or empty (for ``starter`` and for models
        that carry their weights in their name, such as ``hf-hub:…``).
    weights_sha256 : str
        Of a local checkpoint; empty otherwise.
    dtype : str
        ``auto`` or one of `DTYPES`; ``auto`` is settled by the processor that loads the model.
    graphs : bool
        Whether a card replays the forward pass as a CUDA graph, where it can.
    """

    model: str
    pretrained: str = ""
    weights_sha256: str = ""
    dtype: str = "auto"
    graphs: bool = False

    @property
    def is_starter(self) -> bool:
        """Whether this is the built-in preview model."""
        return self.model == "starter"


def resolve_encoder(model: str, pretrained: str | None = None, dtype: str | None = None) -> EncoderSpec:
    """Check the names of a model and its weights and fix them as values, on the client.

    Parameters
    ----------
    model : str
        A name from `open_clip.list_models`, ``hf-hub:…``, ``local-dir:…``, ``starter``, or one that a package
        registered (see `dask_imgcurator.plugins`; such a name goes before open_clip's).
    pretrained : str, optional
        A tag from `open_clip.list_pretrained`, the path of a checkpoint, or ``random:SEED`` for random weights
        (benchmarks and tests).
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Of the encoder; None: `imgcurator.dtype`.

    Raises
    ------
    ModelError
        For a name or tag that does not exist, naming those that come close.
    """
    return replace(_resolve(model, pretrained, config.get("dtype", dtype)), graphs=bool(config.get("cuda-graphs")))


def _resolve(model: str, pretrained: str | None, dtype: str) -> EncoderSpec:
    if dtype not in ("auto", *DTYPES):
        raise ModelError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    if model == "starter":
        if pretrained:
            raise ModelError(f"the starter model carries its own weights: leave out pretrained={pretrained!r}")
        return EncoderSpec("starter", dtype=dtype)
    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained:
            raise ModelError(f"{model!r} names its weights itself: leave out pretrained={pretrained!r}")
        return EncoderSpec(model, dtype=dtype)
    if model in plugins.registered(plugins.ENCODERS):
        path = Path(pretrained or "").expanduser()
        return _checkpoint(model, path, dtype) if path.is_file() else EncoderSpec(model, pretrained or "", dtype=dtype)
    import open_clip

    model = model.replace("/", "-")
    known = open_clip.list_models()
    if model not in known:
        close = difflib.get_close_matches(model, known, 3, 0.5)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ModelError(
            f"unknown model {model!r}{hint} "
            f"(open_clip.list_models() lists all {len(known)}; 'starter' needs no download)"
        )
    if not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ModelError(
            f"model {model!r} needs pretrained=: one of {', '.join(tags) or '(no published tags)'}, "
            "a checkpoint's path, or random:SEED"
        )
    if pretrained.startswith("random"):
        if not _RANDOM.fullmatch(pretrained):
            raise ModelError(
                f"cannot read {pretrained!r}: random weights are asked for as random:SEED, for example random:0"
            )
        return EncoderSpec(model, pretrained, dtype=dtype)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags or pretrained.replace("-", "_").lower() in tags:
        return EncoderSpec(model, pretrained, dtype=dtype)
    path = Path(pretrained).expanduser()
    if path.is_file():
        return _checkpoint(model, path, dtype)
    raise ModelError(
        f"pretrained={pretrained!r} is neither a file nor a tag of {model!r} "
        f"(tags: {', '.join(tags) or 'none'}; or random:SEED)"
    )


def _checkpoint(model: str, path: Path, dtype: str) -> EncoderSpec:
    path = path.absolute()
    return EncoderSpec(model, str(path), _sha256(str(path), path.stat().st_mtime_ns), dtype)


@cache
def _sha256(path: str, _mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def best_dtype(device: str = "cpu") -> str:
    """Return the fastest dtype that a device has in hardware.

    Returns
    -------
    str
        On a GPU: ``bfloat16`` from compute capability 8.0, else ``float16``. On a CPU: ``bfloat16`` with AMX, and with
        AVX512-BF16 where a matrix product shows that it pays (on some processors that have it, it takes twice as long
        as ``float32``); else ``float32``.
    """
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16"):
        return "bfloat16"
    return "bfloat16" if has.get("avx512_bf16") and _bfloat16_gain() > 1.2 else "float32"


@cache
def _bfloat16_gain() -> float:
    """Time of a matrix product in float32 over its time in bfloat16; the best of five each, about 50 ms in all."""
    import torch

    best: dict[torch.dtype, float] = {}
    operands = {dtype: torch.ones((768, 768), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(5):
        for dtype, x in operands.items():
            begin = time.perf_counter()
            torch.mm(x, x)
            best[dtype] = min(best.get(dtype, 1e9), time.perf_counter() - begin)
    return best[torch.float32] / best[torch.bfloat16]


class Encoder:
    """A loaded model.

    Attributes
    ----------
    spec : EncoderSpec
        With `dtype` settled.
    preprocess : Preprocess
        What its images must go through.
    width : int
        Of its embeddings.
    provenance : dict
        What a score table records of it.
    model : object or None
        open_clip's model, whose text tower `text_models` uses; None where there is none.
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
        # Two partitions in one process take turns: each forward pass has all the threads, and memory stays that of one.
        self._turn = threading.Lock()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode a batch.

        Parameters
        ----------
        pixels : torch.Tensor
            float32 (n, 3, height, width), as `Decoder` gives them.

        Returns
        -------
        torch.Tensor
            float32 (n, `width`), L2-normalised, on the device.
        """
        import torch

        dtype = getattr(torch, self.spec.dtype)
        exact = self.device != "cpu" and self.spec.dtype == "float32"
        with self._turn, torch.inference_mode(), full_float32(exact):
            features = self._forward(pixels.to(self.device, dtype)).float()
            return torch.nn.functional.normalize(features, dim=-1)

    def encode(self, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Encode images in whole batches, smaller ones where memory runs out.

        A batch is always filled up with zeros: its size is the one thing that changes the last bits of an embedding,
        so neither bad neighbours nor the length of a shard may. Where memory runs out, the size is halved, for the
        rest of this process, and the images that did not fit are encoded again. Embeddings from before and after
        that differ by rounding, as those of two machines do: by less than the tolerances between CPU and GPU.

        Parameters
        ----------
        pixels : torch.Tensor
            float32 (n, 3, height, width).
        batch_size : int
            Size of a whole batch.

        Returns
        -------
        torch.Tensor
            float32 (n, `width`), L2-normalised, on the device.

        Raises
        ------
        ModelError
            If memory does not even do for one image.
        """
        import torch

        if not len(pixels):
            return torch.empty((0, self.width), device=self.device)
        parts: list[torch.Tensor] = []
        done = 0
        while done < len(pixels):
            size = min(batch_size, self._fits or batch_size)
            encoded = self._encode_whole(pixels[done : done + size], size)
            # Here the error is gone, and with it what its traceback held.
            if encoded is None:
                self._shrink(size)
            else:
                parts.append(encoded)
                done += len(encoded)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encode_whole(self, pixels: torch.Tensor, size: int) -> torch.Tensor | None:
        """Encode a batch filled up to a size; None where memory ran out."""
        from torch.nn import functional

        n = len(pixels)
        try:
            return self(functional.pad(pixels, (0,) * (2 * pixels.ndim - 1) + (size - n,)) if n < size else pixels)[:n]
        except Exception as err:
            if not is_out_of_memory(err):
                raise
            return None

    def _shrink(self, size: int) -> None:
        release(self.device)
        if size == 1:
            raise ModelError(
                f"{self.spec.model!r} in {self.spec.dtype} does not fit into the memory of {self.device!r}, not even "
                f"with one {self._unit} at a time: end other programs there, start fewer workers, "
                "set imgcurator.rmm-pool lower, or use a smaller model"
            )
        self._fits = size // 2
        warnings.warn(f"memory ran out at {size} {self._unit}s a batch: going on with {self._fits}", stacklevel=4)


_loading = threading.Lock()


def load_encoder(spec: EncoderSpec, device: str = "cpu") -> Encoder:
    """Load a model, or return it where this process has it.

    Raises
    ------
    ModelError
        If its weights cannot be had, or are not those that the client saw.
    """
    with _loading:
        if spec.dtype == "auto":
            # Settled before the lookup: "auto" and the dtype that it comes to are one model, loaded once.
            # The starter is small and convolutional: its gain from bfloat16 is not worth the lost digits.
            spec = replace(spec, dtype="float32" if spec.is_starter else best_dtype(device))
        return _load(spec, device)


@lru_cache(maxsize=2)
def _load(spec: EncoderSpec, device: str) -> Encoder:
    if spec.is_starter:
        return _load_starter(spec, device)
    own = plugins.registered(plugins.ENCODERS).get(spec.model)
    return _load_own(spec, device, plugins.package_of(own)) if own else _load_open_clip(spec, device)


def _load_starter(spec: EncoderSpec, device: str) -> Encoder:
    import torch

    model = starter.load_starter(device).to(getattr(torch, spec.dtype))
    model = model.to(memory_format=torch.channels_last)
    preprocess = Preprocess.from_open_clip({"fill_color": 0, **starter.PREPROCESS})
    return Encoder(
        spec,
        model,
        preprocess,
        512,
        device,
        {"model": "starter", "dtype": spec.dtype, **starter.provenance()},
    )


def _load_own(spec: EncoderSpec, device: str, package: str) -> Encoder:
    """Load what a package registered; see `plugins.OwnEncoder`."""
    weights = _weights(spec)
    load = plugins.load(plugins.ENCODERS, spec.model)
    try:
        own: plugins.OwnEncoder = load(spec, device)
        preprocess, width, forward = own.preprocess, int(own.width), own.forward
    # Whatever happens in a foreign package: it is told, with its name.
    except Exception as err:
        raise ModelError(f"cannot load {spec.model!r} of {package}: {type(err).__name__}: {err}") from err
    if not isinstance(preprocess, Preprocess):
        raise ModelError(f"{spec.model!r} of {package} has preprocess={preprocess!r}: it must be a Preprocess")
    about = {"model": spec.model, "package": package, **weights, "dtype": spec.dtype, "preprocess": asdict(preprocess)}
    return Encoder(spec, forward, preprocess, width, device, {**about, **getattr(own, "provenance", {})})


def _weights(spec: EncoderSpec) -> dict[str, Any]:
    """Provenance of weights; a checkpoint must be here the one that the client saw."""
    if not spec.weights_sha256:
        return {"pretrained": spec.pretrained}
    path = Path(spec.pretrained)
    if not path.is_file():
        raise ModelError(
            f"checkpoint {path} is not visible to the process on {os.uname().nodename}: "
            "put it where every worker can read it"
        )
    found = _sha256(str(path), path.stat().st_mtime_ns)
    if found != spec.weights_sha256:
        raise ModelError(
            f"checkpoint {path} has sha256 {found} here, {spec.weights_sha256} on the client: "
            "copy the same file to both"
        )
    return {"pretrained": path.name, "weights_sha256": found}


def _load_open_clip(spec: EncoderSpec, device: str) -> Encoder:
    import open_clip
    import torch

    weights = _weights(spec)
    random = _RANDOM.fullmatch(spec.pretrained)
    pretrained: str | None = spec.pretrained or None
    quick = needs_quick_gelu(spec.model, spec.pretrained)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            if random:
                torch.manual_seed(int(random[1]))
                pretrained = None
                weights["torch"] = torch.__version__
            with _quiet_open_clip():
                model = open_clip.create_model(
                    spec.model,
                    pretrained=pretrained,
                    precision=_precision(spec.dtype),
                    device=device,
                    force_quick_gelu=quick,
                )
    except Exception as err:
        remedy = (
            "The file must be a checkpoint of this architecture, as torch.save or safetensors write it."
            if spec.weights_sha256
            else "Without network, give a checkpoint's path, or use the model 'starter'."
        )
        raise ModelError(
            f"cannot load {spec.model!r} with pretrained={spec.pretrained!r}: "
            f"{type(err).__name__}: {textwrap.shorten(str(err), 300)}. {remedy}"
        ) from err
    model.eval()
    if not random and not spec.weights_sha256:
        weights["weights_sha256"] = _state_sha256(model)
    cfg = open_clip.get_model_preprocess_cfg(model)
    preprocess = Preprocess.from_open_clip(cfg)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model.encode_image(pixels)

    with torch.inference_mode():
        probe = torch.zeros((1, 3, *preprocess.size), dtype=getattr(torch, spec.dtype), device=device)
        width = int(forward(probe).shape[-1])
    provenance = {
        "model": spec.model,
        **weights,
        "dtype": spec.dtype,
        "preprocess": asdict(preprocess),
        "open_clip": open_clip.__version__,
        "quick_gelu": quick or bool((open_clip.get_model_config(spec.model) or {}).get("quick_gelu")),
    }
    return Encoder(spec, forward, preprocess, width, device, provenance, model)


def needs_quick_gelu(model: str, pretrained: str) -> bool:
    """Whether published weights were trained with QuickGELU, whatever the model's name says.

    OpenAI's were, and so were those that LAION's heads came from. open_clip 3 builds ``ViT-L-14`` with GELU for all
    weights, and says of a mismatch only in a warning; embeddings are then not those of the published model.
    """
    import open_clip

    return bool((open_clip.get_pretrained_cfg(model, pretrained) or {}).get("quick_gelu"))


def _precision(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


class _quiet_open_clip:
    """Keep open_clip and its downloads from logging: of random weights that were asked for, or each of a dozen tries.

    What fails is told by the error.
    """

    def __enter__(self) -> None:
        import logging

        self.disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        import logging

        logging.disable(self.disabled)


def _state_sha256(model: torch.nn.Module) -> str:
    """Hash of a published model's parameters: open_clip does not tell which file it took them from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
