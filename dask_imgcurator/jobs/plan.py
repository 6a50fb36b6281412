"""Settle, before a run, which model and heads it uses and which file holds the scores of which shard."""

from __future__ import annotations

import hashlib
import importlib.util
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models import heads, starter
from ..monitor import Monitor
from ..steps import score
from ..storage import files

__all__ = ["choose_heads", "choose_model", "model_notes", "score_files"]


#: Default model where its weights can be had; elsewhere the starter.
DEFAULT_MODEL = ("ViT-L-14", "openai")


#: The heads that were trained on each of OpenAI's models, by the beginning of open_clip's name.
_HEADS_OF = {"ViT-L-14": "l14", "ViT-B-32": "b32", "ViT-B-16": "b16"}


def choose_model(model: str | None, pretrained: str | None, monitor: Monitor) -> tuple[str, str | None]:
    """Settle the model: the one asked for, or the default where its weights can be had, or the starter."""
    if model is not None:
        return model, pretrained
    if pretrained is not None:
        raise ValueError(f"pretrained={pretrained!r} needs a model: say which architecture the weights are of")
    name, tag = DEFAULT_MODEL
    if _can_have(name, tag):
        return name, tag
    monitor.note(
        f"The weights of {name} ({tag}) are not on this machine and cannot be downloaded: using the model 'starter'."
    )
    return "starter", None


def model_notes(model: str | None, pretrained: str | None) -> list[str]:
    """What a user must know of scores that a model made."""
    if model == "starter":
        return [starter.NOTICE]
    if str(pretrained).startswith("random"):
        return [f"{model} has random weights ({pretrained}): scores mean nothing; this is for benchmarks and tests."]
    if model and pretrained and Path(pretrained).is_file() and _has_quick_twin(model):
        return [
            f"The checkpoint {Path(pretrained).name} is run with GELU, as {model} is: if it descends from "
            f"OpenAI's weights, the model is {model}-quickgelu."
        ]
    return []


def _has_quick_twin(model: str) -> bool:
    """Whether open_clip lists the architecture with QuickGELU too; without importing it, which takes seconds."""
    spec = importlib.util.find_spec("open_clip")
    name = f"{model.replace('/', '-')}-quickgelu.json"
    return (
        spec is not None and spec.origin is not None and (Path(spec.origin).parent / "model_configs" / name).is_file()
    )


def _can_have(model: str, tag: str) -> bool:
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


def choose_heads(
    model: str, pretrained: str | None, aesthetic: str, nsfw: str, weights_dir: str | None, monitor: Monitor
) -> tuple[score.HeadUse, ...]:
    """Settle which heads a model's embeddings go through.

    ``auto`` takes the head that was trained on the model: an embedding's width alone would give B/16 the heads of
    B/32, and any other model of that width heads that mean nothing for it.
    """
    family = next((f for name, f in _HEADS_OF.items() if model == name or model.startswith(f"{name}-quickgelu")), None)
    uses = []
    for kind, asked in (("aesthetic", aesthetic), ("nsfw", nsfw)):
        head = asked
        if asked == "none":
            continue
        if asked == "auto":
            if model == "starter":
                head = f"{kind}-starter"
            else:
                fitting = [h.name for h in heads.HEADS.values() if h.kind == kind and h.name.endswith(f"-{family}")]
                # v2 before v1.
                head = max(fitting, default="")
                if not head:
                    monitor.note(
                        f"No {kind} head was trained on {model}: no {kind}_score "
                        f"(--{kind}-head NAME takes one all the same)."
                    )
                    continue
        else:
            spec = heads.HEADS.get(head)
            heads.resolve(kind, head, spec.width if spec else 0)  # type: ignore[arg-type]
        if model != "starter" and pretrained != "openai" and not str(pretrained).startswith("random"):
            monitor.note(
                f"The head {head} was trained on OpenAI's weights; "
                f"with {model} ({pretrained}) its scores are on another scale."
            )
        uses.append(score.HeadUse(kind, head, "embedding", weights_dir, "float16" if kind == "nsfw" else None))  # type: ignore[arg-type]
    return tuple(uses)


def score_files(urls: Sequence[str], folder: str, storage_options: Mapping[str, Any] | None) -> dict[str, str]:
    """Name the score file of each shard.

    A shard gets its stem. Where that name is taken, by another shard of this run or by a file that an earlier run
    made of another shard, a hash of its URL is added; so a name never changes once it is given.
    """
    taken: dict[str, str] = {}
    for url in files.list_files(folder, ".parquet", storage_options):
        provenance = score.file_provenance(url, storage_options)
        if provenance is not None and "shard" in provenance:
            taken[url.rpartition("/")[2]] = provenance["shard"]
    by_shard = {shard: name for name, shard in taken.items()}
    out = {}
    for url in urls:
        name = by_shard.get(url)
        if name is None:
            base = url.rstrip("/").rpartition("/")[2]
            stem = base[: -len(".tar")] if base.endswith(".tar") else base
            if stem.startswith("."):
                stem = f"_{stem}"  # a hidden file is no part of a score table
            name = f"{stem}.parquet"
            if taken.get(name, url) != url:
                name = f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"
            taken[name] = url
        out[url] = files.join(folder, name)
    return out
