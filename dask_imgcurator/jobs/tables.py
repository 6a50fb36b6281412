"""The cheap half as whole jobs on a score table: choose rows, drop duplicates, add columns, write other layouts.

Each takes a score table (a folder of files, one per shard) and leaves the files of its result under the same names, so
that any of them goes on from the result of another. No image is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd
from distributed import Client

from ..duplicates import deduplication
from ..duplicates import index as dedup_index
from ..duplicates.cells import CellCheck
from ..engine.cluster import backend_for
from ..engine.run import Place, place, results, run, waves
from ..exports.base import Exported, export, formats
from ..monitor import Monitor
from ..results import Counts
from ..runs.records import made_of, note_unfinished, replacing
from ..select import selection
from ..select.settle import Settled
from ..select.steps import Step, Top, parse_sample, parse_top
from ..select.where import Where, filter_frame, parse_where
from ..steps.read import URLPath
from ..steps.score_table import (
    ScoreFiles,
    ScoreTable,
    check_makers,
    file_provenance,
    open_scores,
    read_kept,
    write_score_file,
)
from ..storage import files
from ..storage.curated import same_folder


@dataclass(frozen=True)
class Table:
    """An open score table: its files, how they are read, and a lazy frame with one partition per file."""

    scores: ScoreTable
    backend: str
    df: Any
    client: Client | None

    @property
    def urls(self) -> list[str]:
        """Its files' URLs."""
        return self.scores.urls

    def made(self, *columns: str) -> dict[str, Any]:
        """Provenance of the first file; MixedModelsError if several models made one of the columns that are used."""
        return check_makers(self.scores, columns)


@contextmanager
def open_table(
    scores: URLPath,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
    light: bool = True,
) -> Iterator[Table]:
    """Open a score table, with a place to compute on; `light`: no model will be loaded there."""
    name = backend_for(backend, client, cheap=light)
    table = open_scores(scores, storage_options)
    monitor = monitor or Monitor()
    note_unfinished(scores, storage_options, monitor)
    with place(client, name, monitor, light) as lent:
        yield Table(table, name, table.frame(name), lent)


def targets_of(table: Table, out: str | os.PathLike[str]) -> list[str]:
    """Files of a result, named after the table's; where several folders have a name, their own is added."""
    folder = os.fspath(out)
    if any(same_folder(folder, url.rpartition("/")[0]) for url in table.urls):
        raise ValueError(f"{folder} is the score table itself: choose another folder for the result")
    taken: dict[str, str] = {}
    for url in table.urls:
        name = url.rpartition("/")[2]
        if name in taken.values():
            name = f"{name.removesuffix('.parquet')}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"
        taken[url] = name
    return [files.join(folder, name) for name in taken.values()]


@dataclass(frozen=True)
class ResultFile:
    """A result file, and the table's file that it comes from."""

    source: str
    url: str


def write_table(
    df: dd.DataFrame,
    table: Table,
    targets: Sequence[str],
    note: Mapping[str, Any],
    settled: Settled | None = None,
) -> list[Counts]:
    """Write each partition's kept rows as a file, and count the input, in order."""
    pairs = {str(i): ResultFile(*pair) for i, pair in enumerate(zip(table.urls, targets, strict=True))}
    if settled is not None:  # the rest of the kept rows is read when it is known which they are
        df = df[[name for name in settled.columns if name in df.columns] or list(df.columns[:1])]
    read = ScoreFiles(table.backend, table.scores.schema, table.scores.storage_options)

    def build(names: Sequence[str]) -> dd.DataFrame:
        part = df.partitions[int(names[0]) : int(names[-1]) + 1] if len(names) < len(pairs) else df
        return results(part, _write_partition, read, note, settled, label="write", each=[pairs[n] for n in names])

    found = dict(run(table.client, waves(list(pairs), build), "writing", label=lambda name: pairs[name].url))
    return [found[name] for name in pairs]


def _write_partition(
    frame: Any, target: ResultFile, read: ScoreFiles, note: Mapping[str, Any], settled: Settled | None
) -> Counts:
    provenance = file_provenance(target.source, read.storage_options) or {}
    for name, value in note.items():
        provenance[name] = {**provenance.get(name, {}), **value} if isinstance(value, dict) else value
    counts = Counts(len(frame)) if settled is None else settled.count(frame)
    if settled is not None:
        frame = read_kept(target.source, read, frame, settled.mask(frame))
    write_score_file(frame, target.url, provenance, read.backend, read.storage_options)
    return counts


# --- choosing -------------------------------------------------------------------------------------


def select_rows(
    scores: URLPath,
    out: str | os.PathLike[str],
    where: str | None = None,
    *,
    top: str | Sequence[str] = (),
    sample: str | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> Counts:
    """Copy the rows of a score table that are chosen to another.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the selected rows; files have the names of their sources (where several have one, with a hash added).
    where : str, optional
        Expression on the columns; rows whose ``status`` is not ``ok`` are never kept.
    top : str or sequence of str
        Of the rows that `where` leaves, the best: ``"30% by clip_score"``, ``"10000 by aesthetic_score"``; one after
        another.
    sample : str, optional
        Of what is left then, a random part: ``"10000"``, ``"10% seed 1"``, ``"20 by cluster"``.
    overwrite : bool
        Whether another result in `out` is replaced, whole; the same selection always may be.
    storage_options : mapping, optional
        For the fsspec file systems of both tables.
    backend : {"auto", "cudf", "pandas"}, optional
        Of the frames; by default pandas: nothing here is worth a card.
    client : distributed.Client, str, or int, optional
        Where to run: a client, the address of a scheduler, or a number of new worker processes. By default threads of
        this process do it: there is no model to load.
    monitor : Monitor, optional
        Is told how the run goes on.

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
    FileExistsError
        If `out` holds another result and `overwrite` is False, or files that this library did not write.
    ValueError
        If `out` is the score table itself, or several models made the scores that are compared.
    """
    ranked = steps_of(top, sample)
    with open_table(scores, storage_options, backend, client, monitor) as table:
        steps = ranked if where is None else [parse_where(where, table.scores.kinds), *ranked]
        table.made(*used_columns(steps))
        targets = targets_of(table, out)
        settled = selection.settle(table.df, steps, alone=True)
        note = {"steps": [step.text for step in steps]}
        made = made_of("select", scores, note, ", ".join(note["steps"]) or "all")
        with replacing(os.fspath(out), made, targets, overwrite, table.scores.storage_options):
            return Counts.sum(write_table(table.df, table, targets, {"selected": note}, settled))


def used_columns(steps: Iterable[Step]) -> list[str]:
    """Columns that decide a selection."""
    found: list[str | None] = []
    for step in steps:
        if isinstance(step, Where):
            found.extend(step.columns)
        elif isinstance(step, Top):
            found.extend([step.column, *(step.among.columns if isinstance(step.among, Where) else ())])
    return [name for name in dict.fromkeys(found) if name is not None]


def steps_of(top: str | Sequence[str], sample: str | None) -> list[Step]:
    """Parse a selection's steps that rank or draw, reporting mistakes before anything starts."""
    steps: list[Step] = [parse_top(t) for t in ([top] if isinstance(top, str) else top)]
    return steps if sample is None else [*steps, parse_sample(sample)]


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
    cells : CellCheck or None
        How well the cells of the semantic tier work; None where every pair was compared.
    """

    rows: int
    kept: int
    counts: list[dict[str, Any]]
    cells: CellCheck | None = None


def drop_duplicates(
    scores: URLPath,
    out: str | os.PathLike[str] | None = None,
    *,
    groups: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
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
    overwrite : bool
        Whether another result in `out` is replaced, whole.
    storage_options, backend, client, monitor
        As for `select_rows`.
    **options
        As for `deduplication.find_duplicates`: ``tiers``, ``eps``, ``max_distance``, ``keep``, ``rule``, ``against`` …

    Returns
    -------
    Deduplicated
        How many rows each tier finds, and how many are left.

    Raises
    ------
    FileExistsError
        As `select_rows`.
    ValueError
        If several `eps` are given with `out` or `index`; if several models made what is compared; and as
        `deduplication.find_duplicates` does.
    """
    monitor = monitor or Monitor()
    eps = options.get("eps", 0.05)
    if not isinstance(eps, int | float) and len(set(eps)) > 1 and (out is not None or index is not None):
        raise ValueError(f"eps={list(eps)}: to drop rows, name one; without a folder to write to, all are counted")
    vectors = options.get("embedding", "embedding")
    with open_table(scores, storage_options, backend, client, monitor) as table:
        df = table.df[table.df["status"] == "ok"] if "status" in table.df.columns else table.df
        targets = targets_of(table, out) if out is not None else []
        semantic = "semantic" in (options.get("tiers") or deduplication.TIERS) and vectors in table.scores.schema.names
        used = [options.get("keep") or "key", *([vectors] if semantic or index is not None else [])]
        encoder = table.made(*used).get("encoder", {})
        if encoder.get("model") == "starter" and semantic:
            monitor.note(
                "The starter's embeddings lie close together: its semantic duplicates at the usual eps are mostly "
                "other pictures. Look at the groups, or use the tiers exact and perceptual."
            )
        made = encoder or None
        found = deduplication.find_duplicates(df, provenance=made, storage_options=storage_options, **options)
        counts = json.loads(found.counts().to_json(orient="records"))
        rows = len(table.df[["key"]])  # not of the frame: Dask would read its embeddings
        kept = int(counts[-1]["remaining"]) if counts else rows
        if groups is not None:
            with files.write_whole(os.fspath(groups), storage_options) as file:
                found.groups().to_parquet(file, index=False)
        left = found.drop(df)
        if out is not None:
            note = {k: v for k, v in options.items() if k != "against" or isinstance(v, str)}
            note = json.loads(json.dumps(note, default=str))
            record = made_of("dedup", scores, note, ", ".join(f"{k} {v}" for k, v in note.items()))
            with replacing(os.fspath(out), record, targets, overwrite, table.scores.storage_options):
                kept = sum(counts.rows for counts in write_table(left, table, targets, {"deduplicated": note}))
        if index is not None:
            dedup_index.build_index(left, index, provenance=made, storage_options=storage_options)
    return Deduplicated(rows, kept, counts, found.cells)


# --- other layouts --------------------------------------------------------------------------------


def export_scores(
    scores: URLPath,
    out: str | os.PathLike[str],
    format: str,
    where: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> Exported:
    """Write a score table in the layout of another project.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder or file, see `export`.
    format : str
        Name of the format, see `export`.
    where : str, optional
        Expression on the columns: only these rows.
    storage_options, backend, client, monitor
        As for `select_rows`.
    **options
        Of the format; and ``overwrite``, as for `export`.

    Returns
    -------
    Exported
        The files, and their rows.

    Raises
    ------
    ExportError, WhereError
        For an unknown format, rows that it cannot hold, or a mistake in the expression.
    ValueError
        If several models made what is written.
    """
    with open_table(scores, storage_options, backend, client, monitor) as table:
        df, used = table.df, list[str]()
        if where is not None:
            parsed = parse_where(where, table.scores.kinds)
            df, used = filter_frame(df, parsed), [*parsed.columns]
        if (known := formats().get(format)) is not None and known.folder:
            layout = known.function(df, **{k: v for k, v in options.items() if k != "overwrite"})
            used += [*layout.sources, *layout.vectors.values()]
        table.made(*used)
        return export(df, out, format, storage_options=storage_options, **options)
