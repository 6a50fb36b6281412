"""Add columns to a score table, from its embeddings and captions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.run import Place
from ..models import head_files
from ..monitor import Monitor
from ..runs.records import made_of, replacing
from ..similarity.clusters import assign_clusters
from ..steps import captions
from ..steps import heads as steps_heads
from ..steps.prompts import score_prompts
from ..steps.read import URLPath
from ..steps.score_table import check_makers, model_name, open_scores
from .tables import open_table, targets_of, write_table


def add_columns(
    scores: URLPath,
    out: str | os.PathLike[str],
    *,
    heads: Sequence[str | os.PathLike[str]] = (),
    clip_score: bool = False,
    prompts: Mapping[str, Any] | None = None,
    caption_stats: bool = False,
    language: bool = False,
    aesthetic_head: str | None = None,
    nsfw_head: str | None = None,
    clusters: int | None = None,
    reference: URLPath | None = None,
    seed: int = 0,
    weights_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> list[str]:
    """Add columns to a score table, from its embeddings and captions; no image is decoded.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the extended table.
    heads : sequence of str or path
        Heads of your own: files, or registered names; see `steps_heads.score_head`.
    clip_score : bool
        Cosine of caption and image, by the text tower of the table's own model.
    prompts : mapping, optional
        See `score_prompts`.
    caption_stats, language : bool
        Whether to add the length and the language of captions.
    aesthetic_head, nsfw_head : str, optional
        A published head, see `score_aesthetic`.
    clusters : int, optional
        Number of clusters of the embeddings, see `assign_clusters`.
    reference : str, path, or sequence of them, optional
        Score table of another dataset, made by the same model, whose rows are counted per cluster.
    seed : int
        Seed of the clusters.
    weights_dir : path, optional
        Folder with the published heads.
    overwrite : bool
        Whether another result in `out` is replaced completely.
    storage_options, backend, client, monitor
        As for `select_rows`; if texts need a model, new worker processes load it.

    Returns
    -------
    list of str
        The added columns. Those that the table already had are left unchanged.

    Raises
    ------
    FileExistsError
        As `select_rows`.
    ValueError
        If nothing is requested, several models made the embeddings, or texts need the embeddings' model and it is
        unknown.
    """
    light = not (clip_score or prompts)
    with open_table(scores, storage_options, backend, client, monitor, light=light) as table:
        df, there, added = table.df, set(table.df.columns), {}
        vectors = heads or clip_score or prompts or aesthetic_head or nsfw_head or clusters
        encoder = table.made(*(["embedding"] if vectors else [])).get("encoder", {})
        for head in map(steps_heads.resolve_head, heads):
            if head.column in added:
                raise ValueError(f"two heads give the column {head.column!r}: save one with another column name")
            if head.column not in there:
                df = steps_heads.score_head(df, head)
                added[head.column] = head_files.provenance(head)
        if aesthetic_head and "aesthetic_score" not in there:
            df = steps_heads.score_aesthetic(df, aesthetic_head, weights_dir=weights_dir)
            added["aesthetic_score"] = {"head": aesthetic_head}
        if nsfw_head and "nsfw_score" not in there:
            df = steps_heads.score_nsfw(df, nsfw_head, weights_dir=weights_dir)
            added["nsfw_score"] = {"head": nsfw_head}
        if clip_score and "clip_score" not in there:
            df = captions.score_clip(df, *_text_model(encoder))
            added["clip_score"] = {"encoder": encoder}
        if prompts and (missing := {n: p for n, p in prompts.items() if f"{n}_score" not in there}):
            df = score_prompts(df, missing, *_text_model(encoder))
            added |= {f"{name}_score": {"prompts": p, "encoder": encoder} for name, p in missing.items()}
        if (caption_stats or language) and "caption_words" not in there:
            df = captions.caption_stats(df, language=language)
            added |= {name: {} for name in df.columns if str(name).startswith("caption_") and name not in there}
        if clusters is not None and "cluster" not in there:
            other = None if reference is None else _same_model(reference, encoder, storage_options)
            df = assign_clusters(df, clusters, reference=other, seed=seed)
            made_by = {"clusters": clusters, "seed": seed, "reference": reference, "encoder": encoder}
            added |= {name: made_by for name in df.columns if str(name).startswith("cluster") and name not in there}
        new = [name for name in df.columns if name not in there]
        if not new:
            raise ValueError(f"nothing to add: the table already has these columns ({', '.join(sorted(there))})")
        targets = targets_of(table, out)
        note = json.loads(json.dumps(added, default=str))
        made = made_of("add", scores, note, ", ".join(new))
        with replacing(os.fspath(out), made, targets, overwrite, table.scores.storage_options):
            write_table(table, targets, {"added": note}, df)
    return new


def _same_model(reference: URLPath, encoder: Mapping[str, Any], storage_options: Mapping[str, Any] | None) -> Any:
    """Open another score table; ValueError if another model made its embeddings."""
    table = open_scores(reference, storage_options)
    other = check_makers(table, ["embedding"]).get("encoder", {})
    if other != encoder:
        raise ValueError(
            f"the reference's embeddings are from {model_name({'encoder': other})}, the table's from "
            f"{model_name({'encoder': encoder})}: they cannot be compared"
        )
    return table.frame("pandas")


def _text_model(encoder: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name and weights of the model that made a table's embeddings."""
    if "model" not in encoder:
        raise ValueError(
            "the score table does not record which model made its embeddings, which is needed to compare texts with "
            "them: use a table of `score` or `curate` (or call score_clip with model= and pretrained=)"
        )
    return str(encoder["model"]), encoder.get("pretrained") or None
