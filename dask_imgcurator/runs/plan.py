"""Resolve, before scoring, what to do: model, heads, columns, and each shard's score file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..engine.backend import get_backend
from ..engine.cluster import backend_for
from ..engine.run import Place, starts_here
from ..images import quality
from ..json_fields import FIELD_TYPES
from ..models import heads, open_clip, starter, weights
from ..models.encoders import EncoderSpec, load_encoder, width_of
from ..monitor import Monitor
from ..schema import COLUMNS, kind_of
from ..select.where import Where, parse_where
from ..steps.embed import EmbedSpec, embed_spec
from ..steps.heads import HeadUse
from ..steps.read import ReadSpec, peek, read_spec
from ..steps.stream import settle_decoder
from ..storage import files
from ..storage.urls import check_shards, packed_beside


@dataclass(frozen=True)
class ScoreOptions:
    """Arguments of the expensive half; see `curate`."""

    model: str | None = None
    pretrained: str | None = None
    columns: Sequence[str] | Mapping[str, str] = ()
    caption: str | None = None
    image: str | Sequence[str] = ()
    aesthetic_head: str = "auto"
    nsfw_head: str = "auto"
    weights_dir: str | os.PathLike[str] | None = None
    batch_size: int | None = None
    dtype: str | None = None
    measures: bool = True
    backend: str | None = None
    storage_options: Mapping[str, Any] | None = None
    out_options: Mapping[str, Any] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The options for a run's record, without storage options, which may hold credentials."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_options")}


@dataclass(frozen=True)
class Target:
    """A shard, its score file, and the version to score; empty if it cannot be read now."""

    shard: str
    url: str
    version: str


@dataclass(frozen=True)
class ScorePlan:
    """What to do with each shard; travels to the workers."""

    read: ReadSpec
    embed: EmbedSpec
    heads: tuple[HeadUse, ...]
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of all score files, once known

    @property
    def kinds(self) -> dict[str, str]:
        """Columns of the score table and their kinds."""
        names = [*self.read.schema.names, *self.embed.schema.names, *(u.column for u in self.heads)]
        own = {f.column: FIELD_TYPES.get(f.type or f.likely or "", pa.null()) for f in self.read.fields}
        types = {n: COLUMNS[n].type if n in COLUMNS else own[n] for n in dict.fromkeys(names)}
        return {name: kind_of(type_) for name, type_ in types.items()}

    @property
    def chosen(self) -> tuple[str, ...]:
        """Columns requested by the user."""
        return (*(f.column for f in self.read.fields), *(["caption"] if self.read.caption is not None else []))

    @property
    def planned(self) -> pa.Schema:
        """Types of JSON fields for expressions, although a shard's values may have others."""
        return pa.schema([(f.column, FIELD_TYPES[f.likely]) for f in self.read.fields if f.likely])

    def provenance_of(self, target: Target) -> dict[str, Any]:
        """Provenance of a shard's score file."""
        return {**self.provenance, "shard": target.shard, "fingerprint": target.version}

    def settled(self, provenance: Mapping[str, Any], topic: str) -> ScorePlan:
        """Return a plan in which all workers use what the first one has, and report progress and faults."""
        encoder = replace(self.embed.encoder, dtype=provenance["encoder"]["dtype"])
        embed = replace(self.embed, encoder=encoder, decoder=provenance["decode"]["decoder"], topic=topic)
        read = replace(self.read, strict=True)
        return replace(self, read=read, embed=replace(embed, strict=True), provenance=provenance)

    @property
    def isolated(self) -> ScorePlan:
        """The plan with images decoded in a separate process."""
        return replace(self, embed=replace(self.embed, isolate=True))


def make_plan(
    urls: Sequence[str], options: ScoreOptions, where: str | None, monitor: Monitor, client: Place = None
) -> tuple[ScorePlan, Where | None]:
    """Resolve what to do with shards, and parse the expression against the columns they will have."""
    check_shards(urls, options.storage_options)
    if packed := packed_beside(urls):
        monitor.note(
            f"Compressed tars are skipped ({len(packed):,} in all); unpack them first: {', '.join(packed[:3])}"
        )
    model, pretrained = choose_model(options.model, options.pretrained, monitor)
    backend = backend_for(options.backend, client)
    read = read_spec(options.columns, options.caption, options.storage_options, backend, options.image)
    types = peek(urls, read)
    fields = tuple(f if f.type else replace(f, likely=types[f.name]) for f in read.fields)
    read = replace(read, fields=fields, notes=True)
    embed = embed_spec(
        model,
        pretrained,
        batch_size=options.batch_size,
        dtype=options.dtype,
        measures=options.measures,
        storage_options=options.storage_options,
    )
    uses = choose_heads(model, pretrained, options, monitor)
    plan = ScorePlan(read, embed, uses, dict(options.out_options or {}))
    # Report a mistake in the expression now, not after scoring.
    parsed = parse_where(where, plan.kinds) if where is not None else None
    _check_heads(uses, embed.encoder, starts_here(client))
    if parsed is not None and model == "starter" and "nsfw_score" in parsed.columns:
        monitor.note(
            "The starter's nsfw_score stays near 0 for every picture: a condition on it removes next to nothing."
        )
    for note in model_notes(model, pretrained):
        monitor.note(note)
    return plan, parsed


def describe(plan: ScorePlan) -> dict[str, Any]:
    """Load, on a worker, everything that a plan needs; returns the provenance of its results there."""
    import torch

    backend = get_backend(plan.read.backend)
    encoder = load_encoder(plan.embed.encoder, backend.device)
    used = {}
    for use in plan.heads:
        spec = heads.resolve(use.kind, use.head, encoder.width)
        heads.load_head(spec, use.weights_dir, backend.device, use.round_to)
        used[use.column] = {**heads.provenance(spec), "round_to": use.round_to}
    decoder = settle_decoder(plan.embed.decoder, backend.decoder_device)
    versions = {"dask_imgcurator": version("dask-imgcurator"), "torch": torch.__version__}
    if decoder == "dali":
        import nvidia.dali

        versions["dali"] = nvidia.dali.__version__
    return {
        "encoder": encoder.provenance,
        "heads": used,
        "decode": {
            "decoder": decoder,
            "device": backend.decoder_device,
            "max_pixels": plan.embed.max_pixels,
            "adjust_orientation": plan.embed.adjust_orientation,
            "scale_high_bit_depth": plan.embed.scale_high_bit_depth,
            "measures": quality.provenance() if plan.embed.measures else None,
        },
        "read": {
            "caption": plan.read.caption,
            "fields": {f.column: {"field": f.name, "type": f.type} for f in plan.read.fields},
            "image": list(plan.read.image),
        },
        "versions": versions,
    }


# --- model and heads ------------------------------------------------------------------------------

#: Default model if its weights are available; otherwise the starter.
DEFAULT_MODEL = ("ViT-L-14", "openai")


def choose_model(model: str | None, pretrained: str | None, monitor: Monitor) -> tuple[str, str | None]:
    """Resolve the model: the requested one, else the default if its weights are available, else the starter."""
    if model is not None:
        return model, pretrained
    if pretrained is not None:
        raise ValueError(f"pretrained={pretrained!r} needs a model: name the architecture of the weights")
    name, tag = DEFAULT_MODEL
    if open_clip.can_have(name, tag):
        return name, tag
    monitor.note(
        f"The weights of {name} ({tag}) are not on this machine and cannot be downloaded: using the model 'starter'."
    )
    return "starter", None


def model_notes(model: str | None, pretrained: str | None) -> list[str]:
    """Caveats about a model's scores."""
    if model == "starter":
        return [starter.NOTICE]
    if str(pretrained).startswith("random"):
        return [f"{model} has random weights ({pretrained}): scores are meaningless, for benchmarks and tests only."]
    if model and pretrained and Path(pretrained).is_file() and open_clip.has_quick_twin(model):
        return [
            f"The checkpoint {Path(pretrained).name} runs with GELU, the activation of {model}: if it derives from "
            f"OpenAI's weights, use {model}-quickgelu."
        ]
    return []


def choose_heads(model: str, pretrained: str | None, options: ScoreOptions, monitor: Monitor) -> tuple[HeadUse, ...]:
    """Resolve which heads score a model's embeddings; ``auto`` takes the one trained on the model."""
    uses = []
    weights_dir = weights.resolve_dir(options.weights_dir)
    asked_for: dict[heads.Kind, str] = {"aesthetic": options.aesthetic_head, "nsfw": options.nsfw_head}
    for kind, asked in asked_for.items():
        if asked == "none":
            continue
        spec = heads.for_model(kind, model) if asked == "auto" else heads.named(kind, asked)
        if spec is None:
            monitor.note(
                f"No {kind} head was trained on {model}: no {kind}_score (--{kind}-head NAME uses one anyway)."
            )
            continue
        if model != "starter" and pretrained != "openai" and not str(pretrained).startswith("random"):
            monitor.note(
                f"The head {spec.name} was trained on OpenAI's weights; "
                f"with {model}{f' ({pretrained})' if pretrained else ''} its scores have another scale."
            )
        uses.append(HeadUse(kind, spec.name, "embedding", weights_dir, spec.round_to))
    return tuple(uses)


def _check_heads(uses: Sequence[HeadUse], encoder: EncoderSpec, here: bool) -> None:
    """Raise now what workers would find once their model is loaded; `here`: weights are read on this machine."""
    if (width := width_of(encoder)) is not None:
        for use in uses:
            heads.resolve(use.kind, use.head, width)
    for use in uses:
        if here and (file := heads.named(use.kind, use.head).weights) is not None:
            weights.read(file, use.weights_dir)


# --- files ----------------------------------------------------------------------------------------


def score_files(urls: Sequence[str], folder: str, there: Mapping[str, str]) -> dict[str, str]:
    """Name each shard's score file; `there`: existing files by shard."""
    # A shard gets its stem. If that name is taken, by another shard of this run or by an earlier run's file for another
    # shard, a hash of its URL is appended; so a name never changes once given.
    by_shard = {shard: url.rpartition("/")[2] for shard, url in there.items()}
    taken = {name: shard for shard, name in by_shard.items()}
    out = {}
    for url in urls:
        name = by_shard.get(url)
        if name is None:
            path = url.partition("?")[0] if "://" in url else url  # the query of a URL may be a signature
            base = path.rstrip("/").rpartition("/")[2]
            stem = base[: -len(".tar")] if base.endswith(".tar") else base
            if stem.startswith("."):
                stem = f"_{stem}"  # hidden files are not part of a score table
            name = f"{stem}.parquet"
            if taken.get(name, url) != url:
                name = f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"
            taken[name] = url
        out[url] = files.join(folder, name)
    return out
