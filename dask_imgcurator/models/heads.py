"""Aesthetic and NSFW heads, as data: which embedder each was fitted to, its file, and what it computes.

A head maps a CLIP image embedding to one number. LAION published those named here:

- **aesthetic v1** (``sa_0_4_*_linear``), a linear layer, for ViT-B/32, B/16 and L/14;
- **aesthetic v2** (``sac+logos+ava1-l14-linearMSE``), for L/14: five linear layers without activations
  between, so one affine map. v1 and v2 are two scales: their scores do not compare.
- **NSFW**, an AutoKeras classifier each for L/14 and B/32. Some columns were taken for categories and are
  looked up by the text of their value, see `ranks`.

The two ``starter`` heads belong to the starter model, whose embeddings live in ViT-B/32's space. They are
previews: good enough to see a pipeline work, **not** for safety decisions.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from . import weights
from .savedmodel import AutoKerasHead, SavedModelError, read_autokeras
from .weights import WeightsError, WeightsFile

if TYPE_CHECKING:
    import torch

__all__ = ["HEADS", "Head", "HeadError", "HeadSpec", "load_head", "provenance", "ranks", "read_pth", "resolve"]

Kind = Literal["aesthetic", "nsfw"]

#: Rows scored at a time, so that double precision costs little memory whatever the partition's size.
_BLOCK = 65_536

#: Norms that are taken for "L2-normalised, then rounded or averaged". What CLIP puts out before normalisation
#: has a norm of 8 to 20, and would score 20 and more; LAION's reference inputs for NSFW go up to 1.29.
_NORMS = (0.5, 2.0)


class HeadError(ValueError):
    """A head does not exist, does not fit the embeddings, or was given what it cannot score."""


@dataclass(frozen=True)
class HeadSpec:
    """A head that can be asked for by name.

    Attributes
    ----------
    name : str
        Its name here.
    kind : {"aesthetic", "nsfw"}
        What it scores.
    column : str
        Column that it fills.
    width : int
        Width of the embeddings that it takes.
    embedder : str
        Model whose embeddings it was fitted to; embeddings of another one of the same width give nonsense.
    weights : WeightsFile or None
        Published file; None where the weights ship in this package.
    source : str
        Where it was published.
    preview : bool
        Whether it is a preview only, not for decisions.
    """

    name: str
    kind: Kind
    column: str
    width: int
    embedder: str
    weights: WeightsFile | None
    source: str
    preview: bool = False


# Pinned to commits: the repositories have moved these files about before.
_V1 = ("LAION-AI/aesthetic-predictor", "6d122adad522ab246644d9dc1c6d7a3810ee255f", "MIT")
_V2 = (
    "christophschuhmann/improved-aesthetic-predictor",
    "6934dd81792f086e613a121dbce43082cb8be85e",
    "Apache-2.0",
)
_NSFW = ("LAION-AI/CLIP-based-NSFW-Detector", "d6bb8fe31fd4aecbfed7dfb62df4fe5858bfc014", "MIT")


def _published(
    name: str, kind: Kind, width: int, embedder: str, origin: tuple[str, str, str], filename: str, sha256: str
) -> HeadSpec:
    repository, commit, license_ = origin
    path = filename.replace("+", "%2B")
    url = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
    file = WeightsFile(folder=kind, filename=filename, sha256=sha256, url=url, license=license_)
    source = f"https://github.com/{repository}"
    return HeadSpec(name, kind, f"{kind}_score", width, f"OpenAI CLIP {embedder}", file, source)


def _starter(name: str, kind: Kind) -> HeadSpec:
    source = "dask_imgcurator, fitted to real CLIP ViT-B/32 embeddings, bias set on the starter model's"
    return HeadSpec(name, kind, f"{kind}_score", 512, "dask_imgcurator starter", None, source, preview=True)


#: Every head, by name.
HEADS: Mapping[str, HeadSpec] = {
    spec.name: spec
    for spec in (
        _published(
            "aesthetic-v2-l14",
            "aesthetic",
            768,
            "ViT-L/14",
            _V2,
            "sac+logos+ava1-l14-linearMSE.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
        _published(
            "aesthetic-v1-l14",
            "aesthetic",
            768,
            "ViT-L/14",
            _V1,
            "sa_0_4_vit_l_14_linear.pth",
            "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        ),
        _published(
            "aesthetic-v1-b32",
            "aesthetic",
            512,
            "ViT-B/32",
            _V1,
            "sa_0_4_vit_b_32_linear.pth",
            "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f",
        ),
        _published(
            "aesthetic-v1-b16",
            "aesthetic",
            512,
            "ViT-B/16",
            _V1,
            "sa_0_4_vit_b_16_linear.pth",
            "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0",
        ),
        _published(
            "nsfw-l14",
            "nsfw",
            768,
            "ViT-L/14",
            _NSFW,
            "clip_autokeras_binary_nsfw.zip",
            "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a",
        ),
        _published(
            "nsfw-b32",
            "nsfw",
            512,
            "ViT-B/32",
            _NSFW,
            "clip_autokeras_nsfw_b32.zip",
            "78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b",
        ),
        _starter("aesthetic-starter", "aesthetic"),
        _starter("nsfw-starter", "nsfw"),
    )
}

_AUTO: Mapping[tuple[Kind, int], str] = {
    ("aesthetic", 768): "aesthetic-v2-l14",
    ("aesthetic", 512): "aesthetic-v1-b32",
    ("nsfw", 768): "nsfw-l14",
    ("nsfw", 512): "nsfw-b32",
}


def resolve(kind: Kind, head: str, width: int) -> HeadSpec:
    """Choose a head.

    Parameters
    ----------
    kind : {"aesthetic", "nsfw"}
        What is to be scored.
    head : str
        A name from `HEADS`, or ``"auto"``: by the width alone (768: ``aesthetic-v2-l14``, ``nsfw-l14``; 512:
        ``aesthetic-v1-b32``, ``nsfw-b32``).
    width : int
        Width of the embeddings.

    Returns
    -------
    HeadSpec

    Raises
    ------
    HeadError
        If there is no such head, it is of the other kind, or it (for ``auto``: every one) takes another
        width.
    """
    there_are = ", ".join(f"{spec.name} ({spec.width})" for spec in HEADS.values() if spec.kind == kind)
    if head == "auto":
        if (kind, width) not in _AUTO:
            raise HeadError(
                f"no {kind} head takes embeddings of width {width}; there are {there_are}; "
                f"embed with a model whose width fits one of them"
            )
        return HEADS[_AUTO[kind, width]]
    if head not in HEADS:
        close = difflib.get_close_matches(head, HEADS, n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise HeadError(f"unknown {kind} head {head!r}{hint}; there are auto, {there_are}")
    spec = HEADS[head]
    if spec.kind != kind:
        raise HeadError(f"head {head!r} gives {spec.column}; {kind} heads are auto, {there_are}")
    if spec.width != width:
        raise HeadError(
            f"head {head!r} takes embeddings of width {spec.width} ({spec.embedder}), these have {width}; "
            f"{kind} heads are {there_are}"
        )
    return spec


def provenance(spec: HeadSpec) -> dict[str, str]:
    """Return what identifies a head's output: ``name``, ``sha256`` of its file, and ``source``."""
    sha256 = spec.weights.sha256 if spec.weights else hashlib.sha256(_starter_bytes()).hexdigest()
    return {"name": spec.name, "sha256": sha256, "source": spec.source}


@dataclass(frozen=True)
class Head:
    """A loaded head; made by `load_head`.

    Attributes
    ----------
    spec : HeadSpec
        What was loaded.
    device : str
        Where it computes.
    round_to : {"float16"} or None
        What embeddings are rounded to before anything else.
    """

    spec: HeadSpec
    device: str
    round_to: str | None
    _score: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Score embeddings.

        Parameters
        ----------
        x : torch.Tensor
            Floating, ``(rows, width)``, on the head's device, L2-normalised. Used as they are but for the
            rounding: nothing is normalised here.

        Returns
        -------
        torch.Tensor
            float32, ``(rows,)``, on the same device; NaN for a row whose norm is not finite.

        Raises
        ------
        HeadError
            If the shape, the dtype or the device does not fit, or if a row's norm lies outside 0.5 to 2: such
            embeddings were not normalised, and their scores would be nonsense.
        """
        import torch

        if x.ndim != 2 or x.shape[1] != self.spec.width or not x.is_floating_point():
            raise HeadError(
                f"head {self.spec.name} takes floating embeddings of shape (rows, {self.spec.width}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        if x.device != torch.device(self.device):
            raise HeadError(f"head {self.spec.name} is on {self.device}, the embeddings are on {x.device}")
        with torch.inference_mode():
            return torch.cat([self._block(block, i * _BLOCK) for i, block in enumerate(x.split(_BLOCK))])

    def _block(self, x: torch.Tensor, first: int) -> torch.Tensor:
        import torch

        x = x.float()
        norms = torch.linalg.vector_norm(x, dim=1)
        low, high = _NORMS
        good = (norms >= low) & (norms <= high)
        all_good = bool(good.all())  # the one wait for the device in the usual case
        if not all_good:
            wrong = ~good & norms.isfinite()
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise HeadError(
                    f"head {self.spec.name} takes L2-normalised embeddings, but row {first + row} has norm "
                    f"{float(norms[row]):.6g} ({int(wrong.sum()) - 1} more are off); divide each by its norm"
                )
            # They go through as zeros: what a NaN turns into as an integer depends on the device.
            x = torch.where(good[:, None], x, 0.0)
        if self.round_to == "float16":
            x = x.half().float()
        scores = self._score(x)
        return scores if all_good else torch.where(good, scores, torch.nan)


def load_head(spec: HeadSpec, weights_dir: str | None = None, device: str = "cpu", round_to: str | None = None) -> Head:
    """Load a head; once per process for each set of arguments.

    Parameters
    ----------
    spec : HeadSpec
        Which.
    weights_dir : str, optional
        Folder to look for its file in first, see `dask_imgcurator.models.weights.find`.
    device : str
        Torch device to compute on.
    round_to : {"float16"}, optional
        Round embeddings first. LAION's NSFW heads were fitted to float16 embeddings, and their lookup of
        categorical columns hits only values that float16 can hold.

    Returns
    -------
    Head
        Callable from ``(rows, width)`` to ``(rows,)``.

    Raises
    ------
    HeadError
        If `round_to` is something else.
    WeightsError
        If the file is not found, or is not what was published.
    """
    import torch

    if round_to not in ("float16", None):
        raise HeadError(f'round_to={round_to!r}: only "float16" and None are known')
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    # The folder is part of the key: one that does not exist must raise in every process alike.
    return _load(spec, weights_dir, str(where), round_to)


@lru_cache(maxsize=32)
def _load(spec: HeadSpec, weights_dir: str | None, device: str, round_to: str | None) -> Head:
    if spec.weights is None:
        weight, bias = _starter_affine(spec.kind)
        score = _affine(weight, bias, device, sigmoid=spec.kind == "nsfw")
    else:
        data = weights.read(spec.weights, weights_dir)
        if spec.kind == "aesthetic":
            weight, bias = _collapse(read_pth(data, spec.weights.filename))
            score = _affine(weight, bias, device)
        else:
            try:
                score = _autokeras(read_autokeras(data), device)
            except SavedModelError as error:
                raise WeightsError(f"{spec.weights.filename}: {error}") from error
    return Head(spec, device, round_to, score)


# --- affine heads -------------------------------------------------------------------------------------------


def read_pth(data: bytes, filename: str) -> dict[str, NDArray[np.float64]]:
    """Read the tensors of a ``.pth`` file, which is a pickle, by torch's reader that executes nothing from it.

    Parameters
    ----------
    data : bytes
        Content of the file: a state dict.
    filename : str
        For the error.

    Raises
    ------
    WeightsError
        If it is anything else.
    """
    import torch

    try:
        # The v2 file holds CUDA tensors.
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {str(name): tensor.detach().double().numpy() for name, tensor in state.items()}
    # A damaged pickle can fail in any way. Torch's own text is left out: it advises weights_only=False.
    except Exception as error:
        raise WeightsError(f"{filename} is not a file of plain tensors ({type(error).__name__})") from error


def _collapse(state: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], float]:
    """Fold linear layers without activations between into one affine map, in double precision."""
    # Keys are "weight" and "bias", or "layers.<number>.weight" and so on: Dropout layers leave gaps.
    layers = sorted({name.rpartition(".")[0] for name in state}, key=lambda n: int(n.rpartition(".")[2] or 0))
    weight, bias = np.eye(state[f"{layers[0]}.weight".lstrip(".")].shape[1]), np.zeros(1)
    for layer in layers:
        kernel, offset = (state[f"{layer}.{part}".lstrip(".")] for part in ("weight", "bias"))
        weight, bias = kernel @ weight, kernel @ bias + offset if layer != layers[0] else offset
    return weight[0], float(bias[0])


def _starter_bytes() -> bytes:
    try:
        return resources.files("dask_imgcurator").joinpath("data", "starter.npz").read_bytes()
    except FileNotFoundError as error:
        raise WeightsError("data/starter.npz is missing from this installation; install it again") from error


def _starter_affine(kind: Kind) -> tuple[NDArray[np.float64], float]:
    with np.load(io.BytesIO(_starter_bytes()), allow_pickle=False) as arrays:
        return arrays[f"{kind}_w"].astype(np.float64), float(arrays[f"{kind}_b"].item())


def _affine(
    weight: NDArray[np.float64], bias: float, device: str, sigmoid: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    w = torch.from_numpy(weight).to(device)

    def score(x: torch.Tensor) -> torch.Tensor:
        # In double precision: a row's score then depends neither on the batch it came in nor on TF32.
        y = x.double() @ w + bias
        return (y.sigmoid() if sigmoid else y).float()

    return score


# --- NSFW heads ---------------------------------------------------------------------------------------------


def _autokeras(head: AutoKerasHead, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    mean = torch.from_numpy(head.mean).to(device)
    scale = torch.from_numpy(head.variance).sqrt().clamp(min=1e-7).to(device)
    layers = [tuple(torch.from_numpy(a).to(device) for a in layer) for layer in head.layers]
    lookups = [(v.column, ranks(v.texts, v.ranks, device)) for v in head.vocabularies]

    def score(x: torch.Tensor) -> torch.Tensor:
        columns = {column: lookup(x[:, column]) for column, lookup in lookups}
        x = x.clone()
        for column, rank in columns.items():
            x[:, column] = rank.float()
        x = (x - mean) / scale
        for kernel, bias in layers[:-1]:
            x = torch.addmm(bias, x, kernel).relu()
        kernel, bias = layers[-1]
        return torch.addmm(bias, x, kernel)[:, 0].sigmoid()

    return score


#: ``"%f"`` of a finite number.
_PRINTED = re.compile(r"-?[0-9]{1,12}\.[0-9]{6}")

#: Integers that stand for the text "-0.000000" and for numbers too large for any text of a vocabulary.
_MINUS_ZERO, _FAR = -(1 << 62), 1 << 61


def ranks(
    texts: Sequence[str], values: NDArray[np.int64], device: str = "cpu"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make a lookup of numbers in a vocabulary by their printed text, which runs on the device.

    AutoKeras looks ``"%f" % x`` up in a table of texts. Here each text becomes an integer, in millionths, and
    so does each number: a float32 has 24 significant bits and a million 14 beside a power of two, so their
    product is exact in double precision, and rounding it half to even is what ``"%f"`` does. "-0.000000" and
    "0.000000" differ.

    Parameters
    ----------
    texts : sequence of str
        Vocabulary; each a finite number as ``"%f"`` prints it.
    values : numpy.ndarray
        int64, what each text stands for.
    device : str
        Torch device.

    Returns
    -------
    callable
        From finite float32 ``(rows,)`` to int64 ``(rows,)``; 0 for a number whose text is not in the
        vocabulary.

    Raises
    ------
    HeadError
        If a text is none that ``"%f"`` prints for a finite number.
    """
    import torch

    if not texts:
        return lambda x: torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    strange = [t for t in texts if not _PRINTED.fullmatch(t)]
    if strange:
        raise HeadError(f"{strange[0]!r} in the vocabulary is no finite number as printed by %f")
    codes = np.array([_MINUS_ZERO if t == "-0.000000" else int(t.replace(".", "")) for t in texts], np.int64)
    order = np.argsort(codes)
    keys = torch.from_numpy(codes[order]).to(device)
    found = torch.from_numpy(np.asarray(values, np.int64)[order]).to(device)

    def lookup(x: torch.Tensor) -> torch.Tensor:
        code = (x.double() * 1e6).round().clamp(-_FAR, _FAR).long()
        code = torch.where((code == 0) & x.signbit(), _MINUS_ZERO, code)
        at = torch.searchsorted(keys, code).clamp(max=len(keys) - 1)
        return torch.where(keys[at] == code, found[at], 0)

    return lookup
