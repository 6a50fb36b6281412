"""Published aesthetic and NSFW heads: which model each was fitted to, its file, and how it scores.

A head maps a CLIP image embedding to one number. LAION published these:

- **aesthetic v1** (``sa_0_4_*_linear``), a linear layer, for ViT-B/32, B/16 and L/14;
- **aesthetic v2** (``sac+logos+ava1-l14-linearMSE``), for L/14: five linear layers without activations
  between, hence one affine map. v1 and v2 have different scales: their scores are not comparable.
- **NSFW**, one AutoKeras classifier each for L/14 and B/32. AutoKeras treated some columns as categories and
  looks them up by the text of their value, see `savedmodel.ranks`.

The two ``starter`` heads belong to the starter model, whose embeddings are in ViT-B/32's space. They are
previews, good enough to see a pipeline work, but **not** for safety decisions.

A new head is one entry of `HEADS`.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ..engine.cache import cache
from . import starter, weights
from .savedmodel import SavedModelError, read_autokeras, scorer
from .weights import WeightsError, WeightsFile

if TYPE_CHECKING:
    import torch

Kind = Literal["aesthetic", "nsfw"]

#: From embeddings (n, width) to scores (n,), on one device.
Score = Callable[["torch.Tensor"], "torch.Tensor"]

#: Weight (out, in) and bias (out,) of linear layers, first to last.
Layers = list[tuple[NDArray[np.float64], NDArray[np.float64]]]

#: Rows scored at a time; limits the memory for double precision, whatever the partition's size.
_BLOCK = 65_536

#: Norms accepted as "L2-normalised, then rounded or averaged". CLIP's output before normalisation has a norm of 8 to 20
#: and would score 20 and more; LAION's reference inputs for NSFW go up to 1.29.
_NORMS = (0.5, 2.0)


class HeadError(ValueError):
    """A head does not exist, does not fit the embeddings, or cannot score its input."""


# --- the registry -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadSpec:
    """A head that can be requested by name."""

    name: str
    kind: Kind
    #: Model whose embeddings it was fitted to, in open_clip's spelling; those of another model give nonsense.
    family: str
    width: int
    source: str
    #: None if the weights ship with this package.
    weights: WeightsFile | None = None

    @property
    def column(self) -> str:
        """Column that it fills."""
        return f"{self.kind}_score"

    @property
    def embedder(self) -> str:
        """The model's name for people to read."""
        return "dask_imgcurator starter" if self.preview else f"OpenAI CLIP {'/'.join(self.family.rsplit('-', 1))}"

    @property
    def preview(self) -> bool:
        """Whether it is a preview, not for decisions."""
        return self.family == "starter"

    @property
    def round_to(self) -> Literal["float16"] | None:
        """Type to which embeddings should be rounded first; see `load_head`."""
        return "float16" if self.kind == "nsfw" else None


@dataclass(frozen=True)
class _Origin:
    """Where heads of one kind were published, pinned to a commit: these repositories have moved files before."""

    kind: Kind
    repository: str
    commit: str
    license: str

    def head(self, name: str, family: str, filename: str, sha256: str) -> HeadSpec:
        path = filename.replace("+", "%2B")
        url = f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{path}"
        file = WeightsFile(self.kind, filename, sha256, url, self.license)
        return HeadSpec(name, self.kind, family, _WIDTHS[family], f"https://github.com/{self.repository}", file)


_WIDTHS = {"ViT-L-14": 768, "ViT-B-32": 512, "ViT-B-16": 512}

_V1 = _Origin("aesthetic", "LAION-AI/aesthetic-predictor", "6d122adad522ab246644d9dc1c6d7a3810ee255f", "MIT")
_V2 = _Origin(
    "aesthetic",
    "christophschuhmann/improved-aesthetic-predictor",
    "6934dd81792f086e613a121dbce43082cb8be85e",
    "Apache-2.0",
)
_NSFW = _Origin("nsfw", "LAION-AI/CLIP-based-NSFW-Detector", "d6bb8fe31fd4aecbfed7dfb62df4fe5858bfc014", "MIT")
_STARTER = "dask_imgcurator, fitted to real CLIP ViT-B/32 embeddings, bias set on the starter model's"

#: All heads by name. If several fit, ``auto`` takes the first.
HEADS: Mapping[str, HeadSpec] = {
    spec.name: spec
    for spec in (
        _V2.head(
            "aesthetic-v2-l14",
            "ViT-L-14",
            "sac+logos+ava1-l14-linearMSE.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
        _V1.head(
            "aesthetic-v1-l14",
            "ViT-L-14",
            "sa_0_4_vit_l_14_linear.pth",
            "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        ),
        _V1.head(
            "aesthetic-v1-b32",
            "ViT-B-32",
            "sa_0_4_vit_b_32_linear.pth",
            "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f",
        ),
        _V1.head(
            "aesthetic-v1-b16",
            "ViT-B-16",
            "sa_0_4_vit_b_16_linear.pth",
            "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0",
        ),
        _NSFW.head(
            "nsfw-l14",
            "ViT-L-14",
            "clip_autokeras_binary_nsfw.zip",
            "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a",
        ),
        _NSFW.head(
            "nsfw-b32",
            "ViT-B-32",
            "clip_autokeras_nsfw_b32.zip",
            "78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b",
        ),
        HeadSpec("aesthetic-starter", "aesthetic", "starter", 512, _STARTER),
        HeadSpec("nsfw-starter", "nsfw", "starter", 512, _STARTER),
    )
}


def for_model(kind: Kind, model: str) -> HeadSpec | None:
    """Return the head that was fitted to a model of open_clip or the starter; None if there is none.

    By width alone, B/16 would get the heads of B/32, and other models heads that are meaningless for them.
    """
    for spec in HEADS.values():
        if spec.kind == kind and (model == spec.family or model.startswith(f"{spec.family}-quickgelu")):
            return spec
    return None


def named(kind: Kind, head: str) -> HeadSpec:
    """Return the head with a name; raise `HeadError` if there is none or it is of another kind."""
    if head not in HEADS:
        close = difflib.get_close_matches(head, HEADS, n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise HeadError(f"unknown {kind} head {head!r}{hint}; there are auto, {_there_are(kind)}")
    if HEADS[head].kind != kind:
        raise HeadError(f"head {head!r} gives {HEADS[head].column}; {kind} heads are auto, {_there_are(kind)}")
    return HEADS[head]


def resolve(kind: Kind, head: str, width: int) -> HeadSpec:
    """Choose a head for embeddings of a width: the named one, or for ``"auto"`` the first that accepts the width."""
    if head == "auto":
        for spec in HEADS.values():
            if (spec.kind, spec.width) == (kind, width):
                return spec
        raise HeadError(
            f"no {kind} head takes embeddings of width {width}; there are {_there_are(kind)}; "
            f"embed with a model whose width fits one of them"
        )
    spec = named(kind, head)
    if spec.width != width:
        raise HeadError(
            f"head {head!r} takes embeddings of width {spec.width} ({spec.embedder}), these have {width}; "
            f"{kind} heads are {_there_are(kind)}"
        )
    return spec


def _there_are(kind: Kind) -> str:
    return ", ".join(f"{spec.name} ({spec.width})" for spec in HEADS.values() if spec.kind == kind)


def provenance(spec: HeadSpec) -> dict[str, str]:
    """Return what identifies a head's output: ``name``, ``sha256`` of its file, and ``source``."""
    sha256 = spec.weights.sha256 if spec.weights else starter.arrays_sha256()
    return {"name": spec.name, "sha256": sha256, "source": spec.source}


# --- loaded heads -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A loaded head; made by `load_head`."""

    spec: HeadSpec
    device: str
    round_to: str | None
    _score: Score = field(repr=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Score L2-normalised embeddings, floating (n, width) on the head's device: float32 (n,).

        Rows whose norm is not finite get NaN. A wrong shape, dtype or device raises `HeadError`, and so does a norm
        outside 0.5 to 2: such embeddings were not normalised, and their scores would be nonsense.
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
            # Replaced by zeros, because NaN becomes a different integer on each device.
            x = torch.where(good[:, None], x, 0.0)
        if self.round_to == "float16":
            x = x.half().float()
        scores = self._score(x)
        return scores if all_good else torch.where(good, scores, torch.nan)


def load_head(spec: HeadSpec, weights_dir: str | None = None, device: str = "cpu", round_to: str | None = None) -> Head:
    """Load a head, or return the one that this process has.

    `weights_dir` is searched first, see `weights.find`. `round_to` is ``"float16"`` or None: LAION's NSFW heads were
    fitted to float16 embeddings, and their lookup of categorical columns finds only values that float16 can represent.
    """
    import torch

    if round_to not in ("float16", None):
        raise HeadError(f'round_to={round_to!r}: only "float16" and None are known')
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())

    def make() -> Head:
        return Head(spec, str(where), round_to, _load(spec, weights_dir, str(where)))

    # The folder is part of the key: if it does not exist, every process must raise.
    return cache.get("head", (spec, weights_dir, str(where), round_to), make)


def _load(spec: HeadSpec, weights_dir: str | None, device: str) -> Score:
    if spec.weights is None:
        arrays = starter.load_arrays()
        weight, bias = arrays[f"{spec.kind}_w"].astype(np.float64), float(arrays[f"{spec.kind}_b"].item())
        return _affine(weight, bias, device, sigmoid=spec.kind == "nsfw")
    data = weights.read(spec.weights, weights_dir)
    if spec.weights.filename.endswith(".pth"):
        return _affine(*_collapse(read_pth(data, spec.weights.filename)), device)
    try:
        return scorer(read_autokeras(data), device)
    except SavedModelError as error:
        raise WeightsError(f"{spec.weights.filename}: {error}") from error


# --- linear heads -----------------------------------------------------------------------------------


def read_pth(data: bytes, where: str) -> Layers:
    """Read the linear layers in a ``.pth`` file, a pickle, with torch's reader that runs no code in it.

    Raises `WeightsError` for anything but plain tensors, `HeadError` for anything but linear layers.
    """
    import torch

    try:
        # The v2 file holds CUDA tensors.
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        arrays = {str(name): tensor.detach().double().numpy() for name, tensor in state.items()}
    # A damaged pickle can fail in any way. Torch's own message is left out: it advises weights_only=False.
    except Exception as error:
        raise WeightsError(f"{where} is not a file of plain tensors ({type(error).__name__})") from error
    return linear_layers(arrays, where)


def linear_layers(state: Mapping[str, NDArray[np.float64]], where: str) -> Layers:
    """Return the layers of a state dict in order; its keys are ``weight``, ``layers.10.bias`` …, maybe with gaps."""
    parts = {key: re.fullmatch(r"(?:(.*)\.)?(weight|bias)", key) for key in state}
    strange = [key for key, part in parts.items() if not part or state[key].ndim != {"weight": 2, "bias": 1}[part[2]]]
    if strange or not state:
        found = f"{strange[0]} of shape {state[strange[0]].shape}" if strange else "nothing"
        raise HeadError(f"{where} holds {found}: a head consists of linear layers only (2-D weight, 1-D bias)")
    layers: Layers = []
    for name in sorted({part[1] or "" for part in parts.values() if part}, key=_natural):
        prefix = f"{name}." if name else ""
        if f"{prefix}weight" not in state:
            raise HeadError(f"{where} holds {prefix}bias without {prefix}weight: a head consists of linear layers only")
        weight = state[f"{prefix}weight"]
        layers.append((weight, state.get(f"{prefix}bias", np.zeros(len(weight)))))
    return layers


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort ``net.10`` after ``net.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _collapse(layers: Layers) -> tuple[NDArray[np.float64], float]:
    """Fold linear layers without activations in between into one affine map, in double precision."""
    (weight, bias), *others = layers
    for kernel, offset in others:
        weight, bias = kernel @ weight, kernel @ bias + offset
    return weight[0], float(bias[0])


def _affine(weight: NDArray[np.float64], bias: float, device: str, sigmoid: bool = False) -> Score:
    import torch

    w = torch.from_numpy(weight).to(device)

    def score(x: torch.Tensor) -> torch.Tensor:
        # In double precision, a row's score depends neither on its batch nor on TF32.
        y = x.double() @ w + bias
        return (y.sigmoid() if sigmoid else y).float()

    return score
