"""The cheap half as whole jobs on a score table: choose rows, drop duplicates, add columns, write other layouts.

Each takes a score table (a folder of files, one a shard) and leaves the files of its result under the same names, so
that any of them goes on from the result of another. No image is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dask
import pyarrow as pa
from distributed import Client, as_completed, get_client

from ..duplicates import deduplication
from ..duplicates import index as dedup_index
from ..engine.backend import get_backend, resolve_name
from ..engine.runner import JobError, lend_client
from ..exports import exports
from ..models import head_files
from ..monitor import Monitor
from ..results import Counts
from ..schema import kinds_of_schema
from ..select import selection
from ..select import where as filters
from ..steps import collection, own_heads, score, text_steps
from ..storage import files

__all__ = [
    "Place",
    "Table",
    "add_columns",
    "drop_duplicates",
    "export_scores",
    "opened",
    "select_rows",
    "steps_of",
]


@dataclass(frozen=True)
class Place:
    """Where a job runs and by what it reads; every field is optional.

    Attributes
    ----------
    storage_options : mapping
        For the fsspec file systems of the tables.
    backend : {"auto", "cudf", "pandas"}
        Of the frames; by default `imgcurator.backend`.
    client, scheduler, n_workers
        A `distributed.Client`, the address of a scheduler, or a new cluster with so many worker processes. By default
        threads of this process do it: there is no model to load, and most of the work lets go of the interpreter.
    monitor : Monitor
        Is told how the run goes on.
    """

    storage_options: Mapping[str, Any] | None = None
    backend: str | None = None
    client: Client | None = None
    scheduler: str | None = None
    n_workers: int | None = None
    monitor: Monitor = field(default_factory=Monitor)


@dataclass(frozen=True)
class Table:
    """An open score table.

    Attributes
    ----------
    urls : list of str
        Its files.
    read : ScoreFiles
        How they are read.
    df : dask DataFrame
        A partition a file.
    schema : pyarrow.Schema
        Of the first file.
    """

    urls: list[str]
    read: score.ScoreFiles
    df: Any
    schema: pa.Schema

    @property
    def encoder(self) -> dict[str, Any]:
        """What the table's first file records of the model; empty for tables of other origin."""
        provenance = score.file_provenance(self.urls[0], self.read.storage_options) or {}
        return dict(provenance.get("encoder", {}))


@contextmanager
def opened(scores: collection.URLPath, place: Place, light: bool = True) -> Iterator[Table]:
    """Open a score table, with a Dask client to compute on; `light`: no model will be loaded there."""
    backend = resolve_name(place.backend)
    options = dict(place.storage_options or {})
    urls = collection.score_urls(scores, options)
    schema = score.file_schema(urls[0], options)
    read = score.ScoreFiles(backend, tuple(schema.names), options)
    with lend_client(place.client, place.scheduler, place.n_workers, backend, [], place.monitor, light=light):
        yield Table(urls, read, collection.scores_from_files(urls, options, backend), schema)


def _targets(table: Table, out: str | os.PathLike[str]) -> list[str]:
    """Files of a result, named as those of the table."""
    folder = os.fspath(out)
    targets = [files.join(folder, url.rpartition("/")[2]) for url in table.urls]
    if set(targets) & set(table.urls):
        raise ValueError(f"{folder} is the score table itself: choose another folder for the result")
    if len(set(targets)) < len(targets):
        raise ValueError("two files of the score table have one name: give the folders one by one")
    files.make_folder(folder)
    return targets


def _write(df: Any, table: Table, targets: Sequence[str], note: Mapping[str, Any]) -> list[int]:
    """Write each partition as a file; returns their rows."""
    parts = df.to_delayed()
    write = dask.delayed(_write_part, pure=False)
    jobs = [
        write(part, url, target, table.read, note) for part, url, target in zip(parts, table.urls, targets, strict=True)
    ]
    client = get_client()
    futures = client.compute(jobs)
    try:
        for future in as_completed(futures):
            if future.status == "error":
                error = future.exception()
                raise JobError(f"{type(error).__name__}: {error}") from error
        return list(client.gather(futures))
    finally:
        client.cancel(futures, force=True)


def _write_part(frame: Any, url: str, target: str, read: score.ScoreFiles, note: Mapping[str, Any]) -> int:
    provenance = score.file_provenance(url, read.storage_options) or {}
    for name, value in note.items():
        provenance[name] = {**provenance.get(name, {}), **value} if isinstance(value, dict) else value
    metadata = {score.METADATA_KEY: json.dumps(provenance, sort_keys=True)}
    get_backend(read.backend).write_parquet(frame, target, metadata, read.storage_options)
    return len(frame)


# --- choosing -------------------------------------------------------------------------------------


def select_rows(
    scores: collection.URLPath,
    out: str | os.PathLike[str],
    where: str | None = None,
    *,
    top: str | Sequence[str] = (),
    sample: str | None = None,
    **place: Any,
) -> Counts:
    """Copy the rows of a score table that are chosen to another.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the selected rows; files have the names of their sources.
    where : str, optional
        Expression on the columns; rows whose ``status`` is not ``ok`` are never kept.
    top : str or sequence of str
        Of the rows that `where` leaves, the best: ``"30% by clip_score"``, ``"10000 by aesthetic_score"``; one after
        another.
    sample : str, optional
        Of what is left then, a random part: ``"10000"``, ``"10% seed 1"``, ``"20 by cluster"``.
    **place
        See `Place`.

    Returns
    -------
    Counts
        What each condition keeps, alone and in its turn.

    Raises
    ------
    WhereError, SelectionError
        For a mistake in an expression or a step, before anything is done.
    FileNotFoundError
        If there is no such score table.
    ValueError
        If `out` is the score table itself.
    """
    ranked = steps_of(top, sample)
    with opened(scores, Place(**place)) as table:
        steps = ranked if where is None else [filters.parse_where(where, kinds_of_schema(table.schema)), *ranked]
        targets = _targets(table, out)
        settled = selection.settle_steps(table.df, steps)
        counts = _counts(table, steps)
        _write(settled.filter(table.df), table, targets, {"selected": {"steps": [step.text for step in steps]}})
    return counts


def steps_of(top: str | Sequence[str], sample: str | None) -> list[selection.Step]:
    """Read the steps of a selection that rank or draw; mistakes in what is written are told before anything starts."""
    steps: list[selection.Step] = [selection.parse_top(t) for t in ([top] if isinstance(top, str) else top)]
    return steps if sample is None else [*steps, selection.parse_sample(sample)]


def _counts(table: Table, steps: Sequence[selection.Step]) -> Counts:
    by_status: dict[str, int] = {}
    if "status" in table.df.columns:
        found = table.df["status"].value_counts().compute()
        host = found.to_pandas() if hasattr(found, "to_pandas") else found
        by_status = {str(name): int(n) for name, n in host.items()}
    funnel = selection.funnel(table.df, steps)
    own = funnel[~funnel["condition"].isin(["all rows"])]
    conditions = [
        {"condition": row["condition"], "alone": int(row["alone"]), "left": int(row["left"])}
        for row in own.to_dict("records")
        if not str(row["condition"]).startswith("status")
    ]
    return Counts(int(funnel["left"].iloc[0]), by_status, int(funnel["left"].iloc[-1]), conditions)


# --- duplicates -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deduplicated:
    """What `drop_duplicates` found.

    Attributes
    ----------
    rows, kept : int
        Of the table, and of the result (without rows that are not ``ok``).
    counts : list of dict
        For each tier and eps: ``tier``, ``eps``, ``groups``, ``dropped``, ``remaining``.
    """

    rows: int
    kept: int
    counts: list[dict[str, Any]]


def drop_duplicates(
    scores: collection.URLPath,
    out: str | os.PathLike[str] | None = None,
    *,
    groups: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
    place: Place | None = None,
    **options: Any,
) -> Deduplicated:
    """Find the duplicates of a score table and write it without them.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path, optional
        Folder for the rows that are left; None: only count.
    groups : str or path, optional
        Parquet file for the table of groups: which rows, which of them is kept, how similar.
    index : str or path, optional
        Folder for an index of what is left, to compare later tables with (`against`).
    place : Place, optional
        Where it runs.
    **options
        As for `deduplication.find_duplicates`: ``tiers``, ``eps``, ``max_distance``, ``keep``, ``rule``, ``against`` …

    Returns
    -------
    Deduplicated
        How many rows each tier finds, and how many are left.

    Raises
    ------
    ValueError
        If several `eps` are given with `out` or `index`; and as `deduplication.find_duplicates` does.
    """
    place = place or Place()
    eps = options.get("eps", 0.05)
    if not isinstance(eps, int | float) and len(set(eps)) > 1 and (out is not None or index is not None):
        raise ValueError(f"eps={list(eps)}: to drop rows, name one; without a folder to write to, all are counted")
    with opened(scores, place) as table:
        df = table.df[table.df["status"] == "ok"] if "status" in table.df.columns else table.df
        targets = _targets(table, out) if out is not None else []
        if table.encoder.get("model") == "starter" and "semantic" in (options.get("tiers") or deduplication.TIERS):
            place.monitor.note(
                "The starter's embeddings lie close together: its semantic duplicates at the usual eps are mostly "
                "other pictures. Look at the groups, or use the tiers exact and perceptual."
            )
        found = deduplication.find_duplicates(df, provenance=table.encoder or None, **options)
        counts = json.loads(found.counts().to_json(orient="records"))
        rows = len(table.df[["key"]])  # not of the frame: Dask would read its embeddings
        kept = int(counts[-1]["remaining"]) if counts else rows
        if groups is not None:
            with files.write_whole(os.fspath(groups), place.storage_options) as file:
                found.groups().to_parquet(file, index=False)
        left = found.drop(df)
        if out is not None:
            note = {k: v for k, v in options.items() if k != "against" or isinstance(v, str)}
            kept = sum(_write(left, table, targets, {"deduplicated": json.loads(json.dumps(note, default=str))}))
        if index is not None:
            dedup_index.build_index(
                left, index, provenance=table.encoder or None, storage_options=place.storage_options
            )
    return Deduplicated(rows, kept, counts)


# --- adding ---------------------------------------------------------------------------------------


def add_columns(
    scores: collection.URLPath,
    out: str | os.PathLike[str],
    *,
    heads: Sequence[str | os.PathLike[str]] = (),
    clip_score: bool = False,
    prompts: Mapping[str, Any] | None = None,
    caption_stats: bool = False,
    language: bool = False,
    aesthetic_head: str | None = None,
    nsfw_head: str | None = None,
    weights_dir: str | os.PathLike[str] | None = None,
    place: Place | None = None,
) -> list[str]:
    """Add columns to a score table, from its embeddings and captions; no image is decoded.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the larger table.
    heads : sequence of str or path
        Heads of your own: files, or registered names; see `text_steps.score_head`.
    clip_score : bool
        Cosine of caption and image, by the text tower of the table's own model.
    prompts : mapping, optional
        See `text_steps.score_prompts`.
    caption_stats, language : bool
        Length of captions; and their language.
    aesthetic_head, nsfw_head : str, optional
        A published head, see `score_aesthetic`.
    weights_dir : path, optional
        Folder with the published heads.
    place : Place, optional
        Where it runs.

    Returns
    -------
    list of str
        Columns that were added. Those that the table had already are left as they are.

    Raises
    ------
    ValueError
        If nothing is asked for, or a text is compared with embeddings of an unknown model.
    """
    place = place or Place()
    with opened(scores, place, light=not (clip_score or prompts)) as table:
        df, there, added = table.df, set(table.df.columns), {}
        encoder = table.encoder
        for head in map(own_heads.resolve_head, heads):
            if head.column in added:
                raise ValueError(f"two heads give the column {head.column!r}: save one with another column name")
            if head.column not in there:
                df = text_steps.score_head(df, head)
                added[head.column] = head_files.provenance(head)
        if aesthetic_head and "aesthetic_score" not in there:
            df = collection.score_aesthetic(df, aesthetic_head, weights_dir=weights_dir)
            added["aesthetic_score"] = {"head": aesthetic_head}
        if nsfw_head and "nsfw_score" not in there:
            df = collection.score_nsfw(df, nsfw_head, weights_dir=weights_dir)
            added["nsfw_score"] = {"head": nsfw_head}
        if clip_score and "clip_score" not in there:
            df = text_steps.score_clip(df, *_text_model(encoder))
            added["clip_score"] = {"encoder": encoder}
        if prompts and (missing := {n: p for n, p in prompts.items() if f"{n}_score" not in there}):
            df = text_steps.score_prompts(df, missing, *_text_model(encoder))
            added |= {f"{name}_score": {"prompts": p, "encoder": encoder} for name, p in missing.items()}
        if (caption_stats or language) and "caption_words" not in there:
            df = text_steps.caption_stats(df, language=language)
            added |= {name: {} for name in df.columns if str(name).startswith("caption_") and name not in there}
        new = [name for name in df.columns if name not in there]
        if not new:
            raise ValueError(f"nothing to add: the table has what was asked for ({', '.join(sorted(there))})")
        targets = _targets(table, out)
        _write(df, table, targets, {"added": json.loads(json.dumps(added, default=str))})
    return new


def _text_model(encoder: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name and weights of the model that made a table's embeddings."""
    if "model" not in encoder:
        raise ValueError(
            "the score table does not say which model made its embeddings: only a table of `score` or `curate` has "
            "what it takes to compare texts with them (or call score_clip with model= and pretrained=)"
        )
    return str(encoder["model"]), encoder.get("pretrained") or None


# --- other layouts --------------------------------------------------------------------------------


def export_scores(
    scores: collection.URLPath,
    out: str | os.PathLike[str],
    format: str,
    where: str | None = None,
    *,
    place: Place | None = None,
    **options: Any,
) -> exports.Exported:
    """Write a score table in the layout of another project.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder or file, see `exports.export`.
    format : str
        See `exports.FORMATS`.
    where : str, optional
        Expression on the columns: only these rows.
    place : Place, optional
        Where it runs.
    **options
        Of the format.

    Returns
    -------
    exports.Exported
        The files, and their rows.

    Raises
    ------
    ExportError, WhereError
        For an unknown format, rows that it cannot hold, or a mistake in the expression.
    """
    place = place or Place()
    with opened(scores, place) as table:
        df = table.df
        if where is not None:
            df = filters.filter_frame(df, filters.parse_where(where, kinds_of_schema(table.schema)).text)
        return exports.export(df, out, format, storage_options=place.storage_options, **options)
