"""Everything specific to open_clip: names and tags, random weights, activations, tokenizers, and its logging."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import logging
import re
import socket
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images.preprocess import Preprocess
from . import ModelError

if TYPE_CHECKING:
    import torch

    from .encoders import EncoderSpec

_RANDOM = re.compile(r"random:(\d+)")

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def resolve(model: str, pretrained: str | None) -> tuple[str, str | Path]:
    """Check the names of a model and its weights: open_clip's, and a tag, ``random:SEED`` or a checkpoint's path."""
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
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not pretrained:
        raise ModelError(
            f"model {model!r} needs pretrained=: one of {', '.join(tags) or '(no published tags)'}, "
            "a checkpoint's path, or random:SEED"
        )
    if pretrained.startswith("random"):
        if not _RANDOM.fullmatch(pretrained):
            raise ModelError(f"cannot read {pretrained!r}: write random weights as random:SEED, for example random:0")
        return model, pretrained
    if pretrained in tags or pretrained.replace("-", "_").lower() in tags:
        return model, pretrained
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise ModelError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model!r} "
            f"(tags: {', '.join(tags) or 'none'}; or random:SEED)"
        )
    return model, path


def width_of(model: str) -> int:
    """Width of a listed model's embeddings, from its configuration."""
    import open_clip

    return int(open_clip.get_model_config(model)["embed_dim"])


def needs_quick_gelu(model: str, pretrained: str) -> bool:
    """Whether published weights were trained with QuickGELU, whatever the model's name says.

    OpenAI's were, and LAION's heads were fitted to those. open_clip 3 builds ``ViT-L-14`` with GELU for all weights and
    only warns about a mismatch; the embeddings then differ from those of the published model.
    """
    import open_clip

    return bool((open_clip.get_pretrained_cfg(model, pretrained) or {}).get("quick_gelu"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip and its downloads, which log random weights and every attempt; the errors say enough."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@dataclass(frozen=True)
class Loaded:
    """A model of open_clip, and what an encoder must know about it."""

    model: Any
    preprocess: Preprocess
    width: int
    provenance: dict[str, Any]


def load(spec: EncoderSpec, device: str) -> Loaded:
    """Load a model; raise `ModelError` if its weights are unavailable."""
    import open_clip
    import torch

    random = _RANDOM.fullmatch(spec.pretrained)
    quick = needs_quick_gelu(spec.model, spec.pretrained)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            if random:
                torch.manual_seed(int(random[1]))
            model = open_clip.create_model(
                spec.model,
                pretrained=None if random else spec.pretrained or None,
                precision=_PRECISIONS[spec.dtype],
                device=device,
                force_quick_gelu=quick,
            )
    except Exception as err:
        remedy = (
            "The file must be a checkpoint of this architecture, as torch.save or safetensors write it."
            if spec.weights_sha256
            else "Without network, give a checkpoint's path, or use the model 'starter'."
        )
        why = f"{type(err).__name__}: {textwrap.shorten(str(err), 300)}"
        if "weights_only" in str(err):  # torch's advice to set it to False would run code in the file
            why = "it holds more than tensors, and code in a checkpoint is never run"
        raise ModelError(f"cannot load {spec.model!r} with pretrained={spec.pretrained!r}: {why}. {remedy}") from err
    model.eval()
    for module in model.modules():
        if isinstance(module, open_clip.transformer.QuickGELU):
            module.forward = _quick_gelu
        elif isinstance(module, torch.nn.MultiheadAttention) and spec.dtype == "float32":
            module.forward = functools.partial(_attention, module)  # type: ignore[method-assign]
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    with torch.inference_mode():
        probe = torch.zeros((1, 3, *preprocess.size), dtype=getattr(torch, spec.dtype), device=device)
        width = int(model.encode_image(probe).shape[-1])
    provenance = {
        "open_clip": open_clip.__version__,
        "quick_gelu": quick or bool((open_clip.get_model_config(spec.model) or {}).get("quick_gelu")),
    }
    if random:
        provenance["torch"] = torch.__version__
    elif not spec.weights_sha256:
        provenance["weights_sha256"] = _state_sha256(model)
    return Loaded(model, preprocess, width, provenance)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """QuickGELU with one temporary tensor; open_clip's uses three and spends half its time allocating them."""
    out = 1.702 * x
    return out.sigmoid_().mul_(x)


def _attention(
    own: torch.nn.MultiheadAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of images to themselves in one kernel; on a CPU, torch's module writes all its weights to memory."""
    import torch

    plain = options == {"need_weights": False, "attn_mask": None} and own.batch_first and own.in_proj_weight is not None
    if not (plain and q is k is v):
        return type(own).forward(own, q, k, v, **options)
    functional = torch.nn.functional
    heads = functional.linear(q, own.in_proj_weight, own.in_proj_bias).unflatten(-1, (3, own.num_heads, -1))
    out = functional.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
    return own.out_proj(out.transpose(1, 2).flatten(2)), None


def _state_sha256(model: torch.nn.Module) -> str:
    """Hash a published model's parameters: open_clip does not say which file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer(model: str) -> Any:
    """Load the tokenizer of a model; raise `ModelError` if it is unavailable."""
    import open_clip

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_clip.get_tokenizer(model)
    except ImportError as err:
        raise ModelError(
            f"the tokenizer of {model!r} comes from another package: {err}. pip install transformers sentencepiece"
        ) from err
    # Hubs and tokenizers fail in many ways.
    except Exception as err:
        raise ModelError(
            f"cannot load the tokenizer of {model!r}: {type(err).__name__}: {textwrap.shorten(str(err), 300)}. It is "
            "downloaded from the Hugging Face Hub: let this machine reach it once, copy its cache here, or use a model "
            "with open_clip's own tokenizer, such as ViT-B-32 or ViT-L-14"
        ) from err


def has_quick_twin(model: str) -> bool:
    """Whether open_clip also lists the architecture with QuickGELU; without the import, which takes seconds."""
    spec = importlib.util.find_spec("open_clip")
    name = f"{model.replace('/', '-')}-quickgelu.json"
    return (
        spec is not None and spec.origin is not None and (Path(spec.origin).parent / "model_configs" / name).is_file()
    )


def can_have(model: str, tag: str) -> bool:
    """Whether open_clip would find these weights in its cache or on the network."""
    import huggingface_hub
    import open_clip

    cfg = open_clip.get_pretrained_cfg(model, tag)
    repository = cfg.get("hf_hub", "").rstrip("/")
    if repository:
        for filename in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
            if isinstance(huggingface_hub.try_to_load_from_cache(repository, filename), str):
                return True
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True
